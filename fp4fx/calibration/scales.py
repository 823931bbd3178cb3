"""Static global scales for the inputs of W4A4 layers.

A global scale that is too large costs nothing up to 64 times and more, as the scales of the blocks make up for it; one
that is too small cuts off the largest values: a factor of 2 costs 37 % more error, of 4 eleven times as much. So the
largest magnitude seen is taken with headroom. A percentile saturates on purpose, which NVFP4 has no use for: on heavy
tails it costs half as much error again and more. It is here to be compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm import tqdm

from fp4fx import nvfp4
from fp4fx.calibration.data import Batches, forward
from fp4fx.calibration.job import Job
from fp4fx.errors import CalibrationError
from fp4fx.packed import INPUT_SCALE, Packed, plan_of, remember_plan
from fp4fx.site import Site

HEADROOM = 16.0
"""A static scale exceeds the largest value seen this much."""
BLOCKS = 4096
"""At most so many blocks of an input are kept to compare scales on."""
STEPS = range(-6, 11)
"""Powers of two, from the largest value seen, that the rule "mse" tries."""


@dataclass(frozen=True, kw_only=True)
class StaticScales:
    """A layer of `activations="nvfp4"`, whose scale comes from each input, gets a fixed one."""

    name: ClassVar[str] = "static_scales"
    needs_reference: ClassVar[bool] = False
    rewrites: ClassVar[bool] = False
    rule: Literal["max", "percentile", "mse"] = "max"
    """"max": the largest magnitude. "percentile": the magnitude that `percentile` percent do not exceed. "mse": of the
    powers of two times the largest magnitude, the one of the least squared error; the largest of equals."""
    headroom: float | None = None
    """The scale is that of so many times the magnitude; None: 16 for "max", otherwise 1."""
    percentile: float = 99.9

    def __post_init__(self) -> None:
        rules = ("max", "percentile", "mse")
        if self.rule not in rules or not 0 < self.percentile <= 100 or (self.headroom or 1.0) <= 0:
            expected = f"a rule of {', '.join(rules)}, a percentile in (0, 100] and a positive headroom"
            raise CalibrationError(f"static_scales: found {self}, expected {expected}")

    def passes(self, batches: Batches | None) -> int:
        """One."""
        if batches is None:
            raise CalibrationError("static_scales: found no batches, expected inputs to measure on")
        return 1

    def run(self, job: Job) -> None:
        """One forward of each batch, with a look at every input; a layer that none of them reaches stays as it is."""
        layers: dict[str, Site] = {}
        for site in job.pending(self):
            if job.quantizes_input(site):
                layers[site.called_in] = site
            else:
                job.record(self, site, "kept: its input is not quantized")
        found = {path: Inputs() for path in layers}
        hooks = [
            job.model.get_submodule(path).register_forward_pre_hook(seen, with_kwargs=True)
            for path, seen in found.items()
        ]
        try:
            bar = tqdm(job.batches if layers else (), desc=self.name, unit="batch", disable=None, leave=False)
            for number, batch in enumerate(bar):
                forward(job.model, batch, f"batch {number}")
        finally:
            for hook in hooks:
                hook.remove()
        for path, site in layers.items():
            self._layer(job, path, site, found[path])

    def _layer(self, job: Job, path: str, site: Site, seen: Inputs) -> None:
        module = job.model.get_submodule(path)
        assert isinstance(module, Packed)
        if not seen.blocks:
            keeps = "dynamic" if module.nvfp4_activations == "nvfp4" else "static"
            job.record(self, site, f"kept: never reached by the data, which leaves it its {keeps} scale")
            return
        blocks = torch.cat(seen.blocks)
        old = module._buffers.get(INPUT_SCALE)
        before = _error(blocks, nvfp4.global_scale(seen.amax) if old is None else old)
        scale, factor = self._scale(blocks, seen.amax)
        make_static(job.model, path, scale)
        reason = f"static scale of {self.rule}, {factor:.3g} times the largest value"
        job.record(self, site, reason, before, _error(blocks, scale), changed=True)

    def _scale(self, blocks: Tensor, amax: Tensor) -> tuple[Tensor, float]:
        """The scale fp32 [], and the magnitude that it is of in units of the largest seen."""
        headroom = self.headroom or (HEADROOM if self.rule == "max" else 1.0)
        factor = headroom
        if self.rule == "percentile" and amax > 0:
            factor = headroom * float(_quantile(blocks.abs(), self.percentile / 100) / amax)
        elif self.rule == "mse":
            errors = {2.0**step: _error(blocks, nvfp4.global_scale(amax * 2.0**step)) for step in reversed(STEPS)}
            factor = headroom * min(errors, key=lambda power: errors[power])
        return static_scale(amax, factor), factor


def static_scale(amax: Tensor, headroom: float = HEADROOM) -> Tensor:
    """The largest magnitude seen, fp32 [] -> the global scale fp32 [] of one that is `headroom` times as large."""
    return nvfp4.global_scale(amax * headroom)


def make_static(model: nn.Module, path: str, scale: Tensor) -> None:
    """Give the W4A4 layer at `path` a static input scale fp32 [], in place; the plan says so from now on."""
    module, plan = model.get_submodule(path), plan_of(model)
    assert isinstance(module, Packed) and plan is not None
    if INPUT_SCALE in module._buffers:
        module.get_buffer(INPUT_SCALE).copy_(scale)
        return
    module.register_buffer(INPUT_SCALE, scale.clone())
    module.nvfp4_activations = "nvfp4-static"
    decisions = tuple(
        replace(d, spec=replace(d.spec, activations="nvfp4-static"))
        if d.spec is not None and d.spec.activations == "nvfp4" and d.site.called_in == path
        else d
        for d in plan.decisions
    )
    remember_plan(model, replace(plan, decisions=decisions))


class Inputs:
    """A hook: the largest finite magnitude of a layer's inputs, and blocks of them."""

    def __init__(self) -> None:
        self.amax = torch.zeros(())
        self.blocks: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the input of one forward."""
        x: Tensor = (*args, *kwargs.values())[0].detach()
        self.amax = torch.maximum(self.amax.to(x.device), x.float().nan_to_num(0.0, 0.0, 0.0).abs().amax())
        rank = getattr(module, "kernel_size", ())
        rows = x.movedim(-1 - len(rank), -1) if rank else x
        blocks = pad(rows.float(), (0, -rows.shape[-1] % nvfp4.BLOCK)).reshape(-1, nvfp4.BLOCK)
        room = math.ceil(BLOCKS / 8)  # of one call
        self.blocks.append(blocks[:: -(-len(blocks) // room)].clone())
        if sum(map(len, self.blocks)) > BLOCKS:
            self.blocks = [torch.cat(self.blocks)[::2].contiguous()]


def _error(blocks: Tensor, scale: Tensor) -> float:
    """Blocks fp32 [n, 16], global scale fp32 [] -> ‖x - quantized x‖² / ‖x‖²."""
    rounded = nvfp4.dequantize_rows(*nvfp4.quantize_rows(blocks, scale), nvfp4.BLOCK, torch.float32)
    signal = float(blocks.square().sum())
    return float((blocks - rounded).square().sum()) / signal if signal else 0.0


def _quantile(values: Tensor, q: float) -> Tensor:
    """The nearest-rank quantile; `torch.quantile` has a limit on the number of values."""
    return values.flatten().kthvalue(max(math.ceil(q * values.numel()), 1)).values
