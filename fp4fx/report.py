"""What became of every site of a model: decided, stored, and, once compiled, run by which kernel."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from fp4fx import nvfp4
from fp4fx.calibration.record import Calibration, calibration_of
from fp4fx.errors import PlanError
from fp4fx.lowering import DECISION, NOTE, lowerings_of
from fp4fx.packed import PARTS, Packed, plan_of
from fp4fx.plan import FOLDED, Decision, Plan, notes, weight_sqnr
from fp4fx.policy import Policy
from fp4fx.site import Note

NOT_COMPILED = "not compiled yet"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One site."""

    parameter: str
    op: str
    shape: tuple[int, ...]
    decision: str
    """W4A4, W4A16 or kept."""
    rule: str
    reason: str
    bits: float
    """Bits per weight as stored, scales included."""
    kurtosis: float | None
    sqnr: float | None
    """Of the stored weight in dB; None if it is kept, or was loaded without the original."""
    activations: str | None
    kernels: tuple[str, ...]
    """`op: kernel` of each use in a compiled graph; empty before compiling and for a kept site."""
    refusals: tuple[str, ...]
    """Why the kernels ahead of those were not taken; empty where `kernels` is."""
    between: tuple[str, ...]
    """Of each use in a compiled fp32 graph: why its result is not stored in bf16, empty if it is."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The rows and sums of one model."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    """What is not in the table: modules not looked into, parameters never reached."""
    resident: int
    """Bytes of all parameters and buffers of the model, each storage once."""
    dense: int
    """Bytes of the same before quantization."""
    numel: int
    """Values in all parameters, packed ones included, each tensor once."""
    quantized: int
    """Those in NVFP4."""
    bits: float
    """Mean bits per quantized weight, scales included; 0 if there is none."""
    in_graph: bool
    """True if the model itself is dense and its compiled graph holds the packed weights."""
    calibration: Calibration | None = None
    """What `fp4fx.calibrate` did to each site; None if it was not called."""

    def __str__(self) -> str:
        """The table, what is not in it, and the sums."""
        shown = [r for r in self.rows if r.rule != FOLDED]
        columns = {
            "parameter": [r.parameter for r in shown],
            "op": [r.op for r in shown],
            "shape": ["x".join(map(str, r.shape)) for r in shown],
            "decision": [r.decision for r in shown],
            "reason": [r.reason for r in shown],
            "bits": [r.bits for r in shown],
            "kurtosis": [r.kurtosis for r in shown],
            "SQNR dB": [r.sqnr for r in shown],
            "kernel": [None if r.decision == "kept" else ", ".join(r.kernels) or NOT_COMPILED for r in shown],
        }
        if any(r.refusals for r in shown):
            columns["refused"] = ["; ".join(r.refusals) or None for r in shown]
        table = tabulate(columns, headers="keys", floatfmt=".2f", missingval="-")
        calibration = [str(self.calibration), ""] if self.calibration else []
        return "\n".join([table, "", *calibration, *self.notes, *self._sums()])

    def _sums(self) -> Iterable[str]:
        share = self.quantized / max(self.numel, 1)
        yield f"{self.quantized:,} of {self.numel:,} = {share:.1%} of all parameters in NVFP4"
        if self.quantized:
            yield f"{self.bits:.3f} bits per quantized weight, scales included"
        between = [why for row in {row.parameter: row for row in self.rows}.values() for why in row.between]
        if between:
            wide = ", ".join(f"{n} {why}" for why, n in Counter(filter(None, between)).most_common())
            yield f"{between.count('')} of {len(between)} fp32 results stored in bf16" + (
                f"; not: {wide}" if wide else ""
            )
        if self.in_graph:
            yield f"the model holds {self.resident:,} bytes, dense; the packed weights are in its compiled graph"
        else:
            ratio = self.resident / max(self.dense, 1)
            yield f"resident {self.resident:,} bytes, dense {self.dense:,} bytes ({ratio:.3f} of it)"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON-ready values; an infinite SQNR is the string "inf"."""
        rows = [{name: _plain(value) for name, value in asdict(row).items()} for row in self.rows]
        return {**asdict(self), "rows": rows, "notes": list(self.notes)}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def report(model: nn.Module) -> Report:
    """Say what became of every site of a quantized model, or of one compiled with `options={"policy": ...}`.

    Args:
        model: What `fp4fx.quantize` or `torch.compile` returned, or the model that was given to `torch.compile`.

    Raises:
        PlanError: The model is neither, or its layers were changed after it was quantized.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    plan = plan_of(model)
    if plan is not None:
        return _of_packed(model, plan)
    decided: dict[str, Decision] = _left_on(model, DECISION)
    noted: dict[str, str] = _left_on(model, NOTE)
    if not decided and not noted:
        raise PlanError(
            f"report: found a {type(model).__name__} that carries no plan, expected a quantized model; "
            'call fp4fx.quantize first, or compile with options={"policy": ...} and run it once'
        )
    return _of_compiled(model, decided, noted)


def _left_on(model: nn.Module, attribute: str) -> dict[str, Any]:
    """What the compiler left on the parameters of a model under the name of an attribute."""
    return {name: getattr(p, attribute) for name, p in model.named_parameters() if hasattr(p, attribute)}


def _of_packed(model: nn.Module, plan: Plan) -> Report:
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = []
    packed: dict[str, tuple[int, int, int]] = {}  # per parameter: values, bytes, bytes when dense
    for decision in plan.decisions:
        site = decision.site
        module = modules.get(site.module)
        spec = module.nvfp4.get(site.attribute) if isinstance(module, Packed) else None
        kept = parameters.get(site.parameter)
        if kept is None and spec is None:  # computed by its module
            kept = getattr(module, site.attribute, None)
        if decision.spec is None and kept is not None:
            rows.append(_row(decision, kept))
            continue
        if decision.spec is None or spec is None:
            raise PlanError(
                f"{site.parameter}: the plan has it {decision.label}, the model has it otherwise or not at all; "
                "its layers were changed after it was quantized: quantize it anew"
            )
        parts: list[Tensor] = [getattr(module, f"{site.attribute}_{part}") for part in PARTS]
        nbytes = sum(p.nbytes for p in parts)
        packed[site.parameter] = site.numel, nbytes, site.numel * spec.dtype.itemsize
        rows.append(_row(decision, parts[0], nbytes * 8 / site.numel, spec.sqnr))
    values, nbytes, dense = (sum(column) for column in zip(*packed.values(), strict=True)) if packed else (0, 0, 0)
    resident = _resident(model)
    return Report(
        rows=tuple(rows),
        notes=notes(plan),
        resident=resident,
        dense=resident - nbytes + dense,
        numel=values + sum(p.numel() for p in model.parameters()),
        quantized=values,
        bits=nbytes * 8 / max(values, 1),
        in_graph=False,
        calibration=calibration_of(model),
    )


def _of_compiled(model: nn.Module, decided: Mapping[str, Decision], noted: Mapping[str, str]) -> Report:
    rows = []
    for name, found in sorted(decided.items(), key=lambda item: item[1].site.index):
        parameter, spec = model.get_parameter(name).detach(), found.spec
        # A graph names parameters from where it began, and measures nothing that its policy does not ask for.
        kurtosis = None if parameter.is_meta else nvfp4.excess_kurtosis(parameter)
        decision = replace(found, site=replace(found.site, parameter=name, kurtosis=kurtosis))
        if spec is None:
            rows.append(_row(decision, model.get_parameter(name)))
        else:
            sqnr = None if parameter.is_meta else weight_sqnr(parameter, decision.site, spec.scale_rule, spec.block)
            bits = decision.nbytes * 8 / decision.site.numel
            rows.append(_row(decision, model.get_parameter(name), bits, sqnr))
    rest = [name for name, p in model.named_parameters() if p.dim() > 1 and name not in {**decided, **noted}]
    unreached = tuple(Note(name, "no compiled graph has it as the weight of a known op") for name in rest)
    plan = Plan(tuple(decided.values()), Policy(), unreached)  # for its notes; the policy was the compiler's
    values = sum(d.site.numel for d in plan.quantized)
    resident = _resident(model)
    return Report(
        rows=tuple(rows),
        notes=(*notes(plan), *(f"not reached: {name}: {reason}" for name, reason in noted.items())),
        resident=resident,
        dense=resident,
        numel=sum(p.numel() for p in model.parameters()),
        quantized=values,
        bits=sum(d.nbytes for d in plan.quantized) * 8 / max(values, 1),
        in_graph=True,
    )


def _row(decision: Decision, stored: Tensor, bits: float | None = None, sqnr: float | None = None) -> Row:
    site = decision.site
    # A parameter that is kept now may bear what an earlier compile, with another policy, did with it.
    lowerings = lowerings_of(stored) if decision.spec else ()
    return Row(
        parameter=site.parameter,
        op=site.op,
        shape=site.shape,
        decision=decision.label,
        rule=decision.rule,
        reason=decision.reason,
        bits=stored.element_size() * 8.0 if bits is None else bits,
        kurtosis=site.kurtosis,
        sqnr=sqnr,
        activations=decision.spec.activations if decision.spec else None,
        kernels=tuple(dict.fromkeys(f"{low.op}: {low.kernel}" for low in lowerings)),
        refusals=tuple(dict.fromkeys(refusal for low in lowerings for refusal in low.refusals)),
        between=tuple(low.between for low in lowerings if low.between is not None),
    )


def _resident(model: nn.Module) -> int:
    """Bytes of the storages behind all parameters and buffers; a meta tensor counts what it would take.

    Of distributed tensors those that this rank holds.
    """
    sizes: dict[tuple[str, int], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # noqa: PLW2901
        storage = tensor.untyped_storage()
        sizes[str(tensor.device), id(tensor) if tensor.is_meta else storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
