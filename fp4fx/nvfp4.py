"""NVFP4: the definition of every bit, in plain PyTorch.

An element is E2M1 (magnitudes 0 .5 1 1.5 2 3 4 6; code = sign<<3 | index). 16 consecutive values along the reduction
axis K share one E4M3 scale `s`, the tensor has one fp32 global scale `g`, and a value is `code * (s * g)` in fp32.

All of it traces (FakeTensor, make_fx, Inductor, dynamic shapes) and gives the same bits compiled as in eager mode:
scales are uint8 and become numbers by integer arithmetic (no float8 dtype), nothing branches on data, and no tensor
outlives a call.

Corner cases, decided once:

* A zero block stores s = 1; a tensor without a nonzero finite value stores g = 1. Finite input never gives a scale byte
  that is 0 or NaN.
* amax, of a block and of the tensor, is taken over finite values. ±Inf saturates to ±6 in its own block. A NaN makes
  the scale of its own block NaN (0x7F, all codes 0), so that exactly that block decodes to NaN.
* A negative value that rounds to zero keeps its sign (code 8, decodes to -0.0); an exact -0.0 is code 0. As ModelOpt.
* g is never below 2**-126, the smallest normal fp32: a tensor with amax < 3.2e-35 uses lower block scales instead.
* A global scale that is given is used as it is: block scales stop at 448, values at ±6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4fx.errors import LayoutError, NonFiniteWeightError, PolicyError
from fp4fx.site import Order

BLOCK = 16
ORDERS: tuple[Order, ...] = get_args(Order)
E2M1_MAX, E4M3_MAX, E4M3_MIN = 6.0, 448.0, 2.0**-9  # the smallest subnormal
E4M3_NAN = 0x7F
SEARCH = range(-3, 8)  # scale codes that "search" tries, from that of "max"
LARGEST_SCALE = {"max": E4M3_MAX, "search": 256.0}  # of the block that holds the tensor's amax: "search" goes above it
GLOBAL_SCALE_MIN = 2.0**-126
CHUNK = 1 << 20  # values worked on at a time in eager mode: temporaries stay in cache and bounded


@dataclass(frozen=True, eq=False)
class NVFP4:
    """A tensor in NVFP4: the bytes of its rows, and what `dequantize` needs to give the tensor back."""

    packed: Tensor
    """u8 [..., ceil(K/16)*8], two codes per byte, the even index in the low nibble."""
    scale: Tensor
    """u8 [..., ceil(K/16)], the bits of E4M3."""
    global_scale: Tensor
    """fp32 []."""
    shape: torch.Size
    dtype: torch.dtype
    order: Order = "rows"
    groups: int = 1


def row_length(shape: torch.Size | tuple[int, ...], order: Order, groups: int = 1) -> int:
    """K, the length of the rows that `to_rows` makes of a tensor of this shape.

    Raises:
        LayoutError: unknown order, too few dimensions, groups that do not divide, or K = 0.
    """
    if order not in ORDERS:
        raise LayoutError(f"unknown order {order!r}; expected one of {', '.join(ORDERS)}")
    rank = 1 if order == "rows" else 2
    if len(shape) < rank:
        raise LayoutError(f"order {order!r} needs {rank} dimension(s) or more, found shape {tuple(shape)}")
    grouped = {"rows": 1, "columns": 1, "channels": shape[-1 if rank == 1 else 1]}.get(order, shape[0])
    if groups < 1 or grouped % groups:
        what = "has no groups" if grouped == 1 else f"splits a dimension of size {grouped} into groups"
        raise LayoutError(f"order {order!r} {what}: groups={groups} does not fit shape {tuple(shape)}")
    if order == "conv":
        k = math.prod(shape[1:])
    elif order == "conv_transpose":
        k = shape[0] // groups * math.prod(shape[2:])
    else:
        k = shape[{"rows": -1, "columns": -2, "channels": 1}[order]] // groups
    if k == 0:
        raise LayoutError(f"shape {tuple(shape)} has no values along its reduction axis; leave this tensor as it is")
    return k


def to_rows(x: Tensor, order: Order, groups: int = 1) -> Tensor:
    """Tensor, any shape and dtype -> rows [..., K], K being the axis that the op reduces over (a view where possible).

    * "rows": as it is (linear, embedding, or an activation whose last axis is reduced).
    * "columns": [..., K, N] -> [..., N, K] (the right factor of a product `x @ w`, or a stack of them).
    * "channels": [B, C, *s] -> [B, *s, C], with groups [B, *s, g, C/g] (the input of a convolution).
    * "conv": [N, C/g, *k] -> [N, (*k, C/g)].
    * "conv_transpose": [C, N/g, *k] -> [N, (*k, C/g)].

    Raises:
        LayoutError: see `row_length`.
    """
    k = row_length(x.shape, order, groups)
    if order == "rows":
        return x
    if order == "columns":
        return x.transpose(-1, -2)
    if order == "channels":
        return x.movedim(1, -1) if groups == 1 else torch.unflatten(x.movedim(1, -1), -1, (groups, k))
    if order == "conv":
        return x.movedim(1, -1).reshape(x.shape[0], k)
    return torch.unflatten(x, 0, (groups, -1)).movedim(1, -1).reshape(groups * x.shape[1], k)


def from_rows(rows: Tensor, shape: torch.Size | tuple[int, ...], order: Order, groups: int = 1) -> Tensor:
    """Rows [..., K] -> tensor of `shape`, any dtype: the inverse of `to_rows`."""
    row_length(shape, order, groups)
    if order == "rows":
        return rows.reshape(shape)
    if order == "columns":
        return rows.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if order == "conv_transpose":
        rows = rows.reshape(groups, shape[1], *shape[2:], shape[0] // groups).movedim(-1, 1)
        return rows.reshape(shape)
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def encode_e2m1(x: Tensor) -> Tensor:
    """Values float [...] -> codes u8 [...]: nearest, ties to the even code, saturating at 6; NaN gives 0.

    The index of a magnitude is the least of the three lines 2a, a + 2 and a/2 + 4, each rounded half to even.
    """
    a = x.abs().nan_to_num(0.0)
    index = torch.minimum(torch.minimum((a * 2).round(), a.round() + 2), (a * 0.5).round() + 4).clamp(max=7)
    return (index + (x < 0) * 8.0).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Codes u8 [...] (bits 0 to 3) -> values fp32 [...]: the magnitude is the greatest of i/2, i - 2 and 2i - 8."""
    i = (codes & 7).float()
    magnitude = torch.maximum(torch.maximum(i * 0.5, i - 2), i * 2 - 8)
    return torch.where((codes & 8) == 0, magnitude, -magnitude)


