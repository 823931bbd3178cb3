"""A symbolic trace that needs no inputs and never fails: what it cannot follow it names, and goes on inside.

The graph is only read for its data flow. It is never executed: optional arguments and flags are baked into it, and
behind a module whose Python depends on data the trace goes on with values that come from nowhere.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fp4fx.canonical import canonical
from fp4fx.dataflow import argument, op_name, view_chain
from fp4fx.graph_sites import COMPUTE_OPS, NO_RECURRENT
from fp4fx.products import factors
from fp4fx.site import Note

UNTRACEABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What Python code raises when it meets a value that it cannot look into; `torch.fx.TraceError` is a ValueError."""

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""PyTorch's own linears and convolutions."""

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

METADATA = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "is_sparse", "is_nested", "requires_grad"}
    | {"size", "dim", "numel", "nelement", "ndimension", "stride", "is_floating_point", "is_complex", "element_size"}
)


class Value(fx.Proxy):
    """A value of the trace; one made from parameters and buffers alone knows its shape, dtype and device."""

    def __getattr__(self, name: str) -> Any:
        known = self.node.meta.get("val") if name in METADATA else None
        return getattr(known, name) if isinstance(known, Tensor) else fx.proxy.Attribute(self, name)

    def __len__(self) -> int:
        raise TypeError("the length is not known")  # a TypeError is no answer to `[*x]`, which only asks for a hint


class Attributes(OrderedDict[str, Any]):
    """Stands for a module's `_parameters` or `_buffers` during the trace: holds their values and notes what is read."""

    def __init__(self, values: Mapping[str, Any], history: list[Any]) -> None:
        super().__init__(values)
        self.history = history

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        self.history.append(value)
        return value


