"""Plan -> a model with packed weights. The original is left as it was and shares every tensor that is not quantized."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from fp4fx import nvfp4
from fp4fx.calibration.scales import Inputs, static_scale
from fp4fx.effective import settle, sharing_copy
from fp4fx.errors import FallbackError, PlanError
from fp4fx.packed import STOCK, Activations, Packed, PackedSpec, encode, pack, plan_of, remember_plan
from fp4fx.plan import COMPUTED, Decision, Plan, Spec, plan
from fp4fx.policy import Policy


def quantize(
    model: nn.Module,
    policy: Policy | None = None,
    example_inputs: Any = None,
    example_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """A new model in which the weights that the policy chooses are packed NVFP4; the original is untouched.

    What is not quantized is shared: parameters and buffers of the new model are on the original's memory, so that
    training the one (or moving BatchNorm's statistics) moves the other; deepcopy the result where that is not wanted.

    Args:
        model: any module; stays as it was and goes on working.
        policy: what to quantize and how; `Policy()` if None.
        example_inputs: a tensor or tuple of tensors for one forward; makes the trace exact (torch.export) and is
            required by `activations="nvfp4-static"`, whose scales are measured on it.
        example_kwargs: keyword arguments of that forward.

    Raises:
        fp4fx.FallbackError: with `on_fallback="raise"`, something cannot be had as the policy asks for it.
        fp4fx.Error: the policy does not fit the model, a weight holds NaN or Inf, or the model cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"quantize: found {type(model).__name__}, expected a torch.nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, Packed) or plan_of(module) is not None:
            where = f"{name} is" if name else "the model is"
            raise PlanError(
                f"quantize: {where} already quantized, expected dense weights; quantize the whole model at once"
            )
    chosen = plan(model, policy, example_inputs, example_kwargs)
    if chosen.policy.on_fallback == "raise":
        _raise_on_fallback(chosen)
    return apply(model, chosen, input_scales=_static_scales(model, chosen, example_inputs, example_kwargs))


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    input_scales: dict[str, Tensor] | None = None,
    skeleton: bool = False,
    encoded: dict[str, tuple[nvfp4.NVFP4, PackedSpec]] | None = None,
) -> nn.Module:
    """A copy of the model with the plan's parameters packed, sharing every other tensor.

    Args:
        model: the model that the plan was made for, or one of the same structure.
        plan: what to pack.
        input_scales: static activation scale (fp32 []) by module name.
        skeleton: leave the packed buffers on the meta device, to be filled from a checkpoint.
        encoded: weights that other plans with the same specs encoded, by parameter; what this one encodes is added.

    Raises:
        PlanError: a parameter of the plan is missing or of another shape.
    """
    by_module: dict[str, dict[str, Decision]] = defaultdict(dict)
    for decision in plan.quantized:
        for name in (decision.site.parameter, *decision.site.tied):
            path, _, attribute = name.rpartition(".")
            by_module[path].setdefault(attribute, decision)
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    result = sharing_copy(model)
    for path, decisions in by_module.items():
        for attribute, decision in decisions.items():
            if decision.site.settled and path in modules:
                settle(result.get_submodule(path), attribute)
    _check(result, plan, by_module)
    encoded = {} if encoded is None else encoded  # a tied tensor is quantized once
    for path, decisions in by_module.items():
        module = result.get_submodule(path)
        if isinstance(module, Packed):  # the same module under another name
            continue
        stored = {}
        for attribute, decision in decisions.items():
            dense, name = module._parameters[attribute], decision.site.parameter
            assert dense is not None and decision.spec is not None
            if name not in encoded:
                spec = PackedSpec(
                    shape=tuple(dense.shape),
                    order=decision.site.order,
                    groups=decision.site.groups,
                    dtype=dense.dtype,
                    scale_rule=decision.spec.scale_rule,
                    block=decision.spec.block,
                    compute=decision.spec.compute,
                )
                source = dense.to("meta") if skeleton else dense
                encoded[name] = encode(source, spec, name)
            stored[attribute] = encoded[name]
        own = _input_spec(path, plan)
        activations, rule = (None, "max") if own is None else (own.activations, own.activation_scale_rule)
        pack(module, stored, activations, _input_scale(path, activations, input_scales, skeleton), rule)
    _close_fast_paths(result)
    remember_plan(result, plan)
    return result