def encode_e4m3(x: Tensor) -> Tensor:
    """Values fp32 [...] -> E4M3FN bits u8 [...]: nearest, ties to even, saturating at 448; NaN gives 0x7F or 0xFF."""
    bits = x.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    capped = magnitude.clamp(max=0x43E00000)  # 448
    normal = ((capped + 0x7FFFF + ((capped >> 20) & 1)) >> 20) - (120 << 3)
    # At 2**14 the spacing of fp32 is 2**-9, that of subnormal E4M3: the addition rounds, the low bits are the answer.
    subnormal = (capped.view(torch.float32) + 2.0**14).view(torch.int32) - (141 << 23)
    byte = torch.where(capped < (121 << 23), subnormal, normal)  # 2**-6
    byte = torch.where(magnitude > 0x7F800000, E4M3_NAN, byte)
    return (byte | ((bits >> 24) & 0x80)).to(torch.uint8)


def decode_e4m3(scale: Tensor) -> Tensor:
    """E4M3FN bits u8 [...] -> values fp32 [...]."""
    bits = scale.int()
    magnitude = bits & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).view(torch.float32)
    value = torch.where(magnitude < 8, magnitude.float() * E4M3_MIN, normal)
    value = torch.where(magnitude == E4M3_NAN, math.nan, value)
    return torch.where(bits < 0x80, value, -value)


