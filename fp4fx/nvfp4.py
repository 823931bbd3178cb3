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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4fx.balance import balanced
from fp4fx.codes import E2M1_MAX, E4M3_NAN, decode_e2m1, decode_e4m3, encode_e2m1, encode_e4m3, pack, unpack
from fp4fx.errors import LayoutError, NonFiniteWeightError, PolicyError
from fp4fx.scales import BLOCK, LARGEST_SCALE, UNBIASED, check_rule, finite_abs, scale_codes, searched, weights_of
from fp4fx.site import Order

__all__ = [
    "BLOCK", "CHUNK", "E2M1_MAX", "E4M3_NAN", "GLOBAL_SCALE_MIN", "LARGEST_SCALE", "NVFP4", "ORDERS", "check_finite",
    "decode_e2m1", "decode_e4m3", "dequantize", "dequantize_rows", "encode_e2m1", "encode_e4m3", "excess_kurtosis",
    "from_rows", "global_scale", "pack", "quantize", "quantize_rows", "row_length", "sqnr", "taps", "to_rows",
    "unbiased", "unpack",
]  # fmt: skip

ORDERS: tuple[Order, ...] = get_args(Order)
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


def global_scale(x: Tensor, scale_rule: str = "max") -> Tensor:
    """Tensor float, any shape -> g fp32 []: amax/2688 (1536 if not by "max") over finite values, 1 if all are zero.

    To share one g among several tensors, take the largest of theirs.
    """
    return _scale_of(_amax(x), scale_rule)


