"""Modules with packed parameters: subclasses of the user's own classes, in which a parameter is computed from buffers.

A packed `weight` is a property that dequantizes the buffers `weight_packed`, `weight_scale` (uint8) and
`weight_global_scale` (fp32 []). Everything else about the module, its class in `isinstance`, its forward, its hooks,
stays what it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fp4fx import nvfp4, ops  # noqa: F401  (ops defines torch.ops.fp4fx)
from fp4fx.capture import symbolically_traced
from fp4fx.errors import CheckpointError, PlanError, TraceError
from fp4fx.kernels import encoding
from fp4fx.policy import Compute
from fp4fx.site import Order

if TYPE_CHECKING:
    from fp4fx.plan import Plan

PARTS = ("packed", "scale", "global_scale")
INPUT_SCALE = "input_global_scale"
_PLAN = "_fp4fx_plan"
_DECODED: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""What was last decoded from the codes of this id, while somebody holds it."""
_SOURCE: MutableMapping[Tensor, tuple[tuple[Tensor, ...], PackedSpec]] = WeakTensorKeyDictionary()
"""Of those in `_DECODED` that were assigned over: the parts and the spec that they were decoded from."""

_HOW = "nvfp4"
How = tuple[tuple[int, ...], str, Order, int, Compute]
"""What a packed parameter decodes to: shape, name of the dtype, order, groups, compute. Kept as `weight_nvfp4` beside
the specs: Dynamo guards every field of a spec, but of a tuple of numbers and strings only that the module holds it."""

Activations = Literal["nvfp4", "nvfp4-static"] | None


@dataclass(frozen=True, kw_only=True)
class PackedSpec:
    """How one packed parameter is stored and what it decodes to."""

    shape: tuple[int, ...]
    order: Order = "rows"
    groups: int = 1
    dtype: torch.dtype = torch.float32
    """Dtype of the computed parameter; follows `module.to(dtype)`."""
    scale_rule: str = "max"
    block: tuple[int, int] = (1, 16)
    compute: Compute = "bf16"
    """Precision that a kernel may compute in (see `Policy.compute`)."""
    sqnr: float | None = None
    """Signal to quantization noise of the stored parameter in dB; None if the dense one was never seen."""


