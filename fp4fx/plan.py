"""Sites + Policy -> Plan: what becomes of every site, and why. A plan is data: it prints and serialises."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fp4fx import nvfp4
from fp4fx.effective import settled
from fp4fx.errors import LayoutError, PlanError, PolicyError
from fp4fx.fields import read
from fp4fx.patterns import first_match
from fp4fx.policy import Activations, Block, Compute, Policy, ScaleRule, WeightRule
from fp4fx.rules import RULES, Context, counts, no_values, weight_only
from fp4fx.site import Note, Site
from fp4fx.trace import Trace
from fp4fx.trace import trace as trace_model

FORMAT, VERSION = "fp4fx.plan", 1
COMPUTED = "computed once into"
"""How the reason of a parameter begins that another weight is computed from, which stands for it in the plan."""
FOLDED = "skip_norms"
"""What this rule keeps a table shows in one line for all."""


@dataclass(frozen=True)
class Spec:
    """How a site is quantized."""

    scale_rule: WeightRule
    block: Block
    activations: Activations
    weight_only_reason: str | None = None
    """Why the input is not quantized although the policy asks for it, or None."""
    compute: Compute = "bf16"
    activation_scale_rule: ScaleRule = "max"


@dataclass(frozen=True)
class Decision:
    """What becomes of one site."""

    site: Site
    spec: Spec | None
    """How it is quantized; None: kept as it is."""
    rule: str
    """The policy field that decided (or "refusal": the trace found that it cannot be quantized)."""
    reason: str

    @property
    def label(self) -> str:
        """W4A4, W4A16 or kept; "W4A16 in int8" where the precision of the computation is not the default."""
        if self.spec is None:
            return "kept"
        bits = "W4A4" if self.spec.activations else "W4A16"
        return bits if self.spec.compute == Spec.compute else f"{bits} in {self.spec.compute}"

    @property
    def nbytes(self) -> int:
        """Bytes of the site's parameter in NVFP4: per row ceil(K/16) blocks of 8 + 1 bytes, and the global scale."""
        site = self.site
        k = nvfp4.row_length(site.shape, site.order, site.groups)
        return site.numel // k * -(-k // nvfp4.BLOCK) * (nvfp4.BLOCK // 2 + 1) + 4


@dataclass(frozen=True)
class Totals:
    """Sums over all parameters of a model, each tensor counted once."""

    numel: int
    before: int
    """Bytes as the model is."""
    after: int
    """Bytes once the plan is applied."""


