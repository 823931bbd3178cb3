"""GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022).

Columns are rounded one after another, and what is left of each error is made up for by the columns to come, as the
inputs' second moments H = XᵀX say: with U the upper Cholesky factor of H⁻¹, column j's error divided by U_jj is taken
off column k U_jk times. Scales stand before any column is rounded, by search for the least error weighted by H's
diagonal, so that the order of columns is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fp4fx import nvfp4
from fp4fx.calibration.data import Batches, several
from fp4fx.calibration.hessians import each_site, round_site
from fp4fx.calibration.job import Job


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
    """Bytes for Hessians: sites are dealt with in groups whose Hessians fit; a third of the dense model if None."""

    def passes(self, batches: Batches | None) -> int:
        """Several: one to see the order of the sites, and one per group."""
        return several(self.name, batches)

    def run(self, job: Job) -> None:
        """Group by group: a forward of all batches up to the group's last site, then its weights."""
        for site, statistics in each_site(job, self, self.samples, self.memory):
            round_site(job, self, site, statistics, self._solve)

    def _solve(self, weight: Tensor, hessian: Tensor, scale: Tensor) -> Tensor | str:
        """Weight fp32 [G, R, K], H fp32 [G, K, K], scale fp32 [G, R, ceil(K/16)] -> codes u8 [G, R, K].

        Or why not. A column whose inputs are all zero is rounded to nearest and takes no part.
        """
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        order = torch.arange(weight.shape[-1], device=weight.device).expand(diagonal.shape)
        if self.act_order:
            order = diagonal.argsort(dim=-1, descending=True, stable=True)
            hessian = hessian.gather(-2, _along(order, hessian, -2)).gather(-1, _along(order, hessian, -1))
        factor = self._factor(hessian)
        if factor is None:
            return "its Hessian has no Cholesky factor, even with more damping"
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
            damped = hessian.clone()
            damped.diagonal(dim1=-2, dim2=-1).add_(damping * mean + dead)
            damped, failed = torch.linalg.cholesky_ex(damped)
            if failed.any():
                continue
            damped = torch.cholesky_inverse(damped)
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(damped, upper=True)
            if not failed.any() and upper.isfinite().all():
                return upper
        return None


def _along(order: Tensor, like: Tensor, dim: int) -> Tensor:
    """int64 [G, K] -> the index that permutes an axis of [G, ., .] by it."""
    return (order.unsqueeze(-1) if dim == -2 else order.unsqueeze(-2)).expand(like.shape)