class Packed(nn.Module):
    """Mixin of every generated subclass."""

    nvfp4: dict[str, PackedSpec]
    nvfp4_activations: Activations
    nvfp4_activation_rule: str = "max"
    """How the scales of a quantized input are chosen."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move like any module, but keep the fp32 of global scales and let the computed dtype follow casts."""
        fp32 = {
            name: self._buffers[name]
            for name in (*(f"{n}_global_scale" for n in self.nvfp4), INPUT_SCALE)
            if name in self._buffers
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in fp32.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != torch.float32:
                self._buffers[name] = before.to(after.device)
        for name, spec in self.nvfp4.items():
            probe = torch.empty(0, dtype=spec.dtype, device=fp32[f"{name}_global_scale"].device)  # type: ignore[union-attr]
            self.nvfp4 = {**self.nvfp4, name: replace(spec, dtype=fn(probe).dtype)}
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigning a dense tensor to a packed parameter encodes it; what was decoded before brings its codes back."""
        spec = self.__dict__.get("nvfp4", {}).get(name)
        if spec is None:
            super().__setattr__(name, value)
            for parameter, new in value.items() if name == "nvfp4" else ():
                setattr(self, f"{parameter}_{_HOW}", _how(new))
            return
        if not isinstance(value, Tensor) or tuple(value.shape) != spec.shape:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PlanError(f"{type(self).__name__}.{name}: found {found}, expected a tensor of shape {spec.shape}")
        before = tuple(self.get_buffer(f"{name}_{part}") for part in PARTS)
        decoded = _DECODED.get(id(before[0]))
        if decoded is not None and decoded not in _SOURCE:  # it may come back, as what `functional_call` took out does
            _SOURCE[decoded] = tuple(t.clone() for t in before), spec
        parts, new = _decoded_from(value, spec) or _encoded(value, spec, name)
        with torch.no_grad():
            for buffer, part in zip(before, parts, strict=True):
                buffer.copy_(part)
        self.nvfp4 = {**self.nvfp4, name: new}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module; a packed parameter keeps its name.

        Raises:
            PlanError: the name is that of a packed parameter.
        """
        if name in self.__dict__.get("nvfp4", {}):
            raise PlanError(
                f"{type(self).__name__}.{name}: found a parameter to register in place of the packed one; assign to it "
                "to encode new values, shard it by fp4fx.parallel.RowwiseParallel or ColwiseParallel"
            )
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept a dense value in place of the packed one: a checkpoint of the original model loads and is encoded.

        Raises:
            CheckpointError: scales that kernels do not read as the definition does; nothing of this module has changed.
        """
        for scale in (f"{prefix}{name}_scale" for name in self.nvfp4):
            odd = odd_scale(state_dict.get(scale))
            if odd is not None:
                todo = "it is damaged or not fp4fx's: load what fp4fx wrote, or the dense values, which are encoded"
                raise CheckpointError(f"{scale}: found {odd}, expected E4M3 bytes from 0x00 to 0x7e; {todo}")
        for name, spec in self.nvfp4.items():
            dense = state_dict.get(prefix + name)
            if isinstance(dense, Tensor) and tuple(dense.shape) == spec.shape:
                q, new = encode(state_dict.pop(prefix + name), spec, prefix + name)
                state_dict.update({f"{prefix}{name}_{part}": getattr(q, part) for part in PARTS})
                self.nvfp4 = {**self.nvfp4, name: new}
            elif f"{prefix}{name}_packed" in state_dict:  # of a dense tensor that was not seen here
                self.nvfp4 = {**self.nvfp4, name: replace(spec, sqnr=None)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by recipe, since a generated class has no importable name."""
        recipe = super().__reduce_ex__(max(int(protocol), 2))
        assert isinstance(recipe, tuple)
        return (_blank, (type(self).__bases__[1], tuple(self.nvfp4), self.nvfp4_activations is not None), *recipe[2:])

    def extra_repr(self) -> str:
        """The class's own description and what is packed."""
        packed = [f"{name}=NVFP4{list(spec.shape)}" for name, spec in self.nvfp4.items()]
        rule = f" {self.nvfp4_activation_rule}" * (self.nvfp4_activation_rule != "max")
        quantized = [f"activations={self.nvfp4_activations}{rule}"] if self.nvfp4_activations else []
        return ", ".join(filter(None, [super().extra_repr(), *packed, *quantized]))


def _computed(name: str) -> property:
    how = f"{name}_{_HOW}"

    def get(self: Packed) -> Tensor:
        if symbolically_traced():
            base = type(self).__bases__[1].__name__
            raise TraceError(
                f"{type(self).__name__}.{name}: found a symbolic trace, in which a decoded weight would become a dense "
                f"constant; expected a tracer whose is_leaf_module keeps {base} whole; or use torch.export.export"
            )
        parts = tuple(self._buffers[f"{name}_{part}"] for part in PARTS)
        decoded = _decode(parts, getattr(self, how))
        if not torch.compiler.is_compiling():
            _DECODED[id(parts[0])] = decoded
        return decoded

    return property(
        get, doc=f"The dense {name}, decoded anew at every access: writing into it changes nothing, assign."
    )


def _how(spec: PackedSpec) -> How:
    """What the getter of a parameter reads, in place of its spec."""
    return tuple(spec.shape), str(spec.dtype).removeprefix("torch."), spec.order, spec.groups, spec.compute


def _decode(parts: tuple[Any, ...], how: How) -> Tensor:
    shape, dtype, order, groups, compute = how
    decoded: Tensor = torch.ops.fp4fx.dequantize.default(*parts, shape, getattr(torch, dtype), order, groups, compute)
    return decoded


def _decoded_from(value: Tensor, spec: PackedSpec) -> tuple[tuple[Tensor, ...], PackedSpec] | None:
    """The parts that `value` was decoded from before an assignment, so that it is not rounded twice.

    None if it was not decoded here, or is no longer what they decode to.
    """
    source = _SOURCE.get(value)
    if source is None or value.is_meta:
        return None
    parts, of = source
    alike = (of.order, of.groups, of.block) == (spec.order, spec.groups, spec.block)
    return (parts, replace(spec, sqnr=of.sqnr)) if alike and torch.equal(_decode(parts, _how(of)), value) else None


def _encoded(value: Tensor, spec: PackedSpec, name: str) -> tuple[tuple[Tensor, ...], PackedSpec]:
    q, spec = encode(value, spec, name)
    return (q.packed, q.scale, q.global_scale), spec


_RANK = {
    nn.Linear: 0,
    nn.Conv1d: 1,
    nn.ConvTranspose1d: 1,
    nn.Conv2d: 2,
    nn.ConvTranspose2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose3d: 3,
}


STOCK = tuple(_RANK)
"""The classes whose input can be quantized on the way in."""


def quantized_input(module: Packed, x: Tensor) -> Tensor:
    """What a W4A4 layer computes with for its input x: the same, quantized and decoded."""
    rank = next(rank for cls, rank in _RANK.items() if isinstance(module, cls))
    unbatched = bool(rank) and x.dim() == rank + 1  # a convolution without a batch axis
    how = module._buffers.get(INPUT_SCALE), "channels" if rank else "rows", 1, module.nvfp4_activation_rule
    quantized: Tensor = torch.ops.fp4fx.fake_quantize.default(x.unsqueeze(0) if unbatched else x, *how)
    return quantized.squeeze(0) if unbatched else quantized


def _quantizing_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The base's forward on a quantized input; the plan allows it for the classes of `_RANK` only."""

    def forward(self: Packed, input: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: A002  (the base's name for it)
        return base.forward(self, quantized_input(self, input), *args, **kwargs)

    return forward


def class_for(base: type[nn.Module], names: tuple[str, ...], quantizes_input: bool) -> type[Packed]:
    """The subclass of `base` in which the named parameters are packed and, if asked, the input is quantized first.

    The same class for the same arguments, which pickles, copies and compiled graphs rely on.
    """
    return _class_for(base, names, quantizes_input)  # type: ignore[arg-type]  # a type hashes, whatever its instances do


@functools.cache
def _class_for(base: type[nn.Module], names: tuple[str, ...], quantizes_input: bool) -> type[Packed]:
    body: dict[str, Any] = {name: _computed(name) for name in names}
    if quantizes_input:
        body["forward"] = _quantizing_forward(base)
    body["__module__"] = base.__module__  # by which torch.fx tells the modules of torch.nn, which it keeps whole
    return type(f"NVFP4{base.__name__}", (Packed, base), body)


def _blank(base: type[nn.Module], names: tuple[str, ...], quantizes_input: bool) -> Packed:
    """An instance without state, for pickle and copy."""
    cls = class_for(base, names, quantizes_input)
    return cls.__new__(cls)


def encode(dense: Tensor, spec: PackedSpec, path: str) -> tuple[nvfp4.NVFP4, PackedSpec]:
    """Quantize a dense parameter as its spec says: the codes, and the spec with their SQNR. `path` is for errors."""
    dense = dense.detach()
    rule = spec.scale_rule
    if not dense.is_meta:
        nvfp4.check_finite(dense, path)
    elif spec.block == (1, 16):  # a rule is no matter of shapes, and searching takes its time there too
        rule = "max"
    q = encoding.quantize(dense, scale_rule=rule, block=spec.block, order=spec.order, groups=spec.groups)
    sqnr = None if dense.is_meta else nvfp4.sqnr(dense, nvfp4.dequantize(q, torch.float32))
    return q, replace(spec, sqnr=sqnr)


def odd_scale(scale: Any, least: int = 0) -> str | None:
    """The first of the scale bytes u8 [N, blocks] with a sign, a NaN, or below `least`, in words; None if all are good.

    Anything that is not a tensor with bytes of its own (on meta, fake, distributed) has nothing to say.
    """
    plain = type(scale) in (Tensor, nn.Parameter) and not scale.is_meta
    if not plain or scale.dtype != torch.uint8 or not scale.numel():
        return None
    low, high = scale.detach().aminmax()
    if int(low) >= least and int(high) < nvfp4.E4M3_NAN:
        return None
    first = ((scale < least) | (scale >= nvfp4.E4M3_NAN)).nonzero()[0].tolist()
    return f"byte {int(scale[tuple(first)]):#04x} at {first}"


def pack(
    module: nn.Module,
    stored: Mapping[str, tuple[nvfp4.NVFP4, PackedSpec]],
    activations: Activations = None,
    input_scale: Tensor | None = None,
    activation_rule: str = "max",
) -> None:
    """Turn `module` in place into its packed class; `input_scale` is the static scale of its activations, if any.

    Raises:
        PlanError: the module already has an attribute of a name that a buffer needs.
    """
    own = ("nvfp4", "nvfp4_activations", "nvfp4_activation_rule")
    needed = [*own, *(f"{name}_{part}" for name in stored for part in (*PARTS, _HOW))]
    for name in needed if input_scale is None else [*needed, INPUT_SCALE]:
        if hasattr(module, name):
            found = f"{type(module).__name__} already has an attribute {name!r}"
            raise PlanError(f"{found}, which packing {', '.join(stored)} needs; rename it or exclude this module")
    module.__class__ = class_for(type(module), tuple(stored), activations is not None)
    module.nvfp4 = {name: spec for name, (_, spec) in stored.items()}  # type: ignore[assignment]
    module.__dict__["nvfp4_activations"] = activations
    module.__dict__["nvfp4_activation_rule"] = activation_rule
    for name, (q, _) in stored.items():
        del module._parameters[name]
        for part in PARTS:
            module.register_buffer(f"{name}_{part}", getattr(q, part))
    if input_scale is not None:
        module.register_buffer(INPUT_SCALE, input_scale)


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that a quantized model was made by, or None."""
    plan: Plan | None = model.__dict__.get(_PLAN)
    return plan


def remember_plan(model: nn.Module, plan: Plan) -> None:
    """Let a quantized model carry its plan through copies and pickles."""
    model.__dict__[_PLAN] = plan
