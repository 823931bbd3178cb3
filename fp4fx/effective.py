"""Weights that modules compute from their parameters on every call, computed once.

In evaluation the weight of a parametrization (weight norm, spectral norm, any other), of the older hooks of
`torch.nn.utils`, and of timm's weight standardisation is the same on every call. `settle` makes it a plain parameter of
the module and takes the computation away, so that it can be packed and read by a fused op.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_TIMM = "timm.layers.std_conv"
_STANDARDISED = frozenset({"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"})


def settled(model: nn.Module) -> tuple[nn.Module, dict[str, tuple[str, ...]]]:
    """The model, or a copy on the same tensors with its computed weights settled; and their names.

    With each name come those of the other parameters of rank 2 or more that it is computed from.

    A weight stays as it is in training, if it changes from call to call, if a parameter that it is made from has
    another name as well, or if its module computes several.
    """
    found = [(path, name) for path, module in model.named_modules() if (name := _computed(module)) is not None]
    if not found:
        return model, {}
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    result = sharing_copy(model)
    names: dict[str, tuple[str, ...]] = {}
    for path, name in found:
        module, prefix = model.get_submodule(path), f"{path}." if path else ""
        sources = _sources(module, name)
        in_training = any(m.training for m in module.modules())
        if in_training or any(uses[id(p)] > 1 for p in sources.values()) or not _is_constant(module, name):
            continue
        settle(result.get_submodule(path), name)
        names[prefix + name] = tuple(prefix + n for n, p in sources.items() if n != name and p.dim() > 1)
    return result, names


def settle(module: nn.Module, name: str) -> None:
    """Make the computed weight of this name a plain parameter, in place; nothing happens if it is one already.

    Other copies of the module keep their computation. What a standardised convolution gains by stays its parameter,
    unread, so that checkpoints of the original fit.
    """
    if _computed(module) != name:
        return
    flags = {m: m.training for m in module.modules()}
    for m in flags:
        m.training = False  # spectral norm would go on estimating
    weight, trained = _value(module, name), any(p.requires_grad for p in _sources(module, name).values())
    for m, training in flags.items():
        m.training = training
    if is_parametrized(module):
        del module._modules["parametrizations"]
        for key, loads in list(module._load_state_dict_pre_hooks.items()):  # weight norm's, which cannot be pickled
            if getattr(getattr(loads, "hook", loads), "__qualname__", "").startswith("weight_norm."):
                del module._load_state_dict_pre_hooks[key]
        module.__class__ = type(module).__bases__[0]
    elif is_standardised(type(module)):
        module.__class__ = plain(type(module))
    else:
        hook = _hook(module)
        (remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm)(module, name)
    module._parameters.pop(name, None)
    module.register_parameter(name, nn.Parameter(weight, trained))


def plain(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a convolution of timm's with weight standardisation, without it: the weight is used as it is."""
    return _plain(base)  # type: ignore[arg-type]  # a type hashes, whatever its instances do


@functools.cache
def _plain(base: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if getattr(self, "same_pad", False):
            x = sys.modules[_TIMM].pad_same(x, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    body = {"forward": forward, "fp4fx_computes": _standardised, "fp4fx_settles": base, "__module__": __name__}
    return type(base.__name__, (base,), body)


def _standardised(module: Any, weight: Tensor, gain: Tensor | None) -> Tensor:
    """The weight [N, C/g, *k] that timm's convolution computes from its parameters."""
    factor = None if gain is None else (gain * module.scale).view(-1)
    rows = weight.reshape(1, weight.shape[0], -1)
    normed = F.batch_norm(rows, None, None, weight=factor, training=True, momentum=0.0, eps=module.eps)
    return normed.reshape(weight.shape)


def is_standardised(cls: type | None) -> bool:
    """True for timm's own convolutions with weight standardisation."""
    return cls is not None and cls.__module__ == _TIMM and cls.__name__ in _STANDARDISED


def _hook(module: nn.Module) -> Any:
    """The one hook of `torch.nn.utils` that computes a weight of this module; None if there is none or more."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm))]
    return hooks[0] if len(hooks) == 1 else None


def _computed(module: nn.Module) -> str | None:
    """The name of the one matrix that a module computes, or None."""
    if is_parametrized(module):
        names: list[str] = list(module.parametrizations)  # type: ignore[arg-type]
        originals = list(module.parametrizations[names[0]].parameters())  # type: ignore[index, union-attr]
        is_matrix = any(p.dim() > 1 for p in originals)
        return names[0] if len(names) == 1 and is_matrix and _hook(module) is None else None
    hook = _hook(module)
    return hook.name if hook is not None else "weight" if is_standardised(type(module)) else None


def _sources(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters, by their names in the module, that its computed weight is made from."""
    if is_parametrized(module):
        return {n: p for n, p in module.named_parameters() if n.startswith(f"parametrizations.{name}.")}
    names = (name, "gain") if is_standardised(type(module)) else (f"{name}_g", f"{name}_v", f"{name}_orig")
    return {n: p for n in names if (p := module._parameters.get(n)) is not None}


@torch.no_grad()
def _value(module: nn.Module, name: str) -> Tensor:
    """What a module computes as its weight in evaluation."""
    if is_parametrized(module):
        value: Tensor = getattr(module, name)
    elif is_standardised(type(module)):
        value = _standardised(module, module._parameters[name], module._parameters.get("gain"))  # type: ignore[arg-type]
    else:
        hook = _hook(module)
        value = hook.compute_weight(module, **({"do_power_iteration": False} if isinstance(hook, SpectralNorm) else {}))
    return value.detach().clone()


@torch.no_grad()
def _is_constant(module: nn.Module, name: str) -> bool:
    """Whether two computations give the same, and what is not settled by a removal runs as it would."""
    weight = _value(module, name)
    if weight.is_meta:
        return True
    if not is_standardised(type(module)):
        return weight.dim() > 1 and torch.equal(weight, _value(module, name))
    conv: Any = module
    size = [max(4, d * (k - 1) + 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    probe = torch.linspace(-1, 1, conv.in_channels * size[0] * size[1], dtype=weight.dtype, device=weight.device)
    other = sharing_copy(module)
    settle(other, name)
    x = probe.view(1, conv.in_channels, *size)
    return torch.allclose(type(conv).forward(conv, x), type(other).forward(other, x), rtol=1e-3, atol=1e-3)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the modules with every tensor shared: aliases, bound methods and hooks keep their meaning."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held: Iterable[Any] = (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values())
        memo.update({id(value): value for value in held if isinstance(value, Tensor)})
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:  # an object of its own on the same memory: `.half()` rebinds its data
            memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    return copy.deepcopy(model, memo)
