"""Which sites to keep in high precision so that a model meets a budget at the least cost: an integer programme.

What NVFP4 costs is taken as a sum over groups of sites that are decided together. With data a group's part is the
error of the model's output with that group alone in NVFP4, or with a loss the group's Fisher score (as in NVIDIA
ModelOpt's auto_quantize); without data it is the noise over signal of its layers' outputs. The programme is solved
exactly; a budget in dB or in accuracy is searched for with measurements of the whole model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fp4fx.batches import Batch, checked, tensors
from fp4fx.effective import settled
from fp4fx.errors import BudgetError, CalibrationError, PolicyError
from fp4fx.groups import SLACK, Group, Solution, groups_of, solve
from fp4fx.nvfp4 import NVFP4
from fp4fx.packed import INPUT_SCALE, PackedSpec, plan_of
from fp4fx.plan import Plan
from fp4fx.policy import Policy
from fp4fx.quantize import apply, quantize
from fp4fx.sensitivity import Loss, decibels, measure

log = logging.getLogger(__name__)

STEPS = 10
"""Measurements of the whole model in a search."""
ROUNDS = 2
"""How often the groups are measured anew around what was chosen."""
LOUDEST = 60.0
"""dB of noise over signal from which on an output counts as lost."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen for a budget."""

    policy: Policy
    score: str
    """What the groups were judged by."""
    groups: tuple[Group, ...]
    kept: tuple[bool, ...]
    bits: float
    """Mean bits per parameter over all sites."""
    measured: float | None
    """Of the whole model: SQNR of its output in dB, or the drop of accuracy; None without data."""
    gap: float


def choose(
    model: nn.Module,
    *,
    bits: float | None = None,
    sqnr: float | None = None,
    accuracy_drop: float | None = None,
    batches: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    loss: Loss | None = None,
    policy: Policy | None = None,
) -> Choice:
    """What `Policy.for_budget` does, with the groups, their scores and the proof; see there."""
    target = _Target(bits, sqnr, accuracy_drop)
    target.check(batches, evaluate)
    base = replace(Policy() if policy is None else policy, skip_first=0, skip_last=0)
    data = _several(batches, model, loss)
    packed = quantize(model, base, *(data[0].example if data else (None, None)))
    whole = plan_of(packed)
    assert whole is not None
    if not whole.quantized:
        reasons = "; ".join(f"{d.site.parameter}: {d.reason}" for d in whole.kept[:3])
        raise BudgetError(f"{target}: the policy keeps every site whatever the budget; {reasons}")
    budget = _Budget(model, whole, packed, data)
    if data and loss is None:
        unit, groups = "output error", budget.alone()
    else:
        unit = "Fisher score" if loss is not None else "noise over signal"
        groups = budget.by_layer(packed, loss)
    if bits is not None:
        solution, measured = budget.within_bits(groups, target, refine=unit == "output error")
    elif sqnr is not None:
        solution, measured = budget.search(groups, target, budget.output_sqnr, lambda v: v >= sqnr)
    else:
        assert evaluate is not None and accuracy_drop is not None
        before = _accuracy(evaluate, model)
        solution, measured = budget.search(
            groups, target, lambda m: before - _accuracy(evaluate, m), lambda v: v <= accuracy_drop
        )
    found = budget.bits(groups, solution.kept)
    what = f"{target}: {found:.3f} bits" + ("" if measured is None else f", {measured:.4g} measured")
    log.info("%s, %d of %d groups kept, gap %.2g", what, sum(solution.kept), len(groups), solution.gap)
    return Choice(
        policy=_with_reasons(base, groups, solution, unit, what),
        score=unit,
        groups=groups,
        kept=solution.kept,
        bits=found,
        measured=measured,
        gap=solution.gap,
    )


@dataclass(frozen=True)
class _Target:
    bits: float | None
    sqnr: float | None
    accuracy_drop: float | None

    def __str__(self) -> str:
        name, value = next((n, v) for n, v in self.__dict__.items() if v is not None)
        return f"{name}={value:g}"

    def check(self, batches: object, evaluate: object) -> None:
        given = {name: value for name, value in self.__dict__.items() if value is not None}
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise PolicyError(f"Policy.for_budget: found {found}, expected one of bits, sqnr and accuracy_drop")
        for name, value in given.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (name == "bits" and value == 0):
                raise PolicyError(f"Policy.for_budget: found {name}={value!r}, expected a finite number, 0 or more")
        if self.sqnr is not None and batches is None:
            raise PolicyError("Policy.for_budget: sqnr is measured, found no batches; pass inputs of the model")
        if self.accuracy_drop is None and evaluate is not None:
            raise PolicyError(
                f"Policy.for_budget: found evaluate beside {self}, expected accuracy_drop, which reads it"
            )
        if self.accuracy_drop is not None and evaluate is None:
            raise PolicyError(
                "Policy.for_budget: accuracy_drop is measured, found no evaluate; pass evaluate(model) -> float, "
                "higher is better"
            )


