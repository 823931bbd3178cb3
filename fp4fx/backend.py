"""The torch.compile backend "fp4fx": passes over the captured graph, then Inductor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fp4fx import capture
from fp4fx.errors import BackendError, FallbackError
from fp4fx.folding import with_parts
from fp4fx.lowering import ATTRIBUTE, DECISION, NOTE, Lowering
from fp4fx.passes import AS_CAPTURED, PASSES
from fp4fx.pipeline import Context, run
from fp4fx.policy import Policy

log = logging.getLogger(__name__)


def fp4fx(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> capture.CompiledGraph:
    """Compile a captured graph: `torch.compile(model, backend="fp4fx", mode=..., options={...})`.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: as for Inductor ("reduce-overhead", "max-autotune", ...).
        options: `policy` (a Policy, for a model that was never quantized), `on_fallback` ("report" or "raise"), and any
            option of Inductor's configuration.
        name: the name given to torch.compile, for logs.

    Raises:
        BackendError: a mode or an option is unknown, or a policy does not fit the graph.
        FallbackError: with on_fallback="raise", an op could not be fused or the first choice of kernel refused it.
    """
    policy, on_fallback, patches = _read_options(options or {}, mode)
    capture.never_fold(torch.ops.fp4fx.dequantize.default)
    start = perf_counter()
    with capture.configured(patches):
        gm, ctx, counts = rewritten(gm, example_inputs, policy)
    took = perf_counter() - start
    if ctx.freezing:
        patches = {**capture.UNCACHED, **patches}
    done = ", ".join(f"{k} {v}" for k, v in counts.items() if v) or "nothing to do"
    log.info("%s: %s; the passes took %.2f s", name or "graph", done, took)
    _tell(ctx)
    if on_fallback == "raise":
        _raise_on_fallback(ctx)
    stand_ins = [capture.backend_fake(part) for f in ctx.folded for part in f.parts]
    leaves = {leaf.position for f in ctx.folded for leaf in f.leaves}
    read = capture.drop_unread(gm, leaves, len(example_inputs))
    compiled = capture.lower(gm, [*(example_inputs[i] for i in read), *stand_ins], patches)
    return with_parts(compiled, ctx.folded, read)


def rewritten(
    gm: GraphModule, example_inputs: list[Any], policy: Policy | None
) -> tuple[GraphModule, Context, dict[str, int]]:
    """A captured graph after the passes, what they found out, and how often each rewrote something; `gm` is only read.

    Raises:
        BackendError: there is a policy for a graph that the passes leave as it was captured.
    """
    gm = capture.own_copy(gm)
    ctx = Context(capture.real_tensors(gm, example_inputs), policy, freezing=capture.freezing())
    ctx.unfused = _unfused(gm)
    if ctx.unfused and policy is not None:
        raise BackendError(
            f"options['policy']: found a graph in which {ctx.unfused}, expected plain parameters and calls; use "
            "fp4fx.quantize first"
        )
    return gm, ctx, run(gm, ctx, AS_CAPTURED if ctx.unfused else PASSES)


def _unfused(gm: GraphModule) -> str:
    """Why the passes leave the ops of a graph as they were captured, or nothing."""
    if any(map(capture.is_distributed, gm.graph.nodes)):
        return "operands are distributed: every rank decodes what it holds"
    if any("_functorch" in str(getattr(node.target, "__module__", "")) for node in gm.graph.nodes):
        return "a transform of torch.func is at work"
    return ""


def _read_options(options: Mapping[str, Any], mode: str | None) -> tuple[Policy | None, str, dict[str, Any]]:
    modes = capture.inductor_modes()
    if mode is not None and mode not in modes:
        raise BackendError(f"mode: found {mode!r}, expected one of {', '.join(modes)}")
    patches = dict(modes[mode]) if mode else {}
    policy, on_fallback = options.get("policy"), options.get("on_fallback")
    if policy is not None and not isinstance(policy, Policy):
        raise BackendError(f"options['policy']: found {type(policy).__name__}, expected fp4fx.Policy")
    if policy is not None and policy.activations == "nvfp4-static":
        raise BackendError(
            "options['policy']: found activations='nvfp4-static', whose scales have to be measured first; use "
            "fp4fx.quantize with example_inputs, or activations='nvfp4'"
        )
    if on_fallback not in (None, "report", "raise"):
        raise BackendError(f"options['on_fallback']: found {on_fallback!r}, expected 'report' or 'raise'")
    for key, value in options.items():
        if key in ("policy", "on_fallback"):
            continue
        name = key.replace("-", "_")
        if not capture.is_inductor_option(name):
            raise BackendError(
                f"options[{key!r}]: expected 'policy', 'on_fallback' or an option of torch._inductor.config"
            )
        patches[name] = value
    return policy, on_fallback or (policy.on_fallback if policy else "report"), patches


def _tell(ctx: Context) -> None:
    """Leave on every stored tensor how it is used, for `fp4fx.report`."""
    notes: dict[int, tuple[Tensor, list[Lowering]]] = {}
    for stored, lowering in ctx.lowerings:
        if stored is not None:
            notes.setdefault(id(stored), (stored, []))[1].append(lowering)
    for stored, lowerings in notes.values():
        setattr(stored, ATTRIBUTE, tuple(lowerings))
    for parameter, decision in ctx.decisions:
        setattr(parameter, DECISION, decision)
    for parameter, reason in ctx.notes:
        setattr(parameter, NOTE, reason)


def _raise_on_fallback(ctx: Context) -> None:
    refused = [f"fp4fx::{low.op}: {reason}" for _, low in ctx.lowerings for reason in low.refusals]
    weight_only = [
        f"{d.site.parameter}: weight only: {d.spec.weight_only_reason}"
        for _, d in ctx.decisions
        if d.spec is not None and d.spec.weight_only_reason
    ]
    kept = [f"{d.site.parameter}: {d.reason}" for _, d in ctx.decisions if d.rule == "refusal"]
    missed = [f"a parameter of shape {tuple(p.shape)}: {reason}" for p, reason in ctx.notes]
    if refused or weight_only or kept or missed:
        reasons = "; ".join([*kept, *missed, *weight_only, *refused])
        raise FallbackError(f"on_fallback='raise' and this graph falls back: {reasons}")
