"""How much each layer suffers from NVFP4: its weight, its output, and the loss."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from os import PathLike
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from fp4fx.batches import Batch, checked
from fp4fx.drawn import energies
from fp4fx.effective import settled
from fp4fx.errors import CalibrationError, PlanError
from fp4fx.models import require
from fp4fx.nvfp4 import sqnr
from fp4fx.packed import INPUT_SCALE, plan_of
from fp4fx.plan import FOLDED, Decision, Plan
from fp4fx.policy import Policy
from fp4fx.quantize import quantize
from fp4fx.site import Site
from fp4fx.twins import Difference, Twins

UNREACHED = "not reached by the data"
LEAST = 3
"""Sites from which on a rank correlation says anything."""

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter, all its uses taken together."""

    parameter: str
    op: str
    """Of its first use."""
    rows: tuple[int, int]
    """(N, K), as blocks run along K."""
    numel: int
    decision: str
    """W4A16 or W4A4."""
    kurtosis: float | None
    weight_sqnr: float
    """dB."""
    output_sqnr: float | None
    """Of the output of the op with this site alone in NVFP4, in dB; None if the data do not reach it."""
    fisher: float | None
    """Sum of (dL/dy · change of y)² over the values of the output and the data; None without a loss."""
    inputs: str
    """What the input is: "data", the normalisation and ReLU whose statistics it is drawn from, or "unit normal"."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON-ready values; an infinite SQNR is the string "inf" or "-inf"."""
        return {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The rows of one model, in execution order."""

    rows: tuple[Row, ...]
    correlation: Mapping[str, float]
    """Spearman's rank correlation of kurtosis with the errors: "weight" and "output" (noise over signal), "fisher";
    only those that there are enough sites for."""
    kept: Mapping[str, str]
    """Parameters that the policy keeps, normalisations aside, and why."""

    def __str__(self) -> str:
        """The table, what kurtosis says about the errors, and what is not in the table."""
        columns: dict[str, list[Any]] = {
            "parameter": [r.parameter for r in self.rows],
            "op": [r.op for r in self.rows],
            "N x K": ["{}x{}".format(*r.rows) for r in self.rows],
            "decision": [r.decision for r in self.rows],
            "kurtosis": [_two(r.kurtosis) for r in self.rows],
            "weight dB": [_two(r.weight_sqnr) for r in self.rows],
            "output dB": [_two(r.output_sqnr) for r in self.rows],
            "fisher": [None if r.fisher is None else f"{r.fisher:.3g}" for r in self.rows],
            "input": [r.inputs for r in self.rows],
        }
        if all(r.fisher is None for r in self.rows):
            del columns["fisher"]
        right = {"kurtosis", "weight dB", "output dB", "fisher"}
        align = ["right" if name in right else "left" for name in columns]
        table = tabulate(columns, headers="keys", missingval="-", colalign=align, disable_numparse=True)
        found = ", ".join(f"{value:+.2f} with the {name} error" for name, value in self.correlation.items())
        ranks = f"rank correlation of kurtosis: {found} ({len(self.rows)} sites)" if found else ""
        return "\n".join(
            [table, "", *filter(None, [ranks]), *(f"kept: {name}: {why}" for name, why in self.kept.items())]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "correlation": dict(self.correlation),
            "kept": dict(self.kept),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a figure: SQNR of each site in execution order, and output error over kurtosis.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        figure = require("matplotlib.figure", "plots").Figure(figsize=(11, 0.9 + 0.2 * max(len(self.rows), 12)))
        sites, against = figure.subplots(1, 2, width_ratios=(3, 2))
        places = range(len(self.rows))
        for name, marker in (("weight_sqnr", "."), ("output_sqnr", "o")):
            values = [_finite(getattr(r, name)) for r in self.rows]
            sites.plot(values, places, marker, label=name.replace("_sqnr", ""), alpha=0.8)
        sites.set_yticks(places, [r.parameter for r in self.rows], fontsize=7)
        sites.invert_yaxis()
        sites.set_xlabel("SQNR, dB")
        sites.legend()
        shown = [r for r in self.rows if r.kurtosis is not None]
        against.plot([r.kurtosis for r in shown], [_finite(r.output_sqnr) for r in shown], "o", alpha=0.8)
        against.set_xlabel("excess kurtosis of the weight")
        against.set_ylabel("SQNR of the output, dB")
        if "output" in self.correlation:
            against.set_title(f"rank correlation with the error {self.correlation['output']:+.2f}", fontsize=9)
        for axes in (sites, against):
            axes.grid(lw=0.3)
        figure.tight_layout()
        figure.savefig(path, dpi=120)


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    policy: Policy | None = None,
) -> Sensitivity:
    """Measure for every site that a policy lets quantize what NVFP4 does to it alone; the model is only read.

    Without data a layer's inputs are drawn from the statistics of the normalisation ahead of it, clipped by a ReLU
    between, and where none is ahead from a unit normal; the row says which.

    Args:
        model: Dense, in evaluation mode if there are data.
        batches: Inputs: an iterable of tensors, tuples of positional or dictionaries of keyword arguments; with a loss
            an iterable of pairs (inputs, target). Read once.
        loss: `loss(output, target)` gives a scalar. With it each site has a score Σ(∂L/∂y·Δy)², the diagonal Fisher
            approximation of what the site does to the loss (as in NVIDIA ModelOpt's auto_quantize).
        policy: Which sites, and how they are quantized; None is every linear, convolution and embedding, W4A16. Where
            it quantizes activations, the errors are those of W4A4.

    Raises:
        CalibrationError: the data are empty, hold a NaN, are on another device, or not what the model takes.
        PlanError: the policy quantizes nothing, or the model is quantized already.
        Error: what `fp4fx.quantize` raises.
    """
    if loss is not None and batches is None:
        raise CalibrationError("sensitivity: found a loss and no batches, expected pairs (inputs, target) to run it on")
    if policy is None:
        policy = Policy(skip_first=0, skip_last=0, depthwise=True, embeddings=True)
    data: Iterable[Batch] | None = None
    example: Batch | None = None
    if batches is not None:
        stream = checked(batches, model, targets=loss is not None)
        example = next(stream)
        data = chain([example], stream)
    packed = quantize(model, policy, *((None, None) if example is None else example.example))
    plan = plan_of(packed)
    assert plan is not None
    return measure(model, packed, plan, data, loss)


def measure(
    model: nn.Module, packed: nn.Module, plan: Plan, data: Iterable[Batch] | None, loss: Loss | None
) -> Sensitivity:
    """What `sensitivity` returns, for a model that has been quantized by this plan already."""
    first: dict[str, Decision] = {}
    for decision in plan.quantized:
        first.setdefault(decision.site.parameter, decision)
    if not first:
        reasons = "; ".join(f"{d.site.parameter}: {d.reason}" for d in plan.kept[:3]) or "the model has no site"
        raise PlanError(f"sensitivity: the policy quantizes nothing, expected a site or more; {reasons}")
    dense, _ = settled(model)
    weights = {name: p.detach() for name, p in dense.named_parameters() if name in first}
    twins = {name: getattr(packed.get_submodule(d.site.module), d.site.attribute) for name, d in first.items()}
    scores: dict[str, float] = {}
    if data is None:
        found = {n: energies(d.site, weights[n], twins[n], dense, _activations(d)) for n, d in first.items()}
    else:
        inputs = {n: _quantizer(d.site, packed) for n, d in first.items() if _activations(d)}
        found, scores = _observed(dense, twins, inputs, data, loss)
    rows = []
    for name, decision in first.items():
        site = decision.site
        signal, noise, source = found.get(name, (0.0, 0.0, UNREACHED))
        rows.append(
            Row(
                parameter=name,
                op=site.op,
                rows=site.rows,
                numel=site.numel,
                decision=decision.label,
                kurtosis=site.kurtosis,
                weight_sqnr=sqnr(weights[name], twins[name]),
                output_sqnr=None if source == UNREACHED else decibels(signal, noise),
                fisher=None if loss is None else scores.get(name, 0.0),
                inputs=source,
            )
        )
    kept = {d.site.parameter: d.reason for d in plan.kept if d.rule != FOLDED and d.site.parameter not in first}
    return Sensitivity(rows=tuple(rows), correlation=_correlations(rows), kept=kept)


def decibels(signal: float, noise: float) -> float:
    """Two energies -> 10 log10(signal / noise); inf without noise, -inf without signal."""
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def _observed(
    model: nn.Module,
    twins: Mapping[str, Tensor],
    inputs: Mapping[str, Callable[[Tensor], Tensor]],
    data: Iterable[Batch],
    loss: Loss | None,
) -> tuple[dict[str, tuple[float, float, str]], dict[str, float]]:
    """Energy of each site's output and of its change on the data, and its part in the loss."""
    energy: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    scores: dict[str, float] = defaultdict(float)
    held: list[Difference] = []

    def seen(difference: Difference) -> None:
        sums = energy[difference.parameter]
        sums[0] += _energy(difference.output.detach())
        sums[1] += _energy(difference.change)
        if loss is not None:
            held.append(difference)

    mode = Twins(model, twins, inputs, seen)
    for batch in tqdm(data, desc="sensitivity", unit="batch", disable=None, leave=False):
        with torch.set_grad_enabled(loss is not None):
            with mode:
                output = batch.run(model)
            mode.forget()
            if loss is not None:
                for difference, gradient in zip(held, _gradients(loss, output, batch, held), strict=True):
                    if gradient is not None:
                        scores[difference.parameter] += _energy(gradient * difference.change)
                held.clear()
    return {name: (signal, noise, "data") for name, (signal, noise) in energy.items()}, scores


def _gradients(loss: Loss, output: Any, batch: Batch, held: Sequence[Difference]) -> Sequence[Tensor | None]:
    value = loss(output, batch.target)
    if not isinstance(value, Tensor) or value.numel() != 1 or not bool(value.isfinite().all()):
        found = f"{type(value).__name__} {value!r}"
        raise CalibrationError(f"batch {batch.number}: the loss gave {found}, expected a finite tensor of one value")
    outputs = [difference.output for difference in held]
    if not value.requires_grad:
        raise CalibrationError(
            f"batch {batch.number}: the loss has no gradient with respect to the layers; the model's forward or the "
            "loss detaches it"
        )
    return torch.autograd.grad(value.sum(), outputs, allow_unused=True)


def _activations(decision: Decision) -> bool:
    return decision.spec is not None and decision.spec.activations is not None


def _quantizer(site: Site, packed: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the packed layer of a site does to its input; a convolution's may come without a batch axis."""
    scale = packed.get_submodule(site.called_in)._buffers.get(INPUT_SCALE)
    rank = len(site.shape) - 2 if site.op.startswith("conv") else 0

    def quantized(x: Tensor) -> Tensor:
        batched = x if not rank or x.dim() == rank + 2 else x.unsqueeze(0)
        y: Tensor = torch.ops.fp4fx.fake_quantize.default(batched, scale, "channels" if rank else "rows")
        return y.reshape(x.shape)

    return quantized


def _energy(x: Tensor) -> float:
    return float(x.float().square().sum(dtype=torch.float64))


def _correlations(rows: Sequence[Row]) -> dict[str, float]:
    """Spearman's rank correlation of kurtosis with each kind of error."""
    errors: dict[str, Callable[[Row], float | None]] = {
        "weight": lambda row: -row.weight_sqnr,
        "output": lambda row: None if row.output_sqnr is None else -row.output_sqnr,
        "fisher": lambda row: row.fisher,
    }
    from scipy.stats import spearmanr  # noqa: PLC0415  (takes most of a second to import)

    found = {}
    for name, error in errors.items():
        pairs = [(r.kurtosis, e) for r in rows if r.kurtosis is not None and (e := error(r)) is not None]
        if len(pairs) >= LEAST and all(len(set(values)) > 1 for values in zip(*pairs, strict=True)):
            found[name] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return found


def _two(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _finite(value: float | None) -> float:
    return math.nan if value is None or math.isinf(value) else value