def pack(codes: Tensor) -> Tensor:
    """Codes u8 [..., 2n] (bits 4 to 7 zero) -> packed u8 [..., n]: the even index in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Packed u8 [..., n] -> codes u8 [..., 2n]: the inverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def global_scale(x: Tensor) -> Tensor:
    """Tensor float, any shape -> g fp32 []: amax/2688 over finite values, 1 if they are all zero.

    To share one g among several tensors, take the largest of theirs.
    """
    return _scale_of(_amax(x))


def quantize_rows(
    rows: Tensor, global_scale: Tensor | None = None, *, scale_rule: str = "max", block_rows: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [..., K] float -> packed u8 [..., ceil(K/16)*8], scale u8 [..., ceil(K/16)], global_scale fp32 [].

    g = amax/2688, s = e4m3(clamp(block_amax/(6*g), 2**-9, 448)), codes = e2m1(x/(s*g)) against the stored s, all in
    fp32 with true divisions: the order of ModelOpt's `NVFP4QTensor.quantize`. fp64 is rounded to fp32 first. The tail
    of K is padded with zeros.

    Args:
        rows: fp32, fp16, bf16 or fp64; there may be no rows, but K must not be 0.
        global_scale: fp32 [], finite and positive, used as it is; None computes it.
        scale_rule: "max", or "search": of the scales from 3 codes below that of "max" to 7 above, the one of the least
            squared error, with g = amax/1536 so that there is room above.
        block_rows: 16 takes one scale per 16x16 tile of the last two axes (fewer rows at the edge; a 1-d tensor is one
            row) and stores it in each of the tile's rows.

    Raises:
        PolicyError: a scale rule that does not exist (yet), or a block of other than 1 or 16 rows.
        LayoutError: not a float tensor, K = 0, or a global scale of another shape or dtype.
    """
    _check_rule(scale_rule, block_rows)
    k = row_length(rows.shape, "rows")
    if not rows.is_floating_point():
        raise LayoutError(f"only floating-point values can be quantized, found {rows.dtype}; convert them first")
    blocks = torch.unflatten(pad(rows.detach().float(), (0, -k % BLOCK)), -1, (-1, BLOCK))
    block_amax, poisoned = _finite_abs(blocks).amax(-1), blocks.isnan().any(-1)
    if global_scale is None:
        global_scale = _scale_of(block_amax, scale_rule)
    elif global_scale.dim() or global_scale.dtype != torch.float32:
        found = f"{global_scale.dtype} of shape {tuple(global_scale.shape)}"
        raise LayoutError(f"global_scale must be one fp32 value of shape (), found {found}")
    if block_rows > 1 and rows.dim() > 1:
        block_amax, poisoned = _tile_max(block_amax, block_rows), _tile_max(poisoned.float(), block_rows) > 0
    s = (block_amax / (E2M1_MAX * global_scale)).clamp(E4M3_MIN, E4M3_MAX)
    scale = torch.where(poisoned, E4M3_NAN, encode_e4m3(torch.where(block_amax == 0, 1.0, s)))
    if scale_rule == "search":
        scale = torch.where(poisoned | (block_amax == 0), scale, _search(blocks, scale, global_scale))
    codes = encode_e2m1(blocks / (decode_e4m3(scale) * global_scale).unsqueeze(-1))
    return pack(codes.flatten(-2)), scale, global_scale


