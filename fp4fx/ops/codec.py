"""The codec as ops: quantize, dequantize and their straight-through composition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4fx import nvfp4
from fp4fx.ops.library import blocks, check_weight, define
from fp4fx.site import Order


def _quantize_fake(
    x: Tensor,
    global_scale: Tensor | None = None,
    order: Order = "rows",
    groups: int = 1,
    scale_rule: str = "max",
    block_rows: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x.is_floating_point(), lambda: f"x must be floating point, is {x.dtype}")
    *lead, k = nvfp4.to_rows(x, order, groups).shape
    packed, scale = (x.new_empty((*lead, n * blocks(k)), dtype=torch.uint8) for n in (8, 1))
    return packed, scale, x.new_empty((), dtype=torch.float32)


@define(
    "(Tensor x, Tensor? global_scale=None, str order='rows', SymInt groups=1, str scale_rule='max', int block_rows=1)"
    " -> (Tensor packed, Tensor scale, Tensor global_scale)",
    fake=_quantize_fake,
)
def quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    order: Order = "rows",
    groups: int = 1,
    scale_rule: str = "max",
    block_rows: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """x fp -> packed u8 [..., ceil(K/16)*8], scale u8 [..., ceil(K/16)], global_scale fp32 [] (None: dynamic)."""
    rows = nvfp4.to_rows(x, order, groups)
    packed, scale, chosen = nvfp4.quantize_rows(rows, global_scale, scale_rule=scale_rule, block_rows=block_rows)
    return packed, scale, chosen if global_scale is None else chosen.clone()


def _dequantize_fake(
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    order: Order = "rows",
    groups: int = 1,
) -> Tensor:
    like = packed.new_empty(tuple(shape), dtype=dtype)
    rows = nvfp4.to_rows(like, order, groups)
    check_weight(packed, scale, global_scale, rows.shape[-1])
    return nvfp4.from_rows(packed.new_empty(rows.shape, dtype=dtype), tuple(shape), order, groups)


@define(
    "(Tensor packed, Tensor scale, Tensor global_scale, SymInt[] shape, ScalarType dtype, str order='rows',"
    " SymInt groups=1) -> Tensor",
    fake=_dequantize_fake,
)
def dequantize(
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    order: Order = "rows",
    groups: int = 1,
) -> Tensor:
    """Packed rows -> the tensor of the given shape and dtype: code · scale · global_scale in fp32, then cast."""
    k = nvfp4.row_length(tuple(shape), order, groups)
    rows = nvfp4.dequantize_rows(packed, scale, global_scale, k, dtype)
    return nvfp4.from_rows(rows, tuple(shape), order, groups)


@define(
    "(Tensor x, Tensor? global_scale=None, str order='rows', SymInt groups=1, str scale_rule='max', int block_rows=1)"
    " -> Tensor",
    fake=lambda x, *_, **__: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def fake_quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    order: Order = "rows",
    groups: int = 1,
    scale_rule: str = "max",
    block_rows: int = 1,
) -> Tensor:
    """x fp -> what dequantize(quantize(x)) gives: same shape and dtype, contiguous, gradient straight through."""
    q = quantize(x, global_scale, order, groups, scale_rule, block_rows)
    dense: Tensor = dequantize(*q, x.shape, x.dtype, order, groups)
    return dense.contiguous()