def quantize_rows(
    rows: Tensor,
    global_scale: Tensor | None = None,
    *,
    scale_rule: str = "max",
    block_rows: int = 1,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [..., K] float -> packed u8 [..., ceil(K/16)*8], scale u8 [..., ceil(K/16)], global_scale fp32 [].

    g = amax/2688, s = e4m3(clamp(block_amax/(6*g), 2**-9, 448)), codes = e2m1(x/(s*g)) against the stored s, all in
    fp32 with true divisions: the order of ModelOpt's `NVFP4QTensor.quantize`. fp64 is rounded to fp32 first. The tail
    of K is padded with zeros.

    Args:
        rows: fp32, fp16, bf16 or fp64; there may be no rows, but K must not be 0.
        global_scale: fp32 [], finite and positive, used as it is; None computes it.
        scale_rule: "max", or one that tries several scales, with g = amax/1536 so that there is room above (see
            `fp4fx.scales`).
        block_rows: 16 takes one scale per 16x16 tile of the last two axes (fewer rows at the edge; a 1-d tensor is one
            row) and stores it in each of the tile's rows.
        weights: fp32 [..., ceil(K/16), 16], or what broadcasts to it: factors of the errors that a rule compares, up to
            1 (see `fp4fx.scales.weights_of`).

    Raises:
        PolicyError: a scale rule that does not exist, or not for such a block.
        LayoutError: not a float tensor, K = 0, or a global scale of another shape or dtype.
    """
    check_rule(scale_rule, block_rows, weighted=weights is not None)
    if scale_rule == UNBIASED:
        packed, scale, g = quantize_rows(rows, global_scale, scale_rule=searched(scale_rule), weights=weights)
        if global_scale is None:
            packed, g = unbiased(rows, packed, scale, g)
        return packed, scale, g
    k = row_length(rows.shape, "rows")
    if not rows.is_floating_point():
        raise LayoutError(f"only floating-point values can be quantized, found {rows.dtype}; convert them first")
    blocks = torch.unflatten(pad(rows.detach().float(), (0, -k % BLOCK)), -1, (-1, BLOCK))
    block_amax, poisoned = finite_abs(blocks).amax(-1), blocks.isnan().any(-1)
    if global_scale is None:
        global_scale = _scale_of(block_amax, scale_rule)
    elif global_scale.dim() or global_scale.dtype != torch.float32:
        found = f"{global_scale.dtype} of shape {tuple(global_scale.shape)}"
        raise LayoutError(f"global_scale must be one fp32 value of shape (), found {found}")
    if block_rows > 1 and rows.dim() > 1:
        block_amax, poisoned = _tile_max(block_amax, block_rows), _tile_max(poisoned.float(), block_rows) > 0
    scale = scale_codes(blocks, block_amax, global_scale, scale_rule, weights)
    scale = torch.where(poisoned, E4M3_NAN, scale)
    codes = encode_e2m1(blocks / (decode_e4m3(scale) * global_scale).unsqueeze(-1))
    return pack(codes.flatten(-2)), scale, global_scale


def unbiased(
    rows: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    taps: int | None = None,
    *,
    decode: Callable[..., Tensor] | None = None,
    balance: Callable[..., Tensor] = balanced,
) -> tuple[Tensor, Tensor]:
    """Rows float [..., K] and their encoded form -> codes and g fp32 [] that decode to a q where <w, q> = <w, w>.

    With `taps`, those of a convolution's rows, codes are balanced first (see `fp4fx.balance`). Both products count in
    units of g, and the ratio is rounded to 2**-20, so that hardly ever the order of a sum shows. g as it was where
    there is no such factor between 1/2 and 2. `decode` and `balance` are the definitions, or kernels in their place.
    """
    k, one = rows.shape[-1], torch.ones_like(global_scale)
    step = max((CHUNK >> 4) // max(k, 1), 1)
    whole = along = torch.zeros((), dtype=torch.float64, device=rows.device)
    parts = (torch.split(x.detach().reshape(-1, x.shape[-1]), step) for x in (rows, packed, scale))
    moved = []
    for part, nearest, scales in zip(*parts, strict=True):
        codes = nearest if taps is None else balance(part, nearest, scales, global_scale, taps)
        moved.append(codes)
        w = (part.float() / global_scale).flatten()
        q = (decode or dequantize_rows)(codes, scales, one, k, torch.float32).flatten()
        whole, along = whole + w.dot(w), along + w.dot(q)
    factor = (whole / along * 2.0**20).round() * 2.0**-20
    usable = (factor >= 0.5) & (factor <= 2)
    g = torch.where(usable, global_scale.double() * factor, global_scale.double()).float()
    return packed if taps is None else torch.cat(moved), g


def taps(shape: torch.Size | tuple[int, ...], order: Order) -> int | None:
    """Positions of the kernel of a convolution whose weights have this shape, [N, C/g, *k]; None in another order."""
    return math.prod(shape[2:]) if order == "conv" else None


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
    importance: Tensor | None = None,
) -> NVFP4:
    """Tensor float, any shape -> NVFP4: `quantize_rows` of `to_rows`, a bounded number of rows at a time.

    Args:
        x: fp32, fp16, bf16 or fp64.
        scale_rule: see `fp4fx.scales`.
        block: (1, 16), or (16, 16) for one scale per tile, so that a matrix and its transpose quantize alike.
        global_scale: fp32 [], used as it is; None computes it from amax.
        order: how x lines up as rows, see `to_rows`.
        groups: of the convolution.
        importance: fp32 [K] for the columns of the rows, or [G, K] where rows are G equal parts with inputs of their
            own (groups of a convolution): factors of the squared errors that "search" compares. With the diagonal of
            the Hessian, the mean square of each input, it makes least the error of the product as far as inputs are
            uncorrelated.

    Raises:
        PolicyError: a block or scale rule that does not exist, or not together.
        LayoutError: order, groups, shape or dtype do not fit.
    """
    if tuple(block) not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise PolicyError(f"block={block} is not a block of NVFP4; use (1, 16), or (16, 16) for one scale per tile")
    check_rule(scale_rule, block[0], weighted=importance is not None)
    rows = to_rows(x, order, groups)
    weights = None if importance is None else weights_of(importance, rows)
    unit = BLOCK if rows.dim() == 2 else 1  # a part ends with a tile; of a 3-d tensor it is whole matrices
    step = max(CHUNK // max(rows[:unit].numel(), 1), 1) * unit
    parts = torch.split(rows, step) if rows.dim() > 1 else (rows,)
    given, rule = global_scale, searched(scale_rule)
    if global_scale is None:
        global_scale = _scale_of(_amax(rows), rule)
    encoded = []
    for i, part in enumerate(parts):
        its = weights
        if weights is not None and weights.dim() == 3:  # one for a group of rows
            group = torch.arange(i * step, i * step + len(part), device=x.device) // (len(rows) // len(weights))
            its = weights[group]
        encoded.append(quantize_rows(part, global_scale, scale_rule=rule, block_rows=block[0], weights=its))
    packed, scale = (torch.cat(tensors) for tensors in list(zip(*encoded, strict=True))[:2])
    if scale_rule == UNBIASED and given is None:
        packed, global_scale = unbiased(rows, packed, scale, global_scale, taps(x.shape, order))
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


def _amax(x: Tensor) -> Tensor:
    """Tensor float, any shape -> the greatest finite magnitude of each part of it, fp32 [P]."""
    parts = torch.split(x.detach().flatten(), CHUNK)
    return torch.stack([pad(finite_abs(part.float()), (0, 1)).amax() for part in parts])


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
