"""GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022).

Columns are rounded one after another, and what is left of each error is made up for by the columns to come, as the
inputs' second moments H = XᵀX say. With E the errors and H = R Rᵀ, R upper triangular, the output's squared error is
‖E R‖², whose column k is R_kk (E_k + Σ_{j<k} E_j R_jk / R_kk): so column k of the weight is rounded with that sum added
to it. These are the codes that GPTQ finds with H⁻¹ (proof: Chee et al., "QuIP: 2-Bit Quantization of Large Language
Models With Guarantees", 2023), without an inverse: R takes the place of H's upper triangle. Scales stand before any
column is rounded, by search for the least error weighted by H's diagonal, so that the order of columns is free.
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
    """So many columns are factored at a time, and read what was rounded ahead of them at once."""
    act_order: bool = False
    """Round the columns with the largest inputs first."""
    samples: int = 65536
    """At most so many inputs (tokens, pixels) of a layer are taken, evenly spaced over all batches."""
    memory: int | None = None
    """Bytes for Hessians: sites are dealt with in groups whose Hessians fit; a quarter of the dense model if None."""

    def passes(self, batches: Batches | None) -> int:
        """Several: one to see the order of the sites, and one per group."""
        return several(self.name, batches)

    def run(self, job: Job) -> None:
        """Group by group: a forward of all batches up to the group's last site, then its weights."""
        for site, statistics in each_site(job, self, self.samples, self.memory):
            round_site(job, self, site, statistics, self._solve)

    def _solve(self, weight: Tensor, hessian: Tensor, scale: Tensor) -> Tensor | str:
        """Weight fp32 [G, R, K], H fp32 [G, K, K], scale fp32 [G, R, ceil(K/16)] -> codes u8 [G, R, K].

        Or why not. H is overwritten. A column whose inputs are all zero is rounded to nearest and takes no part.
        """
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        order = torch.arange(weight.shape[-1], device=weight.device).expand(diagonal.shape)
        if self.act_order:
            order = diagonal.argsort(dim=-1, descending=True, stable=True)
            hessian = hessian.gather(-2, _along(order, hessian, -2)).gather(-1, _along(order, hessian, -1))
        tiles = self._factor(hessian)
        if tiles is None:
            return "its Hessian has no Cholesky factor, even with more damping"
        columns = weight.mT.gather(-2, _along(order, weight.mT, -2))  # [G, K, R]: a column is contiguous
        codes = torch.empty_like(columns, dtype=torch.uint8)
        for start, tile in tiles:
            stop = start + tile.shape[-1]
            here = columns[:, start:stop]  # the columns as they are; the errors, once they are rounded
            wanted = hessian[:, :start, start:stop].mT @ columns[:, :start]
            wanted = here + wanted / tile.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            parts = (tile / tile.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)).mT.contiguous()
            steps = scale.mT.gather(-2, _along(order[:, start:stop] // nvfp4.BLOCK, here, -2))
            for j in range(stop - start):
                column = torch.baddbmm(wanted[:, j : j + 1], parts[:, j : j + 1, :j], here[:, :j]).squeeze(1)
                code = nvfp4.encode_e2m1(column / steps[:, j])
                codes[:, start + j] = code
                here[:, j] -= nvfp4.decode_e2m1(code) * steps[:, j]
        unordered: Tensor = torch.empty_like(codes).scatter_(-2, _along(order, codes, -2), codes)
        return unordered.mT

    def _factor(self, hessian: Tensor) -> list[tuple[int, Tensor]] | None:
        """H fp32 [G, K, K] -> R of H = R Rᵀ, damped, or None.

        What is returned are R's tiles fp32 [G, block, block] on the diagonal, each with its first column; those above
        take the place of H's, whose tiles on and below the diagonal stay, so that more damping can begin anew.
        """
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean(-1, keepdim=True)
        dead = (diagonal == 0).float()
        spans = [(start, start + self.block) for start in range(0, hessian.shape[-1], self.block)]
        for damping in (self.damping, 10 * self.damping, 100 * self.damping):
            tiles: list[tuple[int, Tensor]] = []
            for start, stop in reversed(spans):
                above = hessian[:, :start, start:stop].copy_(hessian[:, start:stop, :start].mT)
                tile = hessian[:, start:stop, start:stop].clone()
                tile.diagonal(dim1=-2, dim2=-1).add_((damping * mean + dead)[:, start:stop])
                right = hessian[:, start:stop, stop:].mT
                above -= hessian[:, :start, stop:] @ right
                tile -= hessian[:, start:stop, stop:] @ right
                tile, failed = torch.linalg.cholesky_ex(tile.flip(-2, -1))
                tile = tile.flip(-2, -1)
                if failed.any() or not tile.isfinite().all():
                    break
                above.copy_(torch.linalg.solve_triangular(tile.mT, above, upper=False, left=False))
                tiles.insert(0, (start, tile))
            else:
                return tiles
        return None


def _along(order: Tensor, like: Tensor, dim: int) -> Tensor:
    """int64 [G, K] -> the index that permutes an axis of [G, ., .] by it."""
    return (order.unsqueeze(-1) if dim == -2 else order.unsqueeze(-2)).expand(like.shape)