@dataclass(frozen=True)
class Plan:
    """The decisions for one model, in execution order."""

    decisions: tuple[Decision, ...]
    policy: Policy
    """The policy, with callable patterns replaced by the names they picked."""
    unreached: tuple[Note, ...] = ()
    """Parameters of rank 2 or more that the trace never saw used, with the reason."""
    opaque: tuple[Note, ...] = ()
    """Modules the tracer could not look into, with the reason."""
    totals: Totals | None = None
    """None for a plan made from a trace alone."""

    @property
    def quantized(self) -> tuple[Decision, ...]:
        """The decisions that quantize."""
        return tuple(d for d in self.decisions if d.spec is not None)

    @property
    def kept(self) -> tuple[Decision, ...]:
        """The decisions that keep."""
        return tuple(d for d in self.decisions if d.spec is None)

    def decision_for(self, parameter: str) -> Decision:
        """The decision for a parameter by any of its names; for one that is used several times, its first use."""
        for decision in self.decisions:
            if parameter in (decision.site.parameter, *decision.site.tied):
                return decision
        near = difflib.get_close_matches(parameter, [d.site.parameter for d in self.decisions], n=3)
        note = next((f"; {n.name}: {n.reason}" for n in self.unreached if n.name == parameter), "")
        raise PlanError(f"{parameter!r}: no site of the plan{note}; near names: {', '.join(near) or 'none'}")

    def __str__(self) -> str:
        """The table, what is not in it, and the sums."""
        rows = [
            (s.parameter, s.op, "{}x{}".format(*s.rows) if s.numel else "0", s.groups, s.kurtosis, d.label, d.reason)
            for d in self.decisions
            for s in [d.site]
            if d.rule != FOLDED
        ]
        table = tabulate(
            rows,
            ("parameter", "op", "N x K", "groups", "kurtosis", "decision", "reason"),
            floatfmt=".2f",
            missingval="-",
        )
        return "\n".join([table, "", *notes(self), *self._sums()])

    def _sums(self) -> Iterable[str]:
        unique = {d.site.parameter: d for d in self.quantized}.values()
        values, nbytes = sum(d.site.numel for d in unique), sum(d.nbytes for d in unique)
        reached = sum({d.site.parameter: d.site.numel for d in self.decisions}.values())
        total, of = (self.totals.numel, "all parameters") if self.totals else (reached, "the parameters reached")
        share = f"{values:,} of {total:,} = {values / max(total, 1):.1%} of {of}"
        yield f"{len(self.quantized)} of {len(self.decisions)} sites in NVFP4: {share}"
        if values:
            yield f"{nbytes * 8 / values:.3f} bits per quantized weight, scales included"
        if self.totals:
            before, after = self.totals.before, self.totals.after
            yield f"parameters {before:,} bytes -> {after:,} bytes ({after / max(before, 1):.3f} of it)"

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON-ready values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "policy": self.policy.to_dict(),
            "decisions": [
                {
                    "site": d.site.to_dict(),
                    "spec": d.spec and {**asdict(d.spec), "block": list(d.spec.block)},
                    "rule": d.rule,
                    "reason": d.reason,
                }
                for d in self.decisions
            ],
            "unreached": [asdict(n) for n in self.unreached],
            "opaque": [asdict(n) for n in self.opaque],
            "totals": self.totals and asdict(self.totals),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`; PlanError says what is wrong and where."""
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        if found != FORMAT:
            raise PlanError(f"plan: found format {found!r}, expected {FORMAT!r}; give what Plan.to_dict returned")
        if data.get("version") != VERSION:
            raise PlanError(f"plan: found version {data.get('version')!r}, expected {VERSION}; use the fp4fx of then")
        content = {name: value for name, value in data.items() if name not in ("format", "version")}
        where = "plan.policy"
        try:
            if "policy" in content:
                content["policy"] = Policy.from_dict(content["policy"])
            plan = read(cls, content, "plan")
            for index, decision in enumerate(plan.decisions):
                site, where = decision.site, f"plan.decisions[{index}].site"
                if math.prod(site.shape) != site.numel:
                    raise PlanError(f"{where}: shape {site.shape} does not hold {site.numel} values")
                if decision.spec is not None:
                    nvfp4.row_length(site.shape, site.order, site.groups)
        except (PolicyError, LayoutError) as error:
            raise PlanError(f"{where}: {error}") from error
        return plan


def notes(plan: Plan) -> tuple[str, ...]:
    """The lines under a table: the folded normalisations, what was not looked into, what was not reached."""
    norms = sum(d.rule == FOLDED for d in plan.decisions)
    return (
        *((f"{norms} normalisation{'s' * (norms > 1)} kept (skip_norms)",) if norms else ()),
        *(f"not looked into: {n.name or 'the model itself'}: {n.reason}" for n in plan.opaque),
        *(f"left alone: {n.name}: {n.reason}" for n in plan.unreached),
    )


def decide(
    trace: Trace,
    policy: Policy | None = None,
    sqnr: Callable[[Site, Policy], float] | None = None,
    *,
    fragment: bool = False,
) -> Plan:
    """The plan for a trace, from the trace alone.

    Args:
        trace: What was found in a model or a graph.
        policy: `Policy()` if None.
        sqnr: Gives the signal to quantization noise ratio (dB) of a site's weight under its policy, for `min_sqnr`.
        fragment: The trace is one graph of a model in several; a pattern that matches nothing here may match elsewhere,
            and the reasons say that sites are counted within the graph.
    """
    policy = Policy() if policy is None else policy
    if not isinstance(policy, Policy):
        raise PolicyError(
            f"policy: found {type(policy).__name__}, expected a Policy; for a mapping use Policy.from_dict"
        )
    if not fragment:
        policy.require_matches(trace.sites, [note.name for note in (*trace.unreached, *trace.opaque)])
    policy = policy.resolved(trace.sites)
    counted = [site.index for site in trace.sites if counts(site)]
    context = Context({index: place for place, index in enumerate(counted, 1)}, len(counted), sqnr, fragment)
    decisions = [_decide_use(site, policy, context) for site in trace.sites]
    uses: dict[str, list[Decision]] = {}
    for decision in decisions:
        uses.setdefault(decision.site.parameter, []).append(decision)
    together = tuple(_together(decision, uses[decision.site.parameter]) for decision in decisions)
    return Plan(together, policy, trace.unreached, trace.opaque)


def _decide_use(site: Site, policy: Policy, context: Context) -> Decision:
    """The decision for one use, as if the parameter had no other."""
    pattern = first_match((p for p, _ in policy.overrides), site)
    own = policy if pattern is None else policy.overridden(pattern)
    by = "" if pattern is None else f" (override {pattern!r})"
    for name, rule in RULES:
        reason = rule(site, own, context)
        if reason is not None:
            return Decision(site, None, name, reason + by)
    why = None if own.activations is None else weight_only(site)
    activations = None if why else own.activations
    spec = Spec(own.weight_rule, own.block, activations, why, own.compute, own.activation_scale_rule)
    return Decision(site, spec, "weights", (f"weight only: {why}" if why else "no rule keeps it") + by)


def _together(decision: Decision, uses: list[Decision]) -> Decision:
    """The decision for one use in view of all uses of its parameter: there is one tensor, packed or not."""
    if decision.spec is None or len(uses) == 1:
        return decision
    for other in uses:
        site = other.site
        here = f"the same tensor as in {site.op} of {site.called_in or 'the model itself'}"
        if other.spec is None:
            return replace(decision, spec=None, rule=other.rule, reason=f"{here}, which is kept: {other.reason}")
        if (site.order, site.groups) != (decision.site.order, decision.site.groups):
            return replace(decision, spec=None, rule="refusal", reason=f"{here}, whose blocks run along another axis")
        if _stored(other.spec) != _stored(decision.spec):
            raise PolicyError(
                f"{site.parameter}: overrides give its uses different formats, found {decision.spec} and {other.spec}; "
                "expected one scale_rule, block and compute per tensor: name the parameter instead of the op"
            )
    return decision


def _stored(spec: Spec) -> tuple[Any, ...]:
    """What is a property of the tensor, whatever reads it."""
    return spec.scale_rule, spec.block, spec.compute


def _with_computed(trace: Trace, computed: Mapping[str, Sequence[str]]) -> Trace:
    """The trace of a model with settled weights, in the words of the original: what they are computed from is noted."""
    notes = {name: Note(name, f"{COMPUTED} {weight}") for weight, names in computed.items() for name in names}
    sites = tuple(replace(site, settled=site.parameter in computed) for site in trace.sites)
    return replace(
        trace, sites=sites, unreached=(*(n for n in trace.unreached if n.name not in notes), *notes.values())
    )


def weight_sqnr(weight: Tensor, site: Site, scale_rule: WeightRule, block: Block) -> float:
    """Weight of the site, any float dtype -> signal to quantization noise ratio in dB of its NVFP4 form."""
    nvfp4.check_finite(weight, site.parameter)
    with torch.no_grad():
        q = nvfp4.quantize(weight, scale_rule=scale_rule, block=block, order=site.order, groups=site.groups)
        return nvfp4.sqnr(weight, nvfp4.dequantize(q, torch.float32))


def plan(
    model: nn.Module,
    policy: Policy | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Plan:
    """Trace the model and decide for every site; the model is only read.

    Args:
        model: Any module, on any device.
        policy: `Policy()` if None.
        example_inputs: Positional arguments of one forward, or the only one; they make the trace exact.
        example_kwargs: Keyword arguments of the same forward.

    Raises:
        PolicyError: A pattern of the policy matches nothing.
        PlanError: A rule needs the values of a weight that has none.
        TraceError: The model cannot be traced.
    """
    model, computed = settled(model) if isinstance(model, nn.Module) else (model, {})
    found = _with_computed(trace_model(model, example_inputs, example_kwargs), computed)
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def sqnr(site: Site, own: Policy) -> float:
        if parameters[site.parameter].is_meta:
            raise no_values(site, "min_sqnr", own.min_sqnr or 0.0)
        return weight_sqnr(parameters[site.parameter], site, own.weight_rule, own.block)

    decided = decide(found, policy, sqnr)
    before = {id(p): p.nbytes for p in parameters.values()}
    after = dict(before)
    for decision in decided.quantized:
        after[id(parameters[decision.site.parameter])] = decision.nbytes
    numel = sum({id(p): p.numel() for p in parameters.values()}.values())
    return replace(decided, totals=Totals(numel, sum(before.values()), sum(after.values())))