class _Budget:
    """One model with everything in NVFP4 that may be, and the ways to measure parts of it."""

    def __init__(self, model: nn.Module, plan: Plan, packed: nn.Module, data: Sequence[Batch]) -> None:
        self.model, self.plan, self.data = model, plan, data
        self.encoded: dict[str, tuple[NVFP4, PackedSpec]] = {}
        self.scales = {
            path: module.get_buffer(INPUT_SCALE)
            for path, module in packed.named_modules()
            if INPUT_SCALE in module._buffers
        }
        sites = {d.site.parameter: d.site for d in plan.decisions}
        dense, _ = settled(model)
        sizes = {name: p.element_size() for name, p in dense.named_parameters()}
        self.numel = sum(site.numel for site in sites.values())
        self.groups = tuple(groups_of(plan.quantized, sizes))
        chosen = {name for group in self.groups for name in group.parameters}
        self.fixed = sum(site.numel * sizes[name] for name, site in sites.items() if name not in chosen)
        """Bytes of what the policy keeps in any case."""
        with torch.no_grad():
            self.outputs = [[t.clone() for t in tensors(batch.run(model))] for batch in data]
        self.signal = sum(_energy(x.float()) for xs in self.outputs for x in xs if x.is_floating_point())

    def bits(self, groups: Sequence[Group], kept: Sequence[bool]) -> float:
        """Mean bits per parameter over all sites."""
        nbytes = sum(g.dense if keep else g.packed for g, keep in zip(groups, kept, strict=True))
        return (self.fixed + nbytes) * 8 / self.numel

    def with_only(self, parameters: Iterable[str]) -> nn.Module:
        """The model with these parameters in NVFP4 and no others."""
        names = set(parameters)
        decisions = tuple(d for d in self.plan.decisions if d.site.parameter in names)
        part = replace(self.plan, decisions=decisions)
        return apply(self.model, part, input_scales=self.scales, encoded=self.encoded)

    def quantized(self, groups: Sequence[Group], kept: Sequence[bool]) -> nn.Module:
        """The model with every group in NVFP4 that is not kept."""
        return self.with_only(p for g, keep in zip(groups, kept, strict=True) if not keep for p in g.parameters)

    @torch.no_grad()
    def error(self, candidate: nn.Module) -> float:
        """Sum of squares of the change of the model's output, over the data."""
        noise = 0.0
        for batch, outputs in zip(self.data, self.outputs, strict=True):
            pairs = zip(tensors(batch.run(candidate)), outputs, strict=True)
            noise += sum(_energy(y.float() - x.float()) for y, x in pairs if x.is_floating_point())
            if not math.isfinite(noise):
                raise CalibrationError(
                    f"batch {batch.number}: found NaN or Inf in the model's output, expected finite values to compare; "
                    "leave this batch, or what is not finite, out"
                )
        return noise

    def output_sqnr(self, candidate: nn.Module) -> float:
        """Signal over noise of the model's output in dB."""
        return decibels(self.signal, self.error(candidate))

    def alone(self) -> tuple[Group, ...]:
        """The groups, each with the error of the model's output with it alone in NVFP4."""
        bar = tqdm(self.groups, desc="each group alone", unit="group", disable=None, leave=False)
        return tuple(replace(group, score=self.error(self.with_only(group.parameters))) for group in bar)

    def by_layer(self, packed: nn.Module, loss: Loss | None) -> tuple[Group, ...]:
        """The groups, each with the sum of its sites' Fisher scores, or without a loss of their noise over signal."""
        rows = measure(self.model, packed, self.plan, self.data or None, loss).rows
        scores: dict[str, float] = {}
        for row in rows:
            if row.output_sqnr is None:
                log.warning("%s: %s, so that its score is 0", row.parameter, row.inputs)
            noise = -math.inf if row.output_sqnr is None else -row.output_sqnr
            scores[row.parameter] = 10 ** (min(noise, LOUDEST) / 10) if row.fisher is None else row.fisher
        return tuple(replace(group, score=sum(scores[p] for p in group.parameters)) for group in self.groups)

    def within_bits(self, groups: Sequence[Group], target: _Target, *, refine: bool) -> tuple[Solution, float | None]:
        """The least score within so many bits, and the SQNR in dB of the model's output if it is refined.

        Errors of layers add up only about, and may even cancel: to refine, each group is measured once more as the one
        that is not as chosen, and the programme solved for these differences, as long as the model's own error falls.
        """
        assert target.bits is not None
        smallest = tuple(g.dense < g.packed for g in groups)
        least = self.bits(groups, smallest)
        if target.bits < least - SLACK:
            raise BudgetError(f"{target}: the best that can be met is {least:.3f} bits; {self._what_is_kept()}")
        limit = math.floor(target.bits * self.numel / 8 + SLACK * self.numel) - self.fixed
        best = solve(groups, nbytes=limit)
        if not refine:
            return best, None
        starts = (best, replace(best, kept=smallest))
        error, best = min(((self.error(self.quantized(groups, s.kept)), s) for s in starts), key=lambda pair: pair[0])
        for _ in range(ROUNDS):
            better = solve(self._around(groups, best.kept, error), nbytes=limit)
            found = error if better.kept == best.kept else self.error(self.quantized(groups, better.kept))
            if found >= error:
                break
            best, error = better, found
        return best, decibels(self.signal, error)

    def _around(self, groups: Sequence[Group], kept: tuple[bool, ...], error: float) -> tuple[Group, ...]:
        """The groups, each with what it adds to the model's error while the others are as chosen."""
        found = []
        for i, group in enumerate(tqdm(groups, desc="around", unit="group", disable=None, leave=False)):
            other = self.error(self.quantized(groups, (*kept[:i], not kept[i], *kept[i + 1 :])))
            found.append(replace(group, score=other - error if kept[i] else error - other))
        return tuple(found)

    def _what_is_kept(self) -> str:
        """The largest parameters that the policy keeps whatever the budget, for a message."""
        chosen = {name for group in self.groups for name in group.parameters}
        left = {d.site.parameter: d for d in self.plan.decisions if d.site.parameter not in chosen}
        largest = sorted(left.values(), key=lambda d: -d.site.numel)[:3]
        if not largest:
            return "every site is in NVFP4 there"
        return "the policy keeps " + "; ".join(f"{d.site.parameter} ({d.reason})" for d in largest)

    def search(
        self,
        groups: Sequence[Group],
        target: _Target,
        value: Callable[[nn.Module], float],
        good: Callable[[float], bool],
    ) -> tuple[Solution, float]:
        """The fewest bytes whose measured value is good: by bisection of the sum of scores that is allowed.

        The best that is good so far is kept, so that a value that is not monotonous costs bytes and breaks no promise.
        """
        seen: dict[tuple[bool, ...], float] = {}

        def trial(limit: float) -> tuple[Solution, float]:
            solution = solve(groups, score=limit)
            if solution.kept not in seen:
                bar.update()
                seen[solution.kept] = value(self.quantized(groups, solution.kept))
            return solution, seen[solution.kept]

        scores = sorted(g.score for g in groups)
        low, high = max(scores[0], scores[-1] * 1e-12), max(sum(scores), scores[-1] * 1e-12)
        with tqdm(total=STEPS, desc=f"search {target}", unit="model", disable=None, leave=False) as bar:
            best = trial(high)
            if good(best[1]):
                return best
            best = trial(low)
            if not good(best[1]):
                names = [p for g, keep in zip(groups, best[0].kept, strict=True) if not keep for p in g.parameters]
                raise BudgetError(
                    f"{target}: the best that was found is {best[1]:.4g}, with only {', '.join(names)} in NVFP4; "
                    "keep the model as it is, or allow more"
                )
            for _ in range(STEPS - 2):
                middle = math.sqrt(low * high)
                found = trial(middle)
                low, high = (middle, high) if good(found[1]) else (low, middle)
                if good(found[1]) and self.bits(groups, found[0].kept) <= self.bits(groups, best[0].kept):
                    best = found
        return best


