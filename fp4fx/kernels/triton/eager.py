"""Eager mode on CUDA: the codec's ops by the kernels, with the same bits.

Triton is imported by the first call; where it does not run, the ops' own bodies do, and the log says why. Those of
linear and convolutions stay on any device: kernels compute in less than fp32.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from fp4fx import nvfp4, ops
from fp4fx.kernels import triton
from fp4fx.ops.library import LIBRARY, Body
from fp4fx.scales import searched
from fp4fx.site import Order
from fp4fx.target import target_of

log = logging.getLogger(__name__)


@functools.cache
def _runs_on(device: torch.device) -> bool:
    reason = triton.missing(target_of(device))
    if reason is not None:
        log.info("no kernels on %s in eager mode: %s", device, reason)
    return reason is None


def _takes(rows: Tensor, scale_rule: str) -> bool:
    """Whether the kernel encodes these rows."""
    if not _runs_on(rows.device):
        return False
    from fp4fx.kernels.triton import quantize  # noqa: PLC0415  (which imports Triton)

    return quantize.refuse_quantize(searched(scale_rule)) is None and rows.shape[-1] <= quantize.LONGEST


def quantize(
    x: Tensor, scale_rule: str, block_rows: int, order: Order, groups: int, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A tensor on CUDA by the kernel, see `encoding`; it does not weight errors."""
    if importance is not None or not _takes(nvfp4.to_rows(x, order, groups), scale_rule):
        return None
    parts: tuple[Tensor, Tensor, Tensor] = BODIES["quantize"](x, None, order, groups, scale_rule, block_rows)
    return parts


def encode(
    rows: Tensor, global_scale: Tensor | None = None, *, scale_rule: str = "max", block_rows: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """As `nvfp4.quantize_rows`, which also has the words for what cannot be."""
    if _takes(rows, scale_rule):
        from fp4fx.kernels.triton import quantize  # noqa: PLC0415

        return quantize.quantize(rows, global_scale, "rows", 1, scale_rule, block_rows)
    return nvfp4.quantize_rows(rows, global_scale, scale_rule=scale_rule, block_rows=block_rows)


def decode(packed: Tensor, scale: Tensor, global_scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """As `nvfp4.dequantize_rows`."""
    if _runs_on(packed.device):
        from fp4fx.kernels.triton import dequantize, quantize  # noqa: PLC0415

        if dtype in dequantize.DTYPES and k <= quantize.LONGEST:
            return dequantize.dequantize(packed, scale, global_scale, (*packed.shape[:-1], k), dtype)
    return nvfp4.dequantize_rows(packed, scale, global_scale, k, dtype)


BODIES: dict[str, Body] = {
    "quantize": functools.partial(ops.quantize, encode=encode, decode=decode),
    "fake_quantize": functools.partial(ops.fake_quantize, encode=encode, decode=decode),
    "dequantize": functools.partial(ops.dequantize, decode=decode),
    "embedding": functools.partial(ops.embedding, decode=decode),
}
"""The ops' bodies around the kernels."""


def register() -> None:
    """Let the ops run so on CUDA; once."""
    for name, body in BODIES.items():
        LIBRARY.impl(name, body, "CUDA")
