"""The compute ops on packed weights: linear, conv, conv_transpose, embedding.

The weight is `packed u8 [N, ceil(K/16)*8], scale u8 [N, ceil(K/16)], global_scale fp32 []`. Where `x_scale` is given,
`x` is the packed codes of a quantized activation, in blocks along all channels of one position (channels last), and
`dtype` what it decodes to; otherwise `x` is floating point and decides the compute dtype. The result is in `dtype`,
without one in x's.

The last arguments of linear, conv and conv_transpose say what follows the product:
`y = activation(channel_scale · (x · Wᵀ) + bias + residual)`, where `channel_scale` and `bias` are [N] of any float
dtype and `residual` is like y. Product and epilogue are then computed in fp32 and rounded once; a bare product with a
bias is the library's op in x's dtype, if that is y's. `compute` is the precision that a kernel may use, which the
bodies ignore. With `widen=False` the product alone stays in x's dtype, as where nothing follows it: bf16 libraries are
fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4fx import nvfp4
from fp4fx.ops.epilogue import check_epilogue, finish, is_plain, wide
from fp4fx.ops.library import Body, check_input, check_weight, define, in_format_of, undecoded
from fp4fx.policy import Compute
from fp4fx.site import Order

# --- linear -----------------------------------------------------------------------------------------------------------


@define(
    "(Tensor x, Tensor packed, Tensor scale, Tensor global_scale, Tensor? bias, SymInt in_features,"
    " Tensor? x_scale=None, Tensor? x_global_scale=None, ScalarType? dtype=None,"
    " Tensor? channel_scale=None, Tensor? residual=None, str activation='none', str compute='bf16') -> Tensor",
    decode=undecoded,
)
def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    x_scale: Tensor | None = None,
    x_global_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    channel_scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    compute: Compute = "bf16",
    *,
    decode: Body = nvfp4.dequantize_rows,
    widen: bool = True,
) -> Tensor:
    """x [..., K] fp, packed weight of N rows -> y [..., N] in `dtype`: y = x · Wᵀ + bias."""
    check_weight(packed, scale, global_scale, in_features)
    check_input(x, x_scale, dtype, in_features, -1)
    if x_scale is not None and x_global_scale is not None and dtype is not None:
        x = decode(x, x_scale, x_global_scale, in_features, dtype)
    result = x.dtype if dtype is None else dtype
    check_epilogue(residual, result, activation, compute)
    weight = decode(packed, scale, global_scale, in_features, x.dtype)
    if result == x.dtype and is_plain(result, bias, channel_scale, residual, activation):
        return F.linear(x, weight, bias)
    inner = wide(x.dtype) if widen else x.dtype
    product = F.linear(x.to(inner), weight.to(inner))
    return finish(product, x.dim() - 1, result, bias, channel_scale, residual, activation)


# --- convolutions -----------------------------------------------------------------------------------------------------


def _activation(
    x: Tensor,
    x_scale: Tensor | None,
    x_global_scale: Tensor | None,
    dtype: torch.dtype | None,
    channels: int,
    decode: Body,
) -> Tensor:
    """The activation of a convolution as [B, C, *spatial]; a quantized one arrives as rows [B, *spatial, C]."""
    check_input(x, x_scale, dtype, channels, 1)
    if x_scale is None or x_global_scale is None or dtype is None:
        return x
    decoded: Tensor = decode(x, x_scale, x_global_scale, channels, dtype)
    return decoded.contiguous().movedim(-1, 1)


def _weight(
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    shape: tuple[int, ...],
    x: Tensor,
    order: Order,
    groups: int,
    decode: Body,
) -> Tensor:
    """The dense weight in x's dtype and memory format: one in channels_last would make the library answer in it."""
    k = nvfp4.row_length(shape, order, groups)
    check_weight(packed, scale, global_scale, k)
    rows = decode(packed, scale, global_scale, k, x.dtype)
    return in_format_of(x, nvfp4.from_rows(rows, shape, order, groups))


