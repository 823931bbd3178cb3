"""The graph as torch.compile captures it, and the only home of private torch imports.

The level is the Dynamo graph: `aten.linear` is not decomposed there, operators still have their autograd, and
parameters are placeholders (or attributes, under Inductor's freezing). Every tensor node carries its fake value.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CompiledGraph = Callable[..., Any]
OpOverload = torch._ops.OpOverload
DispatchMode = TorchDispatchMode


def value(node: Node) -> Any:
    """The fake value that a node stands for (a FakeTensor, a SymInt, a tuple of them), or None if it has none."""
    return node.meta.get("example_value", node.meta.get("val"))


def needs_gradient(node: Node) -> bool:
    """Whether a captured call gave something that requires a gradient."""
    return any(v.requires_grad for v in pytree.tree_leaves(value(node)) if isinstance(v, Tensor))


def is_distributed(node: Node) -> bool:
    """Whether a node stands for a DTensor."""
    return hasattr(value(node), "device_mesh")


def arguments(node: Node) -> tuple[Any, ...]:
    """The positional arguments of a node."""
    return node.args


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """The fake mode of the graph's values; by now the tracing context holds another, for the backend's own tracing."""
    values = (value(node) for node in gm.graph.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()


def emit(
    gm: GraphModule,
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: Node,
) -> Node:
    """Add a call before `like`, on its behalf: same module stack and stack trace, with its fake value computed."""
    with gm.graph.inserting_before(like):
        node = gm.graph.call_function(target, tuple(args), dict(kwargs or {}))
    node.meta = {k: v for k, v in like.meta.items() if k not in ("example_value", "val")}
    refresh(gm, node)
    return node


def refresh(gm: GraphModule, node: Node) -> None:
    """Compute the fake value of a call anew; a bad call fails here, at compile time."""
    args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), value)
    assert callable(node.target)
    with fake_mode(gm):
        node.meta["example_value"] = node.target(*args, **kwargs)


def substitute(old: Node, new: Node) -> None:
    """Let `new` be read in place of `old`, under the value that was captured: aliases and `requires_grad` are those.

    Its strides may no longer be; the pass `restride` makes them true.
    """
    new.meta["example_value"] = value(old)
    new.meta[STANDS_IN] = True
    old.replace_all_uses_with(new)


STANDS_IN = "fp4fx_stands_in"
"""Key of a node's metadata: its value may have other strides than its call gives."""


def is_traced(tensor: Tensor) -> bool:
    """Whether a call on the tensor computes nothing but becomes a node of a graph."""
    return isinstance(tensor, FakeTensor | FunctionalTensor)


def own_copy(gm: GraphModule) -> GraphModule:
    """The graph on the same tensors, for us to change: Dynamo goes on reading its own, the inputs above all."""
    graph = torch.fx.Graph()
    nodes: dict[Node, Node] = {}
    output = graph.output(graph.graph_copy(gm.graph, cast(dict[Any, Any], nodes)))
    for node, twin in nodes.items():
        if hasattr(node, "_dynamo_source"):
            twin._dynamo_source = node._dynamo_source
    output.meta["example_value"] = torch.fx.map_arg(output.args[0], value)  # as captured, whatever passes do
    result = GraphModule(gm, graph)
    result.meta = dict(gm.meta)
    sources = gm.__dict__.get("_param_name_to_source")
    if sources is not None:
        result.__dict__["_param_name_to_source"] = dict(sources)
    return result


def rewritten(program: ExportedProgram, rewrite: Callable[[GraphModule], None]) -> ExportedProgram:
    """A program on a graph of its own that was rewritten; inputs and the number of results stay what they were."""
    gm = own_copy(program.graph_module)
    rewrite(gm)
    for node in gm.graph.nodes:
        if "example_value" in node.meta:
            node.meta["val"] = node.meta.pop("example_value")
    gm.graph.output_node().meta.pop("val", None)
    return program._transform_do_not_use(lambda _: PassResult(gm, True))


def symbolically_traced() -> bool:
    """Whether `torch.fx.symbolic_trace` or another tracer of its kind is at work, which records no call on tensors."""
    if torch.compiler.is_compiling() or not is_fx_symbolic_tracing():
        return False
    return get_proxy_mode() is None  # else make_fx, which records every call


