"""Weights that modules compute from their parameters on every call, computed once.

In evaluation the weight of a parametrization (weight norm, spectral norm, any other) and of the older hooks of
`torch.nn.utils` is the same on every call. `settle` makes it a plain parameter of the module and takes the computation
away, so that it can be packed and read by a fused op.

Weight standardisation (timm's StdConv2d, ScaledStdConv2d) is left alone: rounded after it, a weight has no zero mean
any more, which networks without norms do not survive; rounded before it, the mean is zero again.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


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

    Other copies of the module keep their computation.
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
    else:
        hook = _hook(module)
        (remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm)(module, name)
    module._parameters.pop(name, None)
    module.register_parameter(name, nn.Parameter(weight, trained))


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
    return None if hook is None else str(hook.name)


def _sources(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters, by their names in the module, that its computed weight is made from."""
    if is_parametrized(module):
        return {n: p for n, p in module.named_parameters() if n.startswith(f"parametrizations.{name}.")}
    names = (f"{name}_g", f"{name}_v", f"{name}_orig")
    return {n: p for n in names if (p := module._parameters.get(n)) is not None}


@torch.no_grad()
def _value(module: nn.Module, name: str) -> Tensor:
    """What a module computes as its weight in evaluation."""
    if is_parametrized(module):
        value: Tensor = getattr(module, name)
    else:
        hook = _hook(module)
        value = hook.compute_weight(module, **({"do_power_iteration": False} if isinstance(hook, SpectralNorm) else {}))
    return value.detach().clone()


@torch.no_grad()
def _is_constant(module: nn.Module, name: str) -> bool:
    """Whether two computations give the same matrix."""
    weight = _value(module, name)
    return weight.is_meta or (weight.dim() > 1 and torch.equal(weight, _value(module, name)))


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