def dequantize_rows(
    packed: Tensor, scale: Tensor, global_scale: Tensor, k: int, dtype: torch.dtype, *, in_place: bool = True
) -> Tensor:
    """Packed u8 [..., ceil(k/16)*8], scale u8 [..., ceil(k/16)], global_scale fp32 [] -> rows [..., k] of `dtype`.

    A value is code * (s * g) in fp32, then rounded to `dtype`. Without `in_place` no call writes to a tensor.

    Raises:
        LayoutError: packed and scale do not hold rows of k values.
    """
    blocks = (k + BLOCK - 1) // BLOCK
    if packed.shape[-1] != blocks * (BLOCK // 2) or scale.shape[-1] != blocks:
        found = f"packed {tuple(packed.shape)} and scale {tuple(scale.shape)}"
        raise LayoutError(f"rows of {k} values have {blocks * 8} packed bytes and {blocks} scales, found {found}")
    # Both values of a byte come out of one table as one 8-byte item: five times faster than arithmetic in eager mode.
    table = decode_e2m1(unpack(torch.arange(256, dtype=torch.uint8, device=packed.device))).view(torch.int64)
    values = table.index_select(0, packed.flatten().int()).view(torch.float32).view(*scale.shape, BLOCK)
    factors = (decode_e4m3(scale) * global_scale).unsqueeze(-1)
    values = (values.mul_(factors) if in_place else values * factors).flatten(-2)
    if k % BLOCK:
        # Not a slice: Inductor's loop split on CPU (torch 2.15) loses the end of a slice that stops within a block.
        values = values.as_strided((*values.shape[:-1], k), values.stride())
    return values.to(dtype).contiguous()


def quantize(
    x: Tensor,
    *,
    scale_rule: str = "max",
    block: tuple[int, int] = (1, BLOCK),
    global_scale: Tensor | None = None,
    order: Order = "rows",
    groups: int = 1,
) -> NVFP4:
    """Tensor float, any shape -> NVFP4: `quantize_rows` of `to_rows`, a bounded number of rows at a time.

    Args:
        x: fp32, fp16, bf16 or fp64.
        scale_rule: "max" or "search", see `quantize_rows`.
        block: (1, 16), or (16, 16) for one scale per tile, so that a matrix and its transpose quantize alike.
        global_scale: fp32 [], used as it is; None computes it from amax.
        order: how x lines up as rows, see `to_rows`.
        groups: of the convolution.

    Raises:
        PolicyError: a block or scale rule that does not exist (yet).
        LayoutError: order, groups, shape or dtype do not fit.
    """
    if tuple(block) not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise PolicyError(f"block={block} is not a block of NVFP4; use (1, 16), or (16, 16) for one scale per tile")
    _check_rule(scale_rule, block[0])
    rows = to_rows(x, order, groups)
    unit = BLOCK if rows.dim() == 2 else 1  # a part ends with a tile; of a 3-d tensor it is whole matrices
    step = max(CHUNK // max(rows[:unit].numel(), 1), 1) * unit
    parts = torch.split(rows, step) if rows.dim() > 1 else (rows,)
    if global_scale is None:
        global_scale = _scale_of(_amax(rows), scale_rule)
    encoded = [quantize_rows(p, global_scale, scale_rule=scale_rule, block_rows=block[0]) for p in parts]
    packed, scale = (torch.cat(tensors) for tensors in list(zip(*encoded, strict=True))[:2])
    return NVFP4(packed, scale, global_scale, x.shape, x.dtype, order, groups)


def dequantize(q: NVFP4, dtype: torch.dtype | None = None) -> Tensor:
    """NVFP4 -> tensor of q.shape in `dtype`, by default the dtype it was quantized from."""
    k = row_length(q.shape, q.order, q.groups)
    rows = dequantize_rows(q.packed, q.scale, q.global_scale, k, dtype or q.dtype)
    return from_rows(rows, q.shape, q.order, q.groups)


def check_finite(x: Tensor, name: str) -> None:
    """Tensor float, any shape -> nothing, if all values are finite.

    Raises:
        NonFiniteWeightError: naming the parameter, how many values are NaN or Inf, and the first of them.
    """
    if x.numel() == 0 or all(bound.isfinite() for bound in x.aminmax()):  # a NaN is both the least and the greatest
        return
    bad = x.isfinite().logical_not().nonzero()
    first = tuple(bad[0].tolist())
    raise NonFiniteWeightError(
        f"{name}: {len(bad)} of {x.numel()} values are NaN or Inf, the first is {x[first].item()} at index {first}; "
        "a weight must be finite to be quantized: repair or retrain it, or exclude the layer in the policy"
    )


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Two tensors of one shape -> 10 log10(sum(reference²) / sum((reference - approximation)²)) in dB, summed in fp64.

    inf when they are equal, -inf when only the reference is zero.

    Raises:
        LayoutError: the shapes differ.
    """
    if reference.shape != approximation.shape:
        found = f"{tuple(reference.shape)} and {tuple(approximation.shape)}"
        raise LayoutError(f"sqnr compares tensors of one shape, found {found}")
    signal = noise = 0.0
    for part, other in zip(_parts(reference), _parts(approximation), strict=True):
        signal += part.dot(part).item()
        noise += (part - other).square_().sum().item()
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return -math.inf if ratio == 0 else 10 * math.log10(ratio)


def excess_kurtosis(x: Tensor) -> float:
    """Tensor float, any shape -> E[(x - mean)⁴] / variance² - 3 in fp64: 0 for a Gaussian, -1.2 for a uniform.

    0.0 where it is not defined: no values, or all equal.
    """
    if x.numel() == 0 or bool(x.amin() == x.amax()):
        return 0.0
    mean = sum(part.sum().item() for part in _parts(x)) / x.numel()
    second = fourth = 0.0
    for part in _parts(x):
        square = (part - mean).square_()
        second += square.sum().item()
        fourth += square.dot(square).item()
    return fourth * x.numel() / second**2 - 3


def _search(blocks: Tensor, start: Tensor, global_scale: Tensor) -> Tensor:
    """Blocks fp32 [..., 16], scales u8 [...] of "max" -> scales of the least squared error among `SEARCH`.

    The lowest of equals. Magnitudes count in units of the scale of "max", up to 16, ±Inf as 0; a square is cut to a
    multiple of 2**-19. So no magnitude overflows, and the order of a sum does not matter: the errors are integers.
    """
    unit = decode_e4m3(start)
    x = (_finite_abs(blocks) / (unit * global_scale).unsqueeze(-1)).clamp(max=16.0)
    best, least = start, torch.full_like(start, torch.iinfo(torch.int32).max, dtype=torch.int32)
    for step in SEARCH:
        tried = (start.int() + step).clamp(1, E4M3_NAN - 1).to(torch.uint8)
        s = (decode_e4m3(tried) / unit).unsqueeze(-1)
        square = (x - decode_e2m1(encode_e2m1(x / s)) * s).square()
        error = (square * 2.0**19).int().sum(-1, dtype=torch.int32)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def _check_rule(scale_rule: str, block_rows: int) -> None:
    if scale_rule == "four_over_six":
        raise PolicyError(f"scale_rule={scale_rule!r} is not available in this version; use 'max' or 'search'")
    if scale_rule not in LARGEST_SCALE:
        raise PolicyError(f"unknown scale_rule {scale_rule!r}; use scale_rule='max' or 'search'")
    if block_rows not in (1, BLOCK):
        raise PolicyError(f"a block has 1 or {BLOCK} rows, found block_rows={block_rows}")
    if scale_rule == "search" and block_rows != 1:
        raise PolicyError("scale_rule='search' chooses a scale per 16 values; a 16x16 block needs scale_rule='max'")


def _finite_abs(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0).abs()


def _amax(x: Tensor) -> Tensor:
    """Tensor float, any shape -> the greatest finite magnitude of each part of it, fp32 [P]."""
    parts = torch.split(x.detach().flatten(), CHUNK)
    return torch.stack([pad(_finite_abs(part.float()), (0, 1)).amax() for part in parts])


def _scale_of(amax: Tensor, scale_rule: str = "max") -> Tensor:
    """Partial maxima fp32 [...] -> g fp32 []."""
    amax = pad(amax.flatten(), (0, 1)).amax()  # the 0 is the amax of no values
    g = (amax / (E2M1_MAX * LARGEST_SCALE[scale_rule])).clamp(min=GLOBAL_SCALE_MIN)
    return torch.where(amax == 0, 1.0, g)


def _tile_max(x: Tensor, block_rows: int) -> Tensor:
    """Values [..., M, B] -> [..., M, B]: the maximum over each run of `block_rows` rows, in each of its rows."""
    m = x.shape[-2]
    tiles = torch.unflatten(pad(x, (0, 0, 0, -m % block_rows)), -2, (-1, block_rows)).amax(-2)
    return tiles.repeat_interleave(block_rows, dim=-2)[..., :m, :]


def _parts(x: Tensor) -> Iterator[Tensor]:
    return (part.double() for part in torch.split(x.detach().flatten(), CHUNK >> 4))