class SymbolicTrace(fx.Tracer):
    """The graph of a model's forward without example inputs.

    The trace leaves values in the model's parameters; whoever makes it must restore the attributes of every module.

    Attributes:
        graph: Compute ops are ATen overloads; `meta["val"]` stands where it depends on no activation.
        parameters: The nodes that stand for parameters.
        opaque: The modules whose forward could not be followed, with the reason.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.parameters: dict[fx.Node, Tensor] = {}
        self.opaque: list[Note] = []
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.history: list[Any] = []  # what happened, in order: nodes made, modules called, parameters read
        self.tensors: dict[int, Value] = {}
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self._adopt(path, module)
        with (
            _intercepted(nn.Module, "__call__", self._call),
            _intercepted(nn.MultiheadAttention, "forward", self._multihead),
        ):
            model(*self._fresh_arguments(model))

    def _adopt(self, path: str, module: nn.Module) -> None:
        """Put values in the place of a module's parameters and buffers."""
        for kind in ("_parameters", "_buffers"):
            values = {
                name: tensor if tensor is None else self._attribute(f"{path}.{name}".lstrip("."), tensor)
                for name, tensor in module.__dict__[kind].items()
            }
            module.__dict__[kind] = Attributes(values, self.history)
        module.__dict__["_compiled_call_impl"] = None  # set by `module.compile()`: would hand the values to Dynamo
        module.__dict__["_check_input_dim"] = lambda _: None  # batch norms look at their input's rank

    def _attribute(self, path: str, tensor: Tensor) -> Value:
        node = self.create_node("get_attr", path, (), {})
        node.meta["val"] = tensor
        if isinstance(tensor, nn.Parameter):
            self.parameters[node] = tensor
        self.tensors[id(tensor)] = value = Value(node, self)
        return value

    def _fresh(self, name: str) -> Value:
        """A value that comes from nowhere."""
        return Value(self.create_node("placeholder", name, (), {}), self)

    def _fresh_arguments(self, module: nn.Module) -> tuple[Value, ...]:
        """Values for the arguments that a module requires, or for the first, as models of transformers require none."""
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            return (self._fresh("query"),) * 3
        named_only = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        arguments = [p for p in inspect.signature(module.forward).parameters.values() if p.kind not in named_only]
        required = [p for p in arguments if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
        return tuple(self._fresh(p.name) for p in required or arguments[:1])

    # What torch.fx calls

    def proxy(self, node: fx.Node) -> Value:
        """The value of a node."""
        return Value(node, self)

    def iter(self, obj: Any) -> Iterator[Any]:
        """A shape of unknown length is one size, so that `x.view(*x.shape[:-1], -1)` can be followed."""
        return iter((obj[0],)) if _is_shape(obj.node) else super().iter(obj)

    def create_arg(self, a: Any) -> Any:
        """The node of a tensor that reached an op; `torch.fx.Tracer` would search the model, and write to it."""
        if isinstance(a, Tensor):
            value = self.tensors.get(id(a))
            return (value if value is not None else self._attribute("constant", a)).node
        return fx.proxy.TracerBase.create_arg(self, a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """A value for a call, in its ATen spelling if it has one."""
        if target is F.multi_head_attention_forward:
            return self._attention(*args, **kwargs)
        call = canonical(target, args, kwargs) if kind in {"call_function", "call_method"} else None
        if call is not None:
            return super().create_proxy("call_function", *call)
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Node:
        """A node; one that depends on no activation gets its shape and dtype, found on the meta device."""
        node = super().create_node(kind, target, args, kwargs, *rest, **options)
        self.history.append(node)
        inputs = node.all_input_nodes
        if kind in {"call_function", "call_method"} and inputs and all("val" in source.meta for source in inputs):
            on_meta, named = fx.node.map_arg((args, kwargs), lambda source: _on_meta(source.meta["val"]))
            call, on_meta = (target, on_meta) if callable(target) else (getattr(on_meta[0], target), on_meta[1:])
            try:
                node.meta["val"] = call(*on_meta, **named)
            except UNTRACEABLE:  # it needs real values, and its shape stays unknown
                return node
        return node

    # Modules

    def _call(
        self, forward: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, *, scoped: bool = True
    ) -> Any:
        """Run a module of the model on values; if its Python cannot take them, note it and go on inside of it."""
        path = self.paths.get(id(module))
        if path is None:
            return forward(module, *args, **kwargs)
        start, outside = len(self.history), self.module_stack
        self.history.append(module)
        if scoped:
            calls = self.num_calls[path] = self.num_calls.get(path, -1) + 1
            call = f"{path}@{calls}" if calls else path
            self.module_stack = OrderedDict(outside)
            self.module_stack[call] = (path, type(module))
        try:
            return self._forward(forward, module, args, kwargs)
        except UNTRACEABLE as error:
            if any(_parameters(m) for m in module.modules()):
                recurrent = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
                reason = NO_RECURRENT if recurrent else f"cannot be followed without inputs: {one_line(error)}"
                self.opaque.append(Note(path, reason))
            self._look_inside(module, start)
            return self._fresh("output")
        finally:
            self.module_stack = outside

    def _forward(self, forward: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            raise TypeError(NO_RECURRENT)
        if isinstance(module, INSTANCE_NORMS):
            statistics = (module.running_mean, module.running_var, module.weight, module.bias)
            return F.instance_norm(args[0], *statistics, use_input_stats=not module.track_running_stats)
        return forward(module, *args, **kwargs)

    def _look_inside(self, module: nn.Module, start: int) -> None:
        """Trace the children of a module, each by itself, but for what its forward reached (before it failed)."""
        recent = self.history[start:]
        called = {id(entry) for entry in recent if isinstance(entry, nn.Module)}
        read = {id(entry) for entry in recent if isinstance(entry, Value)}
        eaten = _eaten(entry for entry in recent if isinstance(entry, fx.Node))
        layer = next((kind for kind in LAYERS if isinstance(module, kind)), None)
        if layer is not None and not any(value.node in eaten for value in _parameters(module)):
            layer.forward(module, self._fresh("input"))  # a subclass that looks at its input, to pad it for instance
        if isinstance(module, nn.MultiheadAttention) and not any(value.node in eaten for value in _parameters(module)):
            inputs: list[Any] = [self._fresh(name) for name in ("query", "key", "value")]
            nn.MultiheadAttention.forward(module, *inputs)
            called.add(id(module.out_proj))  # by no call, but its weight is used
        if hasattr(module, "is_transposed") and hasattr(module, "_apply_gate"):
            self._experts(module, eaten)
        for child in module.children():
            self._reach(child, called, read, eaten)

    def _experts(self, module: nn.Module, eaten: Collection[fx.Node]) -> None:
        """The products of what transformers decorates as experts: stacks [E, N, K], or [E, K, N] if transposed."""
        for value in _parameters(module):
            if value.node not in eaten and value.dim() == 3:
                tokens: Any = self._fresh("tokens")
                matrices: Any = value if module.is_transposed else value.transpose(1, 2)
                torch.bmm(tokens, matrices)

    def _reach(self, module: nn.Module, called: set[int], read: set[int], eaten: Collection[fx.Node]) -> None:
        if id(module) in called:
            return
        inside = list(module.modules())
        begun = any(id(m) in called or any(v.node in eaten for v in _parameters(m)) for m in inside)
        if begun or (type(module).forward is nn.Module.forward and "forward" not in module.__dict__):
            for child in module.children():
                self._reach(child, called, read, eaten)
        elif any(id(value) in read for value in _parameters(module)):
            # The parent read the weight and failed before it used it: the parent computes with it, not the module.
            self._call(type(module).forward, module, self._fresh_arguments(module), {}, scoped=False)
        else:
            start = len(self.history)
            module(*self._fresh_arguments(module))
            self._look_inside(module, start)  # what its forward calls with optional arguments only

    def _multihead(self, forward: Callable[..., Any], module: nn.MultiheadAttention, args: Any, kwargs: Any) -> Any:
        if id(module) not in self.paths:
            return forward(module, *args, **kwargs)
        given = inspect.signature(forward).bind(module, *args, **kwargs).arguments
        weights = {f"{name}_proj_weight": getattr(module, f"{name}_proj_weight") for name in "qkv"}
        return self._attention(
            *(given[name] for name in ("query", "key", "value")),
            *(module.embed_dim, module.num_heads, module.in_proj_weight, module.in_proj_bias),
            *(module.bias_k, module.bias_v, module.add_zero_attn, module.dropout),
            *(module.out_proj.weight, module.out_proj.bias),
            need_weights=given.get("need_weights", True),
            use_separate_proj_weight=module.in_proj_weight is None,
            **weights,
        )

    def _attention(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The projections of `torch.nn.functional.multi_head_attention_forward`, which looks at its inputs' shapes."""
        a = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
        query, key, value, width = a["query"], a["key"], a["value"], a["embed_dim_to_check"]
        if a.get("use_separate_proj_weight"):
            projections = [(x, a[f"{name}_proj_weight"]) for x, name in ((query, "q"), (key, "k"), (value, "v"))]
        elif query is key and key is value:
            projections = [(query, a["in_proj_weight"])]
        elif key is value:
            w_q, w_kv = a["in_proj_weight"].split([width, 2 * width])
            projections = [(query, w_q), (key, w_kv)]
        else:
            w_q, w_k, w_v = a["in_proj_weight"].chunk(3)  # in a loop, values of unknown number could not be followed
            projections = [(query, w_q), (key, w_k), (value, w_v)]
        projected = [F.linear(source, weight) for source, weight in projections]
        for bias in (a["bias_k"], a["bias_v"]):
            if bias is not None:
                torch.cat([projected[-1], bias])
        attended: Any = self._fresh("attended")
        output = F.linear(attended, a["out_proj_weight"], a["out_proj_bias"])
        return output, self._fresh("attention") if a.get("need_weights", True) else None


def one_line(error: Exception) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _intercepted(kind: type[nn.Module], name: str, call: Callable[..., Any]) -> Iterator[None]:
    """Every call of a method of modules, in this process, goes through `call(original, module, args, kwargs)`."""
    original = getattr(kind, name)

    @functools.wraps(original)
    def intercepted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(original, module, args, kwargs)

    setattr(kind, name, intercepted)
    try:
        yield
    finally:
        setattr(kind, name, original)


def _on_meta(value: Any) -> Any:
    return torch.empty_like(value, device="meta", requires_grad=False) if isinstance(value, Tensor) else value


def _is_shape(node: fx.Node) -> bool:
    """True if a node stands for the shape of an activation, or for a slice of it."""
    name = op_name(node)
    if name == "getitem":
        source, index = node.args
        return isinstance(index, slice) and isinstance(source, fx.Node) and _is_shape(source)
    return node.args[1:] == ("shape",) if name == "getattr" else name == "size" and len(node.args) == 1


def _parameters(module: nn.Module) -> list[Value]:
    return [value for value in module.__dict__["_parameters"].values() if isinstance(value, Value)]


def _eaten(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The parameters that the weights of the compute ops among `nodes` are made from, and what lies between."""
    found: set[fx.Node] = set()
    for node in nodes:
        compute = COMPUTE_OPS.get(node.target)
        stack = [argument(node, compute.weight)] if compute is not None else []
        for factor in factors(node) or ():
            *views, end = view_chain(factor.node, ())
            if end.op == "get_attr":
                stack = [*views, end]
        while stack:
            source = stack.pop()
            if isinstance(source, fx.Node) and source not in found:
                found.add(source)
                stack.extend(source.all_input_nodes if "val" in source.meta or source.target not in COMPUTE_OPS else ())
    return found
