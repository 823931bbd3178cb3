"""The codec as ops: quantize, dequantize and their straight-through composition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4fx import nvfp4
from fp4fx.balance import balanced
from fp4fx.ops.library import Body, check_weight, define, in_format_of, undecoded, unencoded
from fp4fx.policy import Compute
from fp4fx.scales import UNBIASED, searched
from fp4fx.site import Order


@define(
    "(Tensor x, Tensor? global_scale=None, str order='rows', SymInt groups=1, str scale_rule='max', int block_rows=1)"
    " -> (Tensor packed, Tensor scale, Tensor global_scale)",
    encode=unencoded,
    decode=undecoded,
    balance=lambda rows, packed, *_: torch.empty_like(packed),
)
def quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    order: Order = "rows",
    groups: int = 1,
    scale_rule: str = "max",
    block_rows: int = 1,
    *,
    encode: Body = nvfp4.quantize_rows,
    decode: Body = nvfp4.dequantize_rows,
    balance: Body = balanced,
) -> tuple[Tensor, Tensor, Tensor]:
    """x fp -> packed u8 [..., ceil(K/16)*8], scale u8 [..., ceil(K/16)], global_scale fp32 [] (None: dynamic)."""
    torch._check(x.is_floating_point(), lambda: f"x must be floating point, is {x.dtype}")
    rows = nvfp4.to_rows(x, order, groups)
    packed, scale, used = encode(rows, global_scale, scale_rule=searched(scale_rule), block_rows=block_rows)
    if scale_rule == UNBIASED and global_scale is None:
        taps = nvfp4.taps(x.shape, order)
        packed, used = nvfp4.unbiased(rows, packed, scale, used, taps, decode=decode, balance=balance)
    return packed, scale, used if global_scale is None else used.clone()


@define(
    "(Tensor packed, Tensor scale, Tensor global_scale, SymInt[] shape, ScalarType dtype, str order='rows',"
    " SymInt groups=1, str compute='bf16') -> Tensor",
    decode=undecoded,
)
def dequantize(
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    order: Order = "rows",
    groups: int = 1,
    compute: Compute = "bf16",
    *,
    decode: Body = nvfp4.dequantize_rows,
) -> Tensor:
    """Packed rows -> a contiguous tensor of the shape and dtype: code · scale · global_scale in fp32, then cast.

    `compute` is a message to the op that reads the result, which a compiler may fuse with this one.
    """
    k = nvfp4.row_length(tuple(shape), order, groups)
    check_weight(packed, scale, global_scale, k)
    rows = decode(packed, scale, global_scale, k, dtype)
    return nvfp4.from_rows(rows, tuple(shape), order, groups).contiguous()


@define(
    "(Tensor x, Tensor? global_scale=None, str order='rows', SymInt groups=1, str scale_rule='max', int block_rows=1,"
    " str compute='bf16') -> Tensor",
    encode=unencoded,
    decode=undecoded,
)
def fake_quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    order: Order = "rows",
    groups: int = 1,
    scale_rule: str = "max",
    block_rows: int = 1,
    compute: Compute = "bf16",
    *,
    encode: Body = nvfp4.quantize_rows,
    decode: Body = nvfp4.dequantize_rows,
) -> Tensor:
    """x fp -> what dequantize(quantize(x)) gives, in x's memory format; the gradient passes straight through.

    `compute` is dequantize's.
    """
    q = quantize(x, global_scale, order, groups, scale_rule, block_rows, encode=encode, decode=decode)
    dense: Tensor = dequantize(*q, x.shape, x.dtype, order, groups, decode=decode)
    return in_format_of(x, dense)
