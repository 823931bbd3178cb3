"""What the ops of a site read, as second moments of its columns; and rounding a weight by them.

One batch in eight is kept out of the moments, to measure with: of several roundings the best on what none of them has
seen is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from fp4fx import nvfp4
from fp4fx.calibration.data import Enough, forward, give_memory_back
from fp4fx.calibration.inputs import input_rows, weight_rows
from fp4fx.calibration.job import Job, Method
from fp4fx.observe import Call, observe
from fp4fx.site import Site

HELD_OUT = 8
"""One batch in so many is kept from the Hessian, one at least; with fewer than `FEW` batches the end of each call."""
FEW = 4
MEASURED = 512
"""At most so many of them are kept."""
LEAST = 4
"""A Hessian of K columns wants K / LEAST inputs at least."""

GAIN = 0.02
"""The part of the measured error that is to go, if a weight is to be changed: less may be chance."""

Solve = Callable[[Tensor, Tensor, Tensor], Tensor | str]
"""Weight fp32 [G, R, K], H fp32 [G, K, K], scale fp32 [G, R, ceil(K/16)] -> codes u8 [G, R, K], or why not.

H may be overwritten."""


def each_site(
    job: Job, method: Method, samples: int, memory: int | None, sites: Sequence[Site] | None = None
) -> Iterator[tuple[Site, Statistics]]:
    """The pending sites in execution order, each with what it reads, the ones ahead of its group being done by then.

    A site that nothing can be learned about is recorded with the reason, and left out.

    Args:
        job: What is calibrated.
        method: Whose pending sites.
        samples: At most so many inputs of a site are taken, evenly spaced over all batches.
        memory: Bytes for the statistics of a group; a quarter of the dense model if None.
        sites: Some of the pending ones; all if None.
    """
    sites = job.pending(method) if sites is None else sites
    memory = sum(p.nbytes for p in job.reference.parameters()) // 4 if memory is None else memory
    with tqdm(total=len(sites), desc=method.name, unit="site", disable=None, leave=False) as bar:
        for group in _groups(job.in_order(sites), memory):
            found = _observed(job, group, samples)
            for site in group:
                statistics, reason = found.pop(site.parameter, None), job.unfit(site)
                if reason is None:
                    reason = "kept: never reached by the data" if statistics is None else statistics.unusable(site)
                if statistics is None or reason is not None:
                    job.record(method, site, reason or "")
                else:
                    yield site, statistics
                give_memory_back()
                bar.update()


def _groups(sites: Sequence[Site], memory: int) -> Iterator[list[Site]]:
    """As many sites at a time as the memory allows; one at least."""
    group: list[Site] = []
    used = 0
    for site in sites:
        k = site.rows[1]
        matrices = site.groups if site.op.startswith("conv") else math.prod(site.shape[:-2])
        need = matrices * k * (k + MEASURED) * 4
        if group and used + need > memory:
            yield group
            group, used = [], 0
        group.append(site)
        used += need
    if group:
        yield group


def held_out(count: int) -> range:
    """The numbers of the batches to measure with, evenly spaced; none of fewer than `FEW`."""
    return range(HELD_OUT // 2 if count >= HELD_OUT else FEW // 2, count, HELD_OUT) if count >= FEW else range(0)


def _observed(job: Job, group: Sequence[Site], samples: int) -> dict[str, Statistics]:
    """What every site of the group read in all batches, in the model as it is now."""
    found: dict[str, Statistics] = {}
    wanted = [site for site in group if job.unfit(site) is None]
    last = wanted[-1].parameter if wanted else None
    share = -(-samples // job.batches.count)
    calls_of_last = number = 0
    held = held_out(job.batches.count)

    def seen(call: Call) -> None:
        nonlocal calls_of_last
        name = call.site.parameter
        if name not in found:
            found[name] = Statistics(partial(job.decoded, call.site), -(-MEASURED // max(len(held), 1)))
        found[name].add(call, share, held_out=None if not held else number in held)
        calls_of_last += name == last
        if name == last and calls_of_last == job.calls.get(name):
            raise Enough

    with observe(job.model, wanted, seen):
        for number, batch in enumerate(job.batches if wanted else ()):
            calls_of_last = 0
            forward(job.model, batch, f"batch {number}")
    return found


@torch.no_grad()
def round_site(job: Job, method: Method, site: Site, statistics: Statistics, solve: Solve) -> None:
    """Write the best of the weight as it is, its nearest values with searched scales, and the codes of `solve`."""
    dense, k = job.weight(site), site.rows[1]
    before = statistics.error(dense, job.decoded(site))
    q = job.encoded(site, dense, statistics.importance(len(dense)))
    packed, scales = (t.reshape(len(dense), -1) for t in (q.packed, q.scale))
    codes, steps = nvfp4.unpack(packed), nvfp4.decode_e4m3(scales) * q.global_scale
    for start, part in statistics.parts.items():
        rows = slice(start, start + part.rows)
        hessian = part.take()
        weight, its = (torch.unflatten(t[rows], 0, (len(hessian), -1)) for t in (dense, steps))
        solved = solve(weight, hessian, its)
        if isinstance(solved, str):
            job.record(method, site, f"kept: {solved}", before)
            return
        codes[rows, :k] = solved.flatten(0, 1)
        del hessian, solved
    learned = nvfp4.pack(codes)
    (plain, its_g), (after, g) = (
        statistics.unbiased(dense, found, scales, q.global_scale) for found in (packed, learned)
    )
    if min(plain, after) > (1 - GAIN) * before:
        job.record(
            method, site, f"kept: {method.name} has an error of {after:.2e}, rounding one of {plain:.2e}", before
        )
        return
    if after < plain:
        job.write(site, learned, q.scale, g)
    else:
        job.write(site, packed, q.scale, its_g)
    reason = (
        f"codes of {method.name}" if after < plain else f"nearest values: {method.name} has an error of {after:.2e}"
    )
    job.record(method, site, reason, before, min(plain, after), changed=True)


@dataclass
class Part:
    """Second moments of what some rows of a weight were multiplied with, and inputs that are not in them."""

    rows: int
    hessian: Tensor
    """fp32 [G, K, K]."""
    count: int = 0
    measured: list[Tensor] = field(default_factory=list)
    """fp32 [G, P, K] each."""

    def take(self) -> Tensor:
        """The Hessian, which is gone by then: it is the largest thing there is."""
        hessian, self.hessian = self.hessian, self.hessian.new_empty(0)
        return hessian


class Statistics:
    """What one site read."""

    def __init__(self, decoded: Callable[[], Tensor], measured: int) -> None:
        self.decoded = decoded
        self.measured = measured
        self.parts: dict[int, Part] = {}
        """By first row."""
        self.reason: str | None = None

    def add(self, call: Call, limit: int, *, held_out: bool | None) -> None:
        """Take in a call, of which at most `limit` inputs: to measure with, not to, or (None) the last of them."""
        if self.reason is not None:
            return
        if call.start not in self.parts:
            rows = weight_rows(call)
            n, k = rows.shape[0] * rows.shape[1], rows.shape[2]
            if not torch.equal(rows.reshape(n, k), self.decoded()[call.start : call.start + n].to(rows.dtype)):
                change = call.site.transform or "a cast, a cut or a copy"
                self.reason = f"kept: its op reads it behind {change}"
                return
            self.parts[call.start] = Part(n, rows.new_zeros(rows.shape[0], k, k, dtype=torch.float32))
        part, x = self.parts[call.start], input_rows(call, limit)
        if x.shape[0] != part.hessian.shape[0]:
            self.reason = "kept: its op reads it in parts that overlap"
            return
        held = min(-(-x.shape[1] // HELD_OUT), x.shape[1] - 1) if held_out is None else held_out * x.shape[1]
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
        if not all(bound.isfinite().all() for part in self.parts.values() for bound in part.hessian.aminmax()):
            return "kept: its inputs are not finite, or too large for fp32"
        if not any(part.hessian.any() for part in self.parts.values()):
            return "kept: its inputs are all zero"
        return None

    def importance(self, rows: int) -> Tensor | None:
        """The mean square of every column's inputs fp32 [G, K]; None unless the parts are all rows in equal groups."""
        parts = [part for _, part in sorted(self.parts.items())]
        sizes = {part.rows // len(part.hessian) for part in parts}
        if len(sizes) > 1 or sum(part.rows for part in parts) < rows:
            return None
        return torch.cat([part.hessian.diagonal(dim1=-2, dim2=-1) / part.count for part in parts])

    def error(self, wanted: Tensor, found: Tensor) -> float:
        """Rows fp32 [N, K] twice -> ‖(found - wanted) · x‖² / ‖wanted · x‖² on the inputs kept for it."""
        return _error(*self._products(wanted, found))

    def unbiased(self, wanted: Tensor, packed: Tensor, scales: Tensor, global_scale: Tensor) -> tuple[float, Tensor]:
        """Codes of the rows wanted -> g fp32 [] with which outputs are as large as wanted, behind their error then.

        Least squares shrink: without that factor every layer takes a little off what goes on to the next.
        """
        found = nvfp4.dequantize_rows(packed, scales, global_scale, wanted.shape[1], torch.float32)
        signal, along, power = self._products(wanted, found)
        factor = signal / along if along > 0 and 0.5 <= signal / along <= 2 else 1.0
        return _error(signal, factor * along, factor**2 * power), global_scale * factor

    def _products(self, wanted: Tensor, found: Tensor) -> tuple[float, float, float]:
        """‖y‖², <y, z> and ‖z‖² of the outputs y and z of two weights fp32 [N, K]."""
        sums = [0.0, 0.0, 0.0]
        for start, part in self.parts.items():
            x = torch.cat(part.measured, 1)
            rows, shape = slice(start, start + part.rows), (len(x), -1)
            y, z = ((x @ torch.unflatten(t[rows], 0, shape).mT).double() for t in (wanted, found))
            for i, (a, b) in enumerate(((y, y), (y, z), (z, z))):
                sums[i] += float((a * b).sum())
        return sums[0], sums[1], sums[2]


def _error(signal: float, along: float, power: float) -> float:
    """‖z - y‖² / ‖y‖² from ‖y‖², <y, z> and ‖z‖²."""
    return (signal - 2 * along + power) / signal if signal else float(power > 0)