def real_tensors(gm: GraphModule, example_inputs: Sequence[Any]) -> dict[Node, Tensor]:
    """The real tensor behind every parameter and buffer of the graph, whether a placeholder or an attribute."""
    found = {
        node: example
        for node, example in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
        if isinstance(example, Tensor) and (isinstance(example, torch.nn.Parameter) or _is_static(node))
    }
    for node in gm.graph.find_nodes(op="get_attr"):
        attribute = _attribute(gm, str(node.target))
        if isinstance(attribute, Tensor):
            found[node] = attribute
    return found


def _is_static(node: Node) -> bool:
    return bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def _attribute(gm: GraphModule, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(gm.get_submodule(owner), name, None)


_STEP = re.compile(r"\['([^']+)'\]|\.(\w+)|\[(\d+)\]")


def parameter_name(gm: GraphModule, node: Node) -> str:
    """The qualified name, within the compiled module, of the parameter that a node stands for."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        source = getattr(gm, "_param_name_to_source", {}).get(str(node.target))
    if source is None:
        return str(node.target)
    text = source.name if isinstance(source.name, str) else source.name()
    _, *steps = ["".join(step) for step in _STEP.findall(text)] or [""]
    return ".".join(step for step in steps if step not in ("_modules", "_parameters", "_buffers")) or text


def parameter_names(gm: GraphModule, nodes: Iterable[Node]) -> dict[Node, str]:
    """A name of its own for every parameter node, also where two models of one graph have parameters of one name."""
    names = {node: parameter_name(gm, node) for node in nodes}
    count = Counter(names.values())
    return {node: name if count[name] == 1 else f"{name} ({node.name})" for node, name in names.items()}


def module_classes(gm: GraphModule) -> dict[str, type]:
    """The class of every module that ran an op of the graph, by qualified name."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in gm.graph.nodes)
    return {
        re.sub(r"^L\['\w+'\]\.?", "", str(path)): cls
        for stack in stacks
        for path, cls in stack.values()
        if isinstance(cls, type)
    }


def add_constant(gm: GraphModule, name: str, tensor: Tensor) -> Node:
    """Hold a tensor as an attribute of the graph module; returns its get_attr node, placed before the first call."""
    gm.register_buffer(name, tensor)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        from torch._dynamo.source import ConstantSource

        # AOTAutograd asks for the origin of every attribute of a graph that Dynamo made
        sources[name] = ConstantSource(name)
    with gm.graph.inserting_before(first_call(gm)):
        node = gm.graph.get_attr(name)
    node.meta["example_value"] = fake_mode(gm).from_tensor(tensor, static_shapes=True)
    return node


def add_input(gm: GraphModule, name: str, tensor: Tensor) -> Node:
    """A new last input of the graph, of fixed shape and like the given tensor; who calls the graph has to pass it."""
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        node = gm.graph.placeholder(name)
    node._dynamo_source = None  # AOTAutograd asks; this one is not of the model
    node.meta["example_value"] = fake_mode(gm).from_tensor(tensor, static_shapes=True)
    return node


def drop_unread(gm: GraphModule, positions: Container[int | None], count: int) -> list[int]:
    """Remove the inputs at these positions that nothing reads; the positions of the first `count` inputs that stay."""
    kept = []
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")[:count]):
        if position in positions and not node.users:
            gm.graph.erase_node(node)
        else:
            kept.append(position)
    gm.recompile()
    return kept


def backend_fake(tensor: Tensor) -> Tensor:
    """A stand-in for an input that Dynamo does not know, of fixed shape, in the mode that AOTAutograd traces under.

    For a weight in oneDNN's order, with which Inductor would not cache the graph, one that has its size and strides.
    """
    if tensor.is_mkldnn:
        tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def first_call(gm: GraphModule) -> Node:
    """The first node that is neither an input nor an attribute."""
    nodes: Iterable[Node] = gm.graph.nodes
    return next(n for n in nodes if n.op not in ("placeholder", "get_attr"))


def inline(gm: GraphModule, node: Node) -> None:
    """Replace a call by the pre-dispatch ATen graph of what it does."""
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    inputs = [a for a in flat if isinstance(a, Node)]

    def run(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(a, Node) else a for a in flat], spec)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with fake_mode(gm):
        traced = make_fx(run, pre_dispatch=True)(*map(value, inputs))
    copies: dict[Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for inner in traced.graph.nodes:
        if inner.op == "get_attr":
            copies[inner] = add_constant(gm, f"{node.name}_{inner.target}", _attribute(traced, inner.target))
        elif inner.op == "call_function":
            with gm.graph.inserting_before(node):
                copies[inner] = gm.graph.node_copy(inner, lambda n: copies[n])
            copies[inner].meta = {**node.meta, "example_value": inner.meta.get("val")}
    (result,) = traced.graph.output_node().args
    _replace_structure(node, torch.fx.map_arg(result, lambda n: copies[n]))


def _replace_structure(node: Node, result: Any) -> None:
    """Let the users of a call read its result, which may be a tuple that they index."""
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            index = user.args[1]
            chosen = result[index]
            if isinstance(chosen, Node):
                user.replace_all_uses_with(chosen)
                user.graph.erase_node(user)
    if not node.users:
        node.graph.erase_node(node)


def eliminate_dead_code(gm: GraphModule) -> None:
    """Remove unused calls that are known to be pure. FX alone would remove a `y.relu_()` whose result nobody reads."""

    def impure(node: Node) -> bool:
        if node.op == "get_attr" or node.target is operator.getitem:
            return False
        return not isinstance(node.target, OpOverload) or node.is_impure()

    gm.graph.eliminate_dead_code(is_impure_node=impure)


def storages(values: Iterable[Any]) -> set[int]:
    """Identities of the storages behind fake tensors; two that share one alias each other."""
    return {v.untyped_storage()._cdata for v in pytree.tree_leaves(tuple(values)) if isinstance(v, Tensor)}


def _in_place(node: Node) -> bool:
    """Whether a call of a Python function passes True for its argument `inplace`, by position too."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature
        return bool(node.kwargs.get("inplace"))
    return bool(bound.arguments.get("inplace"))


def mutated(node: Node) -> set[int]:
    """Storages that a call writes to: by schema where there is one, by Python's naming convention otherwise."""
    written: list[Any] = []
    if node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
        written = [node.args[0]]
    elif node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        name = getattr(node.target, "__name__", "")
        if schema is not None:
            names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            order = [a.name for a in schema.arguments]
            given = {**dict(zip(order, node.args, strict=False)), **node.kwargs}
            written = [given[n] for n in names if n in given]
        elif name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv", "setitem") or _in_place(node):
            written = list(node.args[:1])
        if "out" in node.kwargs:
            written.append(node.kwargs["out"])
    return storages(value(n) for n in pytree.tree_leaves(written) if isinstance(n, Node))


def configured(options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Inductor's configuration with these options, until the end of a `with`."""
    import torch._inductor.config

    return cast(AbstractContextManager[None], torch._inductor.config.patch(dict(options)))


def freezing() -> bool:
    """Whether Inductor is to freeze parameters and fold what is computed from them alone."""
    import torch._inductor.config

    return bool(torch._inductor.config.freezing) and not torch.is_grad_enabled()


UNCACHED: Mapping[str, Any] = {"fx_graph_cache": False}
"""Inductor options under freezing. Its cache keys leave out the value of a frozen 0-dim tensor, yet write it into the
code: two models that differ in their global scales only would share one artifact (seen with torch 2.15)."""


def never_fold(op: Any) -> None:
    """Tell Inductor's constant folding to leave an op alone, so that packed weights stay packed under freezing."""
    from torch._inductor.constant_folding import _dont_constant_fold, add_dont_constant_fold

    if op not in _dont_constant_fold:
        add_dont_constant_fold(op)


def inductor_modes() -> Mapping[str, Mapping[str, Any]]:
    """The modes of torch.compile, and what each means to Inductor."""
    import torch._inductor

    return cast(Mapping[str, Mapping[str, Any]], torch._inductor.list_mode_options())


def is_inductor_option(name: str) -> bool:
    """Whether Inductor's configuration has an entry of that name."""
    import torch._inductor.config

    return name in torch._inductor.config.get_config_copy()


def lower(gm: GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any]) -> CompiledGraph:
    """Hand a graph to Inductor."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=dict(options) or None)
    return cast(CompiledGraph, compiled)


def observed(gm: GraphModule, name: str, rewrite: Callable[[GraphModule], int]) -> int | None:
    """Apply a rewrite under Inductor's observer, which times and draws it; None if `disabled_passes` names it."""
    from torch.fx.passes.graph_transform_observer import GraphTransformObserver

    return GraphTransformObserver(gm, name).apply_gm_pass(rewrite)


def dump(gm: GraphModule, name: str) -> None:
    """Write the graph to the structured log that `TORCH_TRACE` collects."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False, include_stride=True),
    )