@define(
    "(Tensor x, Tensor packed, Tensor scale, Tensor global_scale, Tensor? bias, SymInt in_channels, int[] kernel_size,"
    " SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups,"
    " Tensor? x_scale=None, Tensor? x_global_scale=None, ScalarType? dtype=None,"
    " Tensor? channel_scale=None, Tensor? residual=None, str activation='none', str compute='bf16') -> Tensor",
    decode=undecoded,
)
def conv(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_scale: Tensor | None = None,
    x_global_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    channel_scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    compute: Compute = "bf16",
    *,
    decode: Body = nvfp4.dequantize_rows,
    widen: bool = True,
) -> Tensor:
    """x [B, C, *spatial] fp, packed weight of N rows over (*kernel, C/groups) -> y [B, N, *spatial'], 1- to 3-D."""
    given, x = x, _activation(x, x_scale, x_global_scale, dtype, in_channels, decode)
    shape = (packed.shape[0], in_channels // groups, *kernel_size)
    weight = _weight(packed, scale, global_scale, shape, x, "conv", groups, decode)
    result = x.dtype if dtype is None else dtype
    check_epilogue(residual, result, activation, compute)
    geometry = (stride, padding, dilation, False, [0] * len(stride), groups)
    if result == x.dtype and is_plain(result, bias, channel_scale, residual, activation):
        return in_format_of(given, torch.convolution(x, weight, bias, *geometry))
    inner = wide(x.dtype) if widen else x.dtype
    product = torch.convolution(x.to(inner), weight.to(inner), None, *geometry)
    return in_format_of(given, finish(product, 1, result, bias, channel_scale, residual, activation))


@define(
    "(Tensor x, Tensor packed, Tensor scale, Tensor global_scale, Tensor? bias, SymInt in_channels, int[] kernel_size,"
    " SymInt[] stride, SymInt[] padding, SymInt[] output_padding, SymInt[] dilation, SymInt groups,"
    " Tensor? x_scale=None, Tensor? x_global_scale=None, ScalarType? dtype=None,"
    " Tensor? channel_scale=None, Tensor? residual=None, str activation='none', str compute='bf16') -> Tensor",
    decode=undecoded,
)
def conv_transpose(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_scale: Tensor | None = None,
    x_global_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    channel_scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    compute: Compute = "bf16",
    *,
    decode: Body = nvfp4.dequantize_rows,
    widen: bool = True,
) -> Tensor:
    """x [B, C, *spatial] fp, packed weight of N rows over (*kernel, C/groups) -> y [B, N, *spatial'], transposed."""
    given, x = x, _activation(x, x_scale, x_global_scale, dtype, in_channels, decode)
    shape = (in_channels, packed.shape[0] // groups, *kernel_size)
    weight = _weight(packed, scale, global_scale, shape, x, "conv_transpose", groups, decode)
    result = x.dtype if dtype is None else dtype
    check_epilogue(residual, result, activation, compute)
    geometry = (stride, padding, dilation, True, output_padding, groups)
    if result == x.dtype and is_plain(result, bias, channel_scale, residual, activation):
        return in_format_of(given, torch.convolution(x, weight, bias, *geometry))
    inner = wide(x.dtype) if widen else x.dtype
    product = torch.convolution(x.to(inner), weight.to(inner), None, *geometry)
    return in_format_of(given, finish(product, 1, result, bias, channel_scale, residual, activation))


# --- embedding --------------------------------------------------------------------------------------------------------


@define(
    "(Tensor indices, Tensor packed, Tensor scale, Tensor global_scale, SymInt embedding_dim, ScalarType dtype)"
    " -> Tensor",
    decode=undecoded,
)
def embedding(
    indices: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    embedding_dim: int,
    dtype: torch.dtype,
    *,
    decode: Body = nvfp4.dequantize_rows,
) -> Tensor:
    """Indices int [...], packed table of V rows -> rows [..., D] of dtype; only the gathered rows are decoded."""
    check_weight(packed, scale, global_scale, embedding_dim)
    torch._check(indices.dtype in (torch.int32, torch.int64), lambda: f"indices must be integers, are {indices.dtype}")
    codes, scales = F.embedding(indices, packed), F.embedding(indices, scale)
    rows: Tensor = decode(codes, scales, global_scale, embedding_dim, dtype)
    return rows
