"""What the methods of calibration share: the model, the original, the data, the sites and the record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from fp4fx import nvfp4
from fp4fx.calibration.data import Batches, forward
from fp4fx.calibration.record import Calibration, Step, calibration_of, remember_calibration
from fp4fx.kernels import encoding
from fp4fx.observe import Call, observe
from fp4fx.packed import PARTS, Packed, PackedSpec, plan_of
from fp4fx.site import Site

_SMOOTHED = "_fp4fx_smoothed"
INPUTS = ("linear", "conv")
"""How the names of the ops begin whose weight is multiplied with an activation."""


class Method(Protocol):
    """A way to calibrate, with its options: a frozen dataclass whose repr tells it from the same with others."""

    name: ClassVar[str]
    needs_reference: ClassVar[bool]
    """Whether it compares with the original model."""
    rewrites: ClassVar[bool]
    """Whether it changes weights, on which other corrections rest."""

    def passes(self, batches: Batches | None) -> int:
        """How often it reads the data; CalibrationError if it cannot do with what there is."""
        ...

    def run(self, job: Job) -> None:
        """Calibrate every site of `job.pending(self)` and record what came of it."""
        ...


@dataclass
class Job:
    """One call of `calibrate`."""

    model: nn.Module
    original: nn.Module | None
    data: Batches | None
    again: bool = False

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The packed parameters in execution order, each by the first of its uses that multiplies."""
        plan = plan_of(self.model)
        assert plan is not None
        found: dict[str, Site] = {}
        for site in (d.site for d in plan.quantized):
            if site.parameter not in found or not found[site.parameter].op.startswith(INPUTS):
                found[site.parameter] = site
        return tuple(found.values())

    @property
    def reference(self) -> nn.Module:
        """The original model; a method that gets here has been asked for it before."""
        assert self.original is not None
        return self.original

    @property
    def batches(self) -> Batches:
        """The data; as `reference`."""
        assert self.data is not None
        return self.data

    def pending(self, method: Method) -> list[Site]:
        """The sites that the method has not dealt with yet."""
        record = calibration_of(self.model) or Calibration()
        return [s for s in self.sites if self.again or not record.done(repr(method), s.parameter)]

    def record(
        self,
        method: Method,
        site: Site,
        reason: str,
        before: float | None = None,
        after: float | None = None,
        *,
        changed: bool = False,
    ) -> None:
        """Note on the model what a method did to a site: from here on an interruption does not lose it."""
        step = Step(
            method=method.name,
            options=repr(method),
            parameter=site.parameter,
            before=before,
            after=before if after is None and not changed else after,
            changed=changed,
            reason=reason,
        )
        stale = ("bias_correction",) if changed and method.rewrites else ()
        record = calibration_of(self.model) or Calibration()
        remember_calibration(self.model, record.with_step(step, stale))

    def weight(self, site: Site) -> Tensor:
        """The original weight fp32 [N, K] as `nvfp4.to_rows` has it, on the model's device, smoothed if it has been."""
        dense = getattr(self.reference.get_submodule(site.module), site.attribute).detach()
        rows = nvfp4.to_rows(dense.to(self.stored(site)[0].device).float(), site.order, site.groups)
        rows = rows.reshape(site.rows)
        factors = self.smoothing(site)
        return rows if factors is None else rows * factors

    def smoothing(self, site: Site) -> Tensor | None:
        """The factors of the weight's values, fp32 [K] or [N, K], that a norm ahead of it is divided by; or None."""
        found: Tensor | None = self.model.__dict__.get(_SMOOTHED, {}).get(site.parameter)
        return found

    def smooth(self, factors: Mapping[str, Tensor]) -> None:
        """Note on the model what `smoothing` is to say from now on."""
        self.model.__dict__[_SMOOTHED] = {**self.model.__dict__.get(_SMOOTHED, {}), **factors}

    def quantizes_input(self, site: Site) -> bool:
        """Whether the layer is W4A4."""
        module = self.model.get_submodule(site.called_in)
        return site.own_input and isinstance(module, Packed) and module.nvfp4_activations is not None

    def stored(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of a packed parameter: its own buffers."""
        module = self.model.get_submodule(site.module)
        packed, scale, global_scale = (module.get_buffer(f"{site.attribute}_{part}") for part in PARTS)
        return packed, scale, global_scale

    def decoded(self, site: Site) -> Tensor:
        """The packed weight fp32 [N, K]."""
        packed, scale, global_scale = self.stored(site)
        return nvfp4.dequantize_rows(packed, scale, global_scale, site.rows[1], torch.float32).reshape(site.rows)

    def unfit(self, site: Site) -> str | None:
        """Why the weight is not to be rounded for its products, or None."""
        plan = plan_of(self.model)
        assert plan is not None
        ops = [d.site.op for d in plan.quantized if d.site.parameter == site.parameter]
        if not site.op.startswith(INPUTS):
            return f"kept: {site.op} multiplies its weight with no activation"
        other = next((op for op in ops if not op.startswith(INPUTS)), None)
        return None if other is None else f"kept: {other} reads it too, for which its nearest values are the best"

    def spec(self, site: Site) -> PackedSpec:
        """How the parameter is stored."""
        module = self.model.get_submodule(site.module)
        assert isinstance(module, Packed)
        return module.nvfp4[site.attribute]

    def rule(self, site: Site) -> str:
        """The rule for its scales: by search, where a block has one row."""
        return "search" if self.spec(site).block[0] == 1 else "max"

    def encoded(self, site: Site, rows: Tensor, importance: Tensor | None = None) -> nvfp4.NVFP4:
        """Rows fp32 [N, K] -> their nearest values, with the scales of `rule`, in the shape that they are stored in.

        `importance` fp32 [G, K], of G equal parts of the rows, is that of `nvfp4.quantize`; the result is [N, .] then.
        """
        rule, block = self.rule(site), self.spec(site).block
        if importance is not None and rule == "search":
            return encoding.quantize(rows, scale_rule=rule, block=block, importance=importance)
        rows = rows.reshape(*self.stored(site)[1].shape[:-1], -1)
        return encoding.quantize(rows, scale_rule=rule, block=block)

    def encode(self, site: Site) -> None:
        """Put the weight as it is now into the packed parameter, by the rule that it was packed by."""
        spec = self.spec(site)
        dense = nvfp4.from_rows(self.weight(site), spec.shape, spec.order, spec.groups)
        q = encoding.quantize(dense, scale_rule=spec.scale_rule, block=spec.block, order=spec.order, groups=spec.groups)
        self.write(site, q.packed, q.scale, q.global_scale, spec.scale_rule)

    def write(
        self, site: Site, packed: Tensor, scale: Tensor, global_scale: Tensor, scale_rule: str | None = None
    ) -> None:
        """Put new parts, of any shape that holds as many bytes, into a packed parameter, in place."""
        for buffer, new in zip(self.stored(site), (packed, scale, global_scale), strict=True):
            buffer.copy_(new.reshape(buffer.shape))
        sqnr = nvfp4.sqnr(self.weight(site), self.decoded(site))
        for name in (site.parameter, *site.tied):
            path, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(path)
            assert isinstance(module, Packed)
            spec = replace(module.nvfp4[attribute], sqnr=sqnr, scale_rule=scale_rule or self.rule(site))
            module.nvfp4 = {**module.nvfp4, attribute: spec}

    @cached_property
    def calls(self) -> dict[str, int]:
        """How often a forward on the first batch reads each parameter, in the order of the last of these calls."""
        found: dict[str, int] = {}

        def seen(call: Call) -> None:
            found[call.site.parameter] = found.pop(call.site.parameter, 0) + 1

        with observe(self.model, self.sites, seen):
            forward(self.model, self.batches.first, "batch 0")
        return found

    def in_order(self, sites: Iterable[Site]) -> list[Site]:
        """The sites in the order in which the model runs them; at the end those that the first batch does not reach."""
        sites = list(sites)
        place = {name: number for number, name in enumerate(self.calls if sites else ())}
        return sorted(sites, key=lambda site: place.get(site.parameter, len(place)))
