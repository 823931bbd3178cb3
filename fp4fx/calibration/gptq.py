"""GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022).

Columns are rounded one after another, and what is left of each error is made up for by the columns to come, as the
inputs' second moments H = XᵀX say: with U the upper Cholesky factor of H⁻¹, column j's error divided by U_jj is taken
off column k U_jk times. Scales stand before any column is rounded, by search, so that the order of columns is free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from fp4fx import nvfp4
from fp4fx.calibration.data import Batches, Enough, forward
from fp4fx.calibration.inputs import input_rows, weight_rows
from fp4fx.calibration.job import Job
from fp4fx.observe import Call, observe
from fp4fx.site import Site

HELD_OUT = 8
"""One input in so many is kept from the Hessian, to measure with; the last ones of each batch."""
MEASURED = 1024
"""At most so many of them are kept."""
LEAST = 4
"""A Hessian of K columns wants K / LEAST inputs at least."""


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """Linears and convolutions, from inputs of the already quantized layers ahead.

    Of the weight as it is, its nearest rounding with searched scales, and GPTQ's, the one of the least output error on
    inputs that GPTQ has not seen is kept.
    """

    name: ClassVar[str] = "gptq"
    needs_reference: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a part of its mean; ten and a hundred times that where it is not enough."""
    block: int = 128
    """Columns between updates of all that follow."""
    act_order: bool = False
    """Round the columns with the largest inputs first."""
    samples: int = 65536
    """At most so many inputs (tokens, pixels) of a layer are taken, evenly spaced over all batches."""
    memory: int | None = None
    """Bytes for Hessians: sites are dealt with in groups whose Hessians fit; half the dense model if None."""

    def passes(self, batches: Batches | None) -> int:
        """Several: one to see the order of the sites, and one per group."""
        return 2

    def run(self, job: Job) -> None:
        """Group by group: a forward of all batches up to the group's last site, then its weights."""
        with tqdm(total=len(job.pending(self)), desc="gptq", unit="site", disable=None, leave=False) as bar:
            for group in self._groups(job):
                statistics = self._observed(job, group)
                for site in group:
                    self._site(job, site, statistics.pop(site.parameter, None))
                    bar.update()

    def _groups(self, job: Job) -> Iterator[list[Site]]:
        """The sites in execution order, as many at a time as the memory allows; one at least."""
        group: list[Site] = []
        used, memory = 0, self.memory
        if memory is None:
            memory = sum(p.numel() * 2 for p in job.reference.parameters())
        for site in job.in_order(job.pending(self)):
            k = site.rows[1]
            groups = site.groups if site.op.startswith("conv") else math.prod(site.shape[:-2])
            need = groups * k * (k + MEASURED) * 4
            if group and used + need > memory:
                yield group
                group, used = [], 0
            group.append(site)
            used += need
        if group:
            yield group

    def _observed(self, job: Job, group: Sequence[Site]) -> dict[str, _Statistics]:
        """What every site of the group read in all batches, in the model as it is now."""
        found: dict[str, _Statistics] = {}
        wanted = [site for site in group if job.unfit(site) is None]
        last = wanted[-1].parameter if wanted else None
        share = -(-self.samples // job.batches.count)
        seen_of_last = 0

        def seen(call: Call) -> None:
            nonlocal seen_of_last
            name = call.site.parameter
            if name not in found:
                found[name] = _Statistics(partial(job.decoded, call.site), -(-MEASURED // job.batches.count))
            found[name].add(call, share)
            seen_of_last += name == last
            if name == last and seen_of_last == job.calls.get(name):
                raise Enough

        with observe(job.model, wanted, seen):
            for number, batch in enumerate(job.batches if wanted else ()):
                seen_of_last = 0
                forward(job.model, batch, f"batch {number}")
        return found

    @torch.no_grad()
    def _site(self, job: Job, site: Site, statistics: _Statistics | None) -> None:
        """Quantize one weight anew, or say why not."""
        reason = job.unfit(site)
        if reason is None:
            reason = "kept: never reached by the data" if statistics is None else statistics.unusable(site)
        if statistics is None or reason is not None:
            job.record(self, site, reason or "")
            return
        dense, now = job.weight(site), job.decoded(site)
        q = job.encoded(site, dense)
        packed, codes = q.packed.flatten(0, -2), nvfp4.unpack(q.packed).flatten(0, -2)
        scale = (nvfp4.decode_e4m3(q.scale) * q.global_scale).flatten(0, -2)
        nearest = nvfp4.dequantize_rows(packed, q.scale.flatten(0, -2), q.global_scale, dense.shape[1], torch.float32)
        learned = nearest.clone()
        for start, part in statistics.parts.items():
            rows = slice(start, start + part.rows)
            shape = part.hessian.shape[0], -1
            solved = self._solve(
                torch.unflatten(dense[rows], 0, shape), part.hessian, torch.unflatten(scale[rows], 0, shape)
            )
            if solved is None:
                job.record(self, site, "kept: its Hessian has no Cholesky factor, even with more damping")
                return
            codes[rows, : dense.shape[1]] = solved.flatten(0, 1)
            steps = scale[rows].repeat_interleave(nvfp4.BLOCK, -1)[:, : dense.shape[1]]
            learned[rows] = nvfp4.decode_e2m1(codes[rows, : dense.shape[1]]) * steps
        before, plain, after = (statistics.error(dense, found) for found in (now, nearest, learned))
        if before <= min(plain, after):
            job.record(self, site, f"kept: GPTQ gives an error of {after:.2e}, rounding one of {plain:.2e}", before)
            return
        job.write(site, nvfp4.pack(codes) if after < plain else packed, q.scale, q.global_scale)
        reason = "GPTQ" if after < plain else f"nearest values, as GPTQ gives an error of {after:.2e}"
        job.record(self, site, reason, before, min(plain, after), changed=True)

    def _solve(self, weight: Tensor, hessian: Tensor, scale: Tensor) -> Tensor | None:
        """Weight fp32 [G, R, K], H fp32 [G, K, K], scale fp32 [G, R, ceil(K/16)] -> codes u8 [G, R, K].

        None if the Hessian has no factor. A column whose inputs are all zero is rounded to nearest and takes no part.
        """
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        order = torch.arange(weight.shape[-1], device=weight.device).expand(diagonal.shape)
        if self.act_order:
            order = diagonal.argsort(dim=-1, descending=True, stable=True)
        factor = self._factor(hessian.gather(-2, _along(order, hessian, -2)).gather(-1, _along(order, hessian, -1)))
        if factor is None:
            return None
        columns = weight.mT.gather(-2, _along(order, weight.mT, -2))  # [G, K, R]: a column is contiguous
        steps = scale.mT.gather(-2, (order // nvfp4.BLOCK).unsqueeze(-1).expand(columns.shape))
        codes = torch.empty_like(columns, dtype=torch.uint8)
        for start in range(0, columns.shape[1], self.block):
            stop = min(start + self.block, columns.shape[1])
            here, upper = columns[:, start:stop], factor[:, start:stop]
            errors = torch.empty_like(here)
            for j in range(stop - start):
                code = nvfp4.encode_e2m1(here[:, j] / steps[:, start + j])
                codes[:, start + j] = code
                error = here[:, j] - nvfp4.decode_e2m1(code) * steps[:, start + j]
                errors[:, j] = error / upper[:, j, start + j, None]
                here[:, j + 1 :] -= upper[:, j, start + j + 1 : stop, None] * errors[:, j, None]
            columns[:, stop:] -= upper[:, :, stop:].mT @ errors
        unordered: Tensor = torch.empty_like(codes).scatter_(-2, _along(order, codes, -2), codes)
        return unordered.mT

    def _factor(self, hessian: Tensor) -> Tensor | None:
        """H fp32 [G, K, K] -> the upper Cholesky factor of its damped inverse, or None."""
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean(-1, keepdim=True)
        dead = (diagonal == 0).float()
        for damping in (self.damping, 10 * self.damping, 100 * self.damping):
            damped = hessian + torch.diag_embed(damping * mean.expand(diagonal.shape) + dead)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if failed.any():
                continue
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.any() and upper.isfinite().all():
                return upper
        return None


def _along(order: Tensor, like: Tensor, dim: int) -> Tensor:
    """int64 [G, K] -> the index that permutes an axis of [G, ., .] by it."""
    return (order.unsqueeze(-1) if dim == -2 else order.unsqueeze(-2)).expand(like.shape)


@dataclass
class _Part:
    """Second moments of what some rows of a weight were multiplied with, and inputs that are not in them."""

    rows: int
    hessian: Tensor
    """fp32 [G, K, K]."""
    count: int = 0
    calls: int = 0
    measured: list[Tensor] = field(default_factory=list)
    """fp32 [G, P, K] each."""


class _Statistics:
    """What one site read."""

    def __init__(self, decoded: Callable[[], Tensor], measured: int) -> None:
        self.decoded = decoded
        self.measured = measured
        self.parts: dict[int, _Part] = {}
        """By first row."""
        self.reason: str | None = None

    def add(self, call: Call, limit: int) -> None:
        """Take in a call, of which at most `limit` inputs."""
        if self.reason is not None:
            return
        if call.start not in self.parts:
            rows = weight_rows(call)
            n, k = rows.shape[0] * rows.shape[1], rows.shape[2]
            if not torch.equal(rows.reshape(n, k), self.decoded()[call.start : call.start + n].to(rows.dtype)):
                change = call.site.transform or "a cast, a cut or a copy"
                self.reason = f"kept: its op reads it behind {change}"
                return
            self.parts[call.start] = _Part(n, rows.new_zeros(rows.shape[0], k, k, dtype=torch.float32))
        part, x = self.parts[call.start], input_rows(call, limit)
        if x.shape[0] != part.hessian.shape[0]:
            self.reason = "kept: its op reads it in parts that overlap"
            return
        part.calls += 1
        held = x.shape[1] // HELD_OUT
        if not held and part.calls % HELD_OUT == 0:
            held = x.shape[1]
        if held:
            part.measured.append(x[:, -held:][:, :: -(-held // self.measured)].clone())
        x = x[:, : x.shape[1] - held]
        part.hessian.baddbmm_(x.mT, x)
        part.count += x.shape[1]

    def unusable(self, site: Site) -> str | None:
        """Why nothing can be learned from it, or None."""
        spans = sorted((start, start + part.rows) for start, part in self.parts.items())
        if self.reason is not None:
            return self.reason
        if any(start < end for (_, end), (start, _) in pairwise(spans)):
            return "kept: its op reads it in parts that overlap"
        least = min(part.count for part in self.parts.values())
        if least < max(site.rows[1] // LEAST, 2) or not all(part.measured for part in self.parts.values()):
            return (
                f"kept: found {least} inputs, expected {max(site.rows[1] // LEAST, HELD_OUT)} or more; give more data"
            )
        if not all(part.hessian.isfinite().all() for part in self.parts.values()):
            return "kept: its inputs are not finite, or too large for fp32"
        if not any(part.hessian.any() for part in self.parts.values()):
            return "kept: its inputs are all zero"
        return None

    def error(self, wanted: Tensor, found: Tensor) -> float:
        """Rows fp32 [N, K] twice -> ‖(found - wanted) · x‖² / ‖wanted · x‖² on the inputs kept for it."""
        noise = signal = 0.0
        for start, part in self.parts.items():
            rows, shape = slice(start, start + part.rows), (part.hessian.shape[0], -1)
            x = torch.cat(part.measured, 1)
            y = x @ torch.unflatten(wanted[rows], 0, shape).mT
            signal += y.square_().sum().item()
            y = x @ torch.unflatten(found[rows] - wanted[rows], 0, shape).mT
            noise += y.square_().sum().item()
        return noise / signal if signal else float(noise > 0)