def _close_fast_paths(model: nn.Module) -> None:
    """Keep transformer layers with packed children from PyTorch's fused op, which skips the children's forward."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor &= not any(isinstance(child, Packed) for child in module.modules())
        elif isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, Packed) for m in module.modules()):
            module.activation_relu_or_gelu = 0  # read by nothing but the conditions of the fused op


def _input_spec(path: str, plan: Plan) -> Spec | None:
    """What the module at `path` does to its input, if anything: of a tied tensor's uses, the one in it counts."""
    uses = (d.spec for d in plan.quantized if d.site.own_input and d.site.called_in == path)
    spec = next(uses, None)
    return spec if spec is not None and spec.activations is not None else None


def _input_scale(
    path: str, activations: Activations, scales: dict[str, Tensor] | None, skeleton: bool
) -> Tensor | None:
    if activations != "nvfp4-static":
        return None
    if skeleton:
        return torch.empty((), device="meta")
    if scales is None or path not in scales:
        raise PlanError(
            f"{path}: activations='nvfp4-static' needs a measured scale; pass example_inputs to fp4fx.quantize"
        )
    return scales[path]


def _check(model: nn.Module, plan: Plan, by_module: dict[str, dict[str, Decision]]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, decisions in by_module.items():
        for attribute, decision in decisions.items():
            module = modules.get(path)
            parameter = None if module is None else module._parameters.get(attribute)
            name = f"{path}.{attribute}" if path else attribute
            if parameter is None:
                raise PlanError(
                    f"{name}: the plan packs it, but this model has no such parameter; make a plan for this model"
                )
            if tuple(parameter.shape) != decision.site.shape:
                raise PlanError(f"{name}: found shape {tuple(parameter.shape)}, the plan expects {decision.site.shape}")
    for path in by_module:
        if _input_spec(path, plan) is not None and not isinstance(modules.get(path), STOCK):
            raise PlanError(
                f"{path}: the plan quantizes its input, which a {type(modules.get(path)).__name__} does not allow, "
                "expected a Linear or convolution; make a plan for this model"
            )


def _raise_on_fallback(plan: Plan) -> None:
    """Refuse a plan in which something could not be had as the policy asks for it."""
    refused = [f"{d.site.parameter}: {d.reason}" for d in plan.decisions if d.rule == "refusal"]
    weight_only = [
        f"{d.site.parameter}: weight only: {d.spec.weight_only_reason}"
        for d in plan.quantized
        if d.spec is not None and d.spec.weight_only_reason
    ]
    left = (*(n for n in plan.unreached if not n.reason.startswith(COMPUTED)), *plan.opaque)
    notes = [f"{n.name}: {n.reason}" for n in left]
    if refused or weight_only or notes:
        raise FallbackError(
            "on_fallback='raise' and the plan falls back: " + "; ".join([*refused, *weight_only, *notes])
        )


@torch.no_grad()
def _static_scales(model: nn.Module, plan: Plan, inputs: Any, kwargs: dict[str, Any] | None) -> dict[str, Tensor]:
    """Activation scales measured on one forward of the original model, as `fp4fx.calibrate` does it on many."""
    names = {d.site.called_in for d in plan.quantized if d.spec is not None and d.spec.activations == "nvfp4-static"}
    if not names:
        return {}
    if inputs is None and kwargs is None:
        raise PlanError(
            "activations='nvfp4-static': found no example_inputs, expected inputs of one forward to measure on"
        )
    if model.training:
        raise PlanError(
            "activations='nvfp4-static': found a model in training mode, expected evaluation; call model.eval()"
        )
    seen = {name: Inputs() for name in sorted(names)}
    hooks = [model.get_submodule(name).register_forward_pre_hook(s, with_kwargs=True) for name, s in seen.items()]
    try:
        model(*(inputs if isinstance(inputs, tuple | list) else () if inputs is None else (inputs,)), **(kwargs or {}))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: static_scale(inputs.amax) for name, inputs in seen.items() if inputs.blocks}