def _several(batches: Iterable[Any] | None, model: nn.Module, loss: Loss | None) -> list[Batch]:
    """The batches in memory: they are read once for every group and candidate."""
    if batches is None:
        if loss is not None:
            raise CalibrationError("Policy.for_budget: found a loss and no batches, expected pairs (inputs, target)")
        return []
    return list(checked(batches, model, targets=loss is not None))


def _with_reasons(base: Policy, groups: Sequence[Group], solution: Solution, unit: str, what: str) -> Policy:
    """The policy that keeps the groups of a solution, each parameter with what speaks for it."""
    total_score, total = sum(g.score for g in groups) or 1.0, sum(g.numel for g in groups)
    kept: dict[Any, str] = dict(base.keep)
    for group, keep in zip(groups, solution.kept, strict=True):
        for name in group.parameters if keep else ():
            others = [other for other in group.parameters if other != name]
            kept[name] = (
                f"{group.score / total_score:.1%} of the {unit} for {group.numel / total:.1%} of the values"
                + (f", with {', '.join(others)}" if others else "")
                + f" ({what}, gap {solution.gap:.2g})"
            )
    return replace(base, keep=tuple(kept.items()))


def _accuracy(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    value = float(evaluate(model))
    if not math.isfinite(value):
        raise CalibrationError(f"Policy.for_budget: evaluate gave {value}, expected a finite number, higher is better")
    return value


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
