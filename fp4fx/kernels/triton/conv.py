"""Convolutions as one implicit product: yᵀ = W · xᵀ over the taps of the kernel and the channels of a pixel.

A program has a tile of W's rows and one of y's pixels. A row of W lies over (*kernel, C/groups), so where C/groups is a
multiple of 16 a block of K has one tap, and its channels lie side by side in a channels_last x. Otherwise K is walked
flat, and every value of it finds its own tap and channel. A transposed convolution is a plain one for each phase of its
stride (see `conv_geometry`). Where there are few tiles, K is split into parts that a second kernel adds up in order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4fx.errors import LayoutError
from fp4fx.kernels.triton import codec, epilogue, operands, tuning
from fp4fx.kernels.triton.conv_geometry import Geometry, geometry
from fp4fx.kernels.triton.variant import Variant
from fp4fx.nvfp4 import BLOCK
from fp4fx.ops.epilogue import check_epilogue
from fp4fx.ops.library import CHANNELS_LAST, check_input, check_weight
from fp4fx.policy import Compute

# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _first_tap(phase, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
               COMMON: tl.constexpr, INVERSE: tl.constexpr):  # fmt: skip
    """A phase of a transposed convolution along one axis -> (its first tap, how many taps, offset of the first)."""
    step: tl.constexpr = STRIDE // COMMON
    reach = phase + PADDING
    first = reach // COMMON * INVERSE % step
    taps = tl.where(reach % COMMON == 0, (KERNEL - first + step - 1) // step, 0)
    twice = reach - first * DILATION  # a multiple of the stride if there are taps
    return first, taps, tl.where(twice < 0, -(-twice // STRIDE), twice // STRIDE)


@triton.jit
def _within(mask, at, size, BOUNDED: tl.constexpr):
    """The mask where x has a place `at` along an axis: one comparison, since a negative place is a large one."""
    if BOUNDED:
        mask = mask & (at.to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32))
    return mask


@triton.jit
def _pair(x_ptr, at, mask, OP: tl.constexpr):
    """Two values at x_ptr + 2·at each, of 16 bits -> (even, odd), both OP like `at`."""
    x = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0)
    return operands.split_pairs(x, x_ptr.dtype.element_ty, OP)


@triton.jit
def _value(x_ptr, x_scale_ptr, pixel, channel, x_blocks, mask, OP: tl.constexpr):
    """One value for each pixel and channel: `pixel` values from x_ptr, or of that packed row -> OP like `mask`."""
    if x_scale_ptr is None:
        return tl.load(x_ptr + pixel + channel, mask=mask, other=0.0).to(OP)
    else:
        row = pixel * x_blocks
        codes = tl.load(x_ptr + row * 8 + channel // 2, mask=mask, other=0).to(tl.int32) >> channel % 2 * 4
        scale = tl.load(x_scale_ptr + row + channel // 16, mask=mask, other=0)
        return codec.operand(codes, codec.operand_scale(scale, OP), OP)


@triton.jit
def _weight(packed_ptr, scale_ptr, row, row_mask, block, end, row_blocks, OP: tl.constexpr, BLOCKS: tl.constexpr,
            FOURS: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """`operands.packed_tile`; with FOURS the scales are read four at a time, which is what can be read ahead."""
    if FOURS:
        start = row.to(tl.int64)[:, None] * row_blocks
        byte = block * 8 + tl.arange(0, BLOCKS * 8)[None, :]
        codes = tl.load(packed_ptr + start * 8 + byte, mask=row_mask[:, None] & (byte < end * 8), other=0)
        four = block // 4 + tl.arange(0, BLOCKS // 4)[None, :]
        fours_ptr = scale_ptr.to(tl.pointer_type(tl.int32)) + start // 4
        scale = tl.load(fours_ptr + four, mask=row_mask[:, None] & (four < end // 4), other=0)
        scale = scale[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]
        scale = (scale & 0xFF).reshape(row.shape[0], BLOCKS)
        return operands.halves(codes, codec.operand_scale(scale, OP), OP, PTX)
    else:
        return operands.packed_tile(packed_ptr, scale_ptr, row, row_mask, block, end, row_blocks, OP, BLOCKS, PTX)


@triton.jit
def _unit(global_ptr, x_global_ptr, OP: tl.constexpr):
    """What sums of products of operands are multiplied by, fp32."""
    unit = tl.load(global_ptr) * codec.unit(OP)
    if x_global_ptr is not None:
        unit = unit * (tl.load(x_global_ptr) * codec.unit(OP))
    return unit


@triton.jit
def _conv(x_ptr, x_scale_ptr, x_global_ptr, packed_ptr, scale_ptr, global_ptr, channel_scale_ptr, bias_ptr,
          residual_ptr, y_ptr, groups, rows, channels, row_blocks, x_blocks, batch, in0, in1, in2, out0, out1, out2,
          x_image, x0, x1, x2, y_image, y_channel, y0, y1, y2, y_part, parts,
          KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
          COMMON: tl.constexpr, INVERSE: tl.constexpr, BOUNDED: tl.constexpr, TRANSPOSED: tl.constexpr,
          PHASES: tl.constexpr, FLAT: tl.constexpr, FOURS: tl.constexpr, PAIRS: tl.constexpr, PART: tl.constexpr,
          ACTIVATION: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_K: tl.constexpr):  # fmt: skip
    """One tile of y, rows of W x pixels of a phase, or one part of its sums.

    Args:
        x_ptr, x_scale_ptr, x_global_ptr: bf16, fp16 or fp32 with channels side by side, and None twice; or packed.
        packed_ptr, scale_ptr, global_ptr: the weight, canonical.
        channel_scale_ptr, bias_ptr, residual_ptr: of the epilogue, or None; the residual lies like y.
        y_ptr: the result; with PART the sums fp32 [parts, like y].
        groups, rows, channels: rows of W and channels of x are those of one group.
        row_blocks, x_blocks: blocks in a row of W, and in a pixel of a packed x.
        x_image, x0, x1, x2: strides of x: in pixels if it is packed, in pairs of values with PAIRS, else in values.
        y_image, y_channel, y0, y1, y2, y_part: strides of y, in values.
        KERNEL ... PHASES: see `Geometry`.
        FLAT: walk K flat; otherwise `channels` is a multiple of 16.
        FOURS: blocks of a tap and of a tile are multiples of 4, and so is scale_ptr.
        PAIRS: 0, or 2, 4, 8: read two 16-bit values at once; strides and `channels` are multiples of so many values.
    """
    BLOCKS: tl.constexpr = BLOCK_K // 16
    PACKED: tl.constexpr = x_scale_ptr is not None

    # The tile: rows n of W, pixels m of the phase. Programs side by side have the same pixels.
    tiles = tl.cdiv(rows, BLOCK_N)
    tile = tl.program_id(0) % (groups * tiles)
    group = tile // tiles
    n = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < rows
    n = group * rows + n
    m = tl.program_id(0) // (groups * tiles) * BLOCK_M + tl.arange(0, BLOCK_M)

    # Along each axis of the phase: its place p, outputs m, first tap f, taps n, the offset d of the first; from tap to
    # tap of the phase the kernel's tap grows by t, the offset by e.
    if TRANSPOSED:
        phase = tl.program_id(1)
        p0, p1, p2 = phase // (PHASES[1] * PHASES[2]), phase // PHASES[2] % PHASES[1], phase % PHASES[2]
        f0, n0, d0 = _first_tap(p0, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0], COMMON[0], INVERSE[0])
        f1, n1, d1 = _first_tap(p1, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1], COMMON[1], INVERSE[1])
        f2, n2, d2 = _first_tap(p2, KERNEL[2], STRIDE[2], PADDING[2], DILATION[2], COMMON[2], INVERSE[2])
        m0, m1, m2 = tl.cdiv(out0 - p0, STRIDE[0]), tl.cdiv(out1 - p1, STRIDE[1]), tl.cdiv(out2 - p2, STRIDE[2])
    else:
        p0, p1, p2 = 0, 0, 0
        f0, f1, f2 = 0, 0, 0
        n0, n1, n2 = KERNEL[0], KERNEL[1], KERNEL[2]
        d0, d1, d2 = -PADDING[0], -PADDING[1], -PADDING[2]
        m0, m1, m2 = out0, out1, out2
    t0: tl.constexpr = STRIDE[0] // COMMON[0] if TRANSPOSED else 1
    t1: tl.constexpr = STRIDE[1] // COMMON[1] if TRANSPOSED else 1
    t2: tl.constexpr = STRIDE[2] // COMMON[2] if TRANSPOSED else 1
    e0: tl.constexpr = -(DILATION[0] // COMMON[0]) if TRANSPOSED else DILATION[0]
    e1: tl.constexpr = -(DILATION[1] // COMMON[1]) if TRANSPOSED else DILATION[1]
    e2: tl.constexpr = -(DILATION[2] // COMMON[2]) if TRANSPOSED else DILATION[2]

    # The pixels: output o, and the input i that an offset of 0 reads.
    o2, rest = m % m2, m // m2
    o1, rest = rest % m1, rest // m1
    o0, image = rest % m0, rest // m0
    m_mask = image < batch
    image = image.to(tl.int64)
    if TRANSPOSED:
        i0, i1, i2 = o0, o1, o2
        o0, o1, o2 = p0 + o0 * STRIDE[0], p1 + o1 * STRIDE[1], p2 + o2 * STRIDE[2]
    else:
        i0, i1, i2 = o0 * STRIDE[0], o1 * STRIDE[1], o2 * STRIDE[2]
    pixel = image * x_image + i0.to(tl.int64) * x0 + i1.to(tl.int64) * x1 + i2.to(tl.int64) * x2

    # The steps over K, or a part of them.
    blocks = channels // 16
    per_tap = tl.cdiv(blocks, BLOCKS)
    steps = tl.cdiv(row_blocks, BLOCKS) if FLAT else n0 * n1 * n2 * per_tap
    begin = 0
    end = steps
    if PART:
        each = tl.cdiv(steps, parts)
        begin = tl.program_id(2) * each
        end = tl.minimum(begin + each, steps)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    pairs = tl.arange(0, BLOCK_K // 2)
    if FLAT:
        taps = KERNEL[0] * KERNEL[1] * KERNEL[2]
        if TRANSPOSED:
            taps = tl.where(n0 * n1 * n2 > 0, taps, 0)
        for step in range(begin, end):
            low, high = _weight(packed_ptr, scale_ptr, n, n_mask, step * BLOCKS, row_blocks, row_blocks, OP, BLOCKS,
                                False, PTX)  # fmt: skip
            for odd in tl.static_range(2):
                if odd == 0 or not PAIRS:
                    k = step * BLOCK_K + 2 * pairs + odd
                    tap, channel = k // channels, group * channels + k % channels
                    g2 = tap % KERNEL[2] - f2
                    g1 = tap // KERNEL[2] % KERNEL[1] - f1
                    g0 = tap // (KERNEL[2] * KERNEL[1]) - f0
                    mask = tap < taps
                    if TRANSPOSED:
                        mask = mask & (g0 >= 0) & (g1 >= 0) & (g2 >= 0)
                        mask = mask & (g0 % t0 == 0) & (g1 % t1 == 0) & (g2 % t2 == 0)
                    at0, at1, at2 = d0 + g0 // t0 * e0, d1 + g1 // t1 * e1, d2 + g2 // t2 * e2
                    mask = mask[:, None] & m_mask[None, :]
                    mask = _within(mask, i0[None, :] + at0[:, None], in0, BOUNDED[0])
                    mask = _within(mask, i1[None, :] + at1[:, None], in1, BOUNDED[1])
                    mask = _within(mask, i2[None, :] + at2[:, None], in2, BOUNDED[2])
                    at = pixel[None, :] + (at0 * x0 + at1 * x1 + at2 * x2)[:, None]
                    channel = channel[:, None]
                    if PAIRS:
                        first, second = _pair(x_ptr, at + channel // 2, mask, OP)
                        acc = tl.dot(low, first, acc, input_precision=PRECISION)
                        acc = tl.dot(high, second, acc, input_precision=PRECISION)
                    else:
                        value = _value(x_ptr, x_scale_ptr, at, channel, x_blocks, mask, OP)
                        acc = tl.dot(low if odd == 0 else high, value, acc, input_precision=PRECISION)
    else:
        j0, j1, j2, of_tap = 0, 0, 0, 0
        if PART:
            tap = begin // per_tap
            of_tap = begin % per_tap * BLOCKS
            j2 = tap % tl.maximum(n2, 1)
            j1 = tap // tl.maximum(n2, 1) % tl.maximum(n1, 1)
            j0 = tap // tl.maximum(n2 * n1, 1)
        for _ in range(begin, end):
            tap = ((f0 + j0 * t0) * KERNEL[1] + f1 + j1 * t1) * KERNEL[2] + f2 + j2 * t2
            low, high = _weight(packed_ptr, scale_ptr, n, n_mask, tap * blocks + of_tap, (tap + 1) * blocks, row_blocks,
                                OP, BLOCKS, FOURS, PTX)  # fmt: skip
            at0, at1, at2 = d0 + j0 * e0, d1 + j1 * e1, d2 + j2 * e2
            mask = _within(m_mask, i0 + at0, in0, BOUNDED[0])
            mask = _within(mask, i1 + at1, in1, BOUNDED[1])
            mask = _within(mask, i2 + at2, in2, BOUNDED[2])
            at = pixel + (at0 * x0 + at1 * x1 + at2 * x2)
            if PACKED:
                even, odd = operands.packed_tile(x_ptr, x_scale_ptr, at, mask, group * blocks + of_tap,
                                                 (group + 1) * blocks, x_blocks, OP, BLOCKS, PTX)  # fmt: skip
                even, odd = tl.trans(even), tl.trans(odd)
            else:
                pair = of_tap * 8 + pairs
                mask = (pair < blocks * 8)[:, None] & mask[None, :]
                pair = (group * blocks * 8 + pair)[:, None]
                if PAIRS:
                    even, odd = _pair(x_ptr, tl.multiple_of(at, PAIRS // 2)[None, :] + pair, mask, OP)
                else:
                    even = _value(x_ptr, x_scale_ptr, at[None, :], 2 * pair, x_blocks, mask, OP)
                    odd = _value(x_ptr, x_scale_ptr, at[None, :], 2 * pair + 1, x_blocks, mask, OP)
            acc = tl.dot(low, even, acc, input_precision=PRECISION)
            acc = tl.dot(high, odd, acc, input_precision=PRECISION)
            of_tap += BLOCKS
            over = of_tap >= blocks
            of_tap = tl.where(over, 0, of_tap)
            j2 = tl.where(over, j2 + 1, j2)
            over = j2 == n2
            j2 = tl.where(over, 0, j2)
            j1 = tl.where(over, j1 + 1, j1)
            over = j1 == n1
            j1 = tl.where(over, 0, j1)
            j0 = tl.where(over, j0 + 1, j0)

    at = image * y_image + o0.to(tl.int64) * y0 + o1.to(tl.int64) * y1 + o2.to(tl.int64) * y2
    at = at[None, :] + n.to(tl.int64)[:, None] * y_channel
    mask = n_mask[:, None] & m_mask[None, :]
    if PART:
        tl.store(y_ptr + tl.program_id(2).to(tl.int64) * y_part + at, acc, mask=mask)
    else:
        y = epilogue.finish(acc * _unit(global_ptr, x_global_ptr, OP), n[:, None], n_mask[:, None], channel_scale_ptr,
                            bias_ptr, residual_ptr + at if residual_ptr is not None else at, mask,
                            channel_scale_ptr is not None, bias_ptr is not None, residual_ptr is not None,
                            ACTIVATION)  # fmt: skip
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum(parts_ptr, x_global_ptr, global_ptr, channel_scale_ptr, bias_ptr, residual_ptr, y_ptr, size, rows, inner,
         parts, ACTIVATION: tl.constexpr, OP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums fp32 [parts, size] -> y [size] as it lies in memory: value i is of channel i // inner % rows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    part = parts_ptr + at
    product = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        product += tl.load(part, mask=mask, other=0.0)
        part += size
    y = epilogue.finish(product * _unit(global_ptr, x_global_ptr, OP), at // inner % rows, mask, channel_scale_ptr,
                        bias_ptr, residual_ptr + at if residual_ptr is not None else at, mask,
                        channel_scale_ptr is not None, bias_ptr is not None, residual_ptr is not None,
                        ACTIVATION)  # fmt: skip
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


# --- calls ------------------------------------------------------------------------------------------------------------

_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}
_SUM_BLOCK = 1024
_GEOMETRY = ("kernel", "stride", "padding", "dilation", "common", "inverse", "bounded", "transposed", "phases")
_PROGRAMS = 128
"""As many keep a GPU busy: K is split while there are fewer."""


class _Product(NamedTuple):
    """The arguments of a call: x is fp [B, C, *spatial] or packed [B, *spatial, bytes]."""

    x: Tensor
    x_scale: Tensor | None
    x_global_scale: Tensor | None
    packed: Tensor
    scale: Tensor
    global_scale: Tensor
    bias: Tensor | None
    channel_scale: Tensor | None
    residual: Tensor | None
    in_channels: int
    groups: int
    activation: str
    compute: str


class _Call(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile: tuning.Tile

    def run(self) -> None:
        """Launch it, on the current device."""
        options = {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages}
        self.kernel[self.grid](**self.arguments, **self.constants, **options)


def _operand_dtype(dtype: torch.dtype, quantized: bool, compute: str, family: str) -> torch.dtype:
    """What is multiplied: a packed activation is exact in 16 bits, and the interpreter has no bf16."""
    if dtype == torch.float16:
        return dtype
    if family == "interpreter" or (dtype == torch.float32 and compute == "fp32" and not quantized):
        return torch.float32
    return torch.bfloat16


def _walk(family: str, m: int, rows: int, channels: int, taps: int) -> tuple[tuning.Tile, bool, int]:
    """For m pixels: the tile, whether K is walked flat, and how many steps that takes."""
    tile = tuning.tile("conv", family, m, rows, channels * taps)
    flat = channels % BLOCK != 0 or channels < 2 * BLOCK
    line, lines = (channels * taps, 1) if flat else (channels, taps)
    sizes = [size for size in (128, 64, 32) if size <= (32 if flat else tile.block_k)]
    block_k = min(sizes, key=lambda size: (triton.cdiv(line, size) * size, -size))
    block_n = min(tile.block_n, max(16, triton.next_power_of_2(rows)))
    return tile._replace(block_k=block_k, block_n=block_n), flat, triton.cdiv(line, block_k) * lines


def _pairs(pixels: Tensor, channels: int) -> int:
    """How many values of x [B, *spatial, C] lie side by side at an aligned place: 0, 2, 4 or 8."""
    strides = [s for s, n in zip(pixels.stride()[:-1], pixels.shape[:-1], strict=True) if n > 1]
    unit = math.gcd(channels, *strides, pixels.data_ptr() // 2, 8)
    return unit if pixels.element_size() == 2 and unit > 1 else 0


def _named(prefix: str, values: Sequence[int]) -> dict[str, int]:
    """One value for each of the three axes, 0 for those that are missing in front."""
    return {f"{prefix}{i}": value for i, value in enumerate((*(0,) * (3 - len(values)), *values))}


def _calls(t: _Product, y: Tensor, g: Geometry, family: str, parts: int | None = None) -> Iterator[_Call]:
    """What computes y [B, N, *spatial], which is dense; its dtype is that of x, or what x decodes to."""
    quantized, batch, rows, channels = (
        t.x_scale is not None,
        y.shape[0],
        y.shape[1] // t.groups,
        t.in_channels // t.groups,
    )
    op = _operand_dtype(y.dtype, quantized, t.compute, family)
    m, phases = batch * g.pixels, math.prod(g.phases)
    tile, flat, steps = _walk(family, m, rows, channels, g.taps)
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(rows, tile.block_n) * t.groups
    if parts is None:
        parts = max(1, min(tile.split_k, _PROGRAMS // (tiles * phases), steps // 4))

    pixels = t.x if quantized else t.x.movedim(1, -1)
    if quantized or (pixels.stride(-1) != 1 and t.in_channels > 1):
        pixels = pixels.contiguous()
    pairs = 0 if quantized else _pairs(pixels, channels)
    unit = pixels.shape[-1] if quantized else 2 if pairs else 1
    x_image, *x_strides = (s // unit if n > 1 else 0 for s, n in zip(pixels.stride()[:-1], pixels.shape, strict=False))
    sums = y if parts == 1 else y.new_empty(parts * y.numel(), dtype=torch.float32)

    follows = {"x_global_ptr": t.x_global_scale, "global_ptr": t.global_scale, "channel_scale_ptr": t.channel_scale}
    follows |= {"bias_ptr": t.bias, "residual_ptr": t.residual}
    sizes = {"groups": t.groups, "rows": rows, "channels": channels, "row_blocks": t.scale.shape[1]}
    sizes |= {"x_blocks": 0 if t.x_scale is None else t.x_scale.shape[-1], "batch": batch, "parts": parts}
    sizes |= {**_named("in", g.inner), **_named("out", g.outer)}
    strides = {"x_image": x_image, **_named("x", x_strides), "y_image": y.stride(0), "y_channel": y.stride(1)}
    strides |= {**_named("y", y.stride()[2:]), "y_part": y.numel()}
    geometry = {name.upper(): getattr(g, name) for name in _GEOMETRY}
    fours = not flat and math.gcd(channels // BLOCK, tile.block_k // BLOCK, t.scale.data_ptr()) % 4 == 0
    constants = {
        "FLAT": flat,
        "FOURS": fours,
        "PAIRS": pairs,
        "PART": parts > 1,
        "ACTIVATION": t.activation,
        "OP": _TRITON[op],
    }
    constants |= {"PRECISION": "tf32x3", "PTX": family != "interpreter" and op != torch.float32}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    pointers = {"x_ptr": pixels, "x_scale_ptr": t.x_scale, "packed_ptr": t.packed, "scale_ptr": t.scale, "y_ptr": sums}
    yield _Call(_conv, (tiles, phases, parts), pointers | follows | sizes | strides, constants | geometry, tile)
    if parts > 1:
        sizes = {"size": y.numel(), "rows": y.shape[1], "inner": y.stride(1), "parts": parts}
        constants = {"ACTIVATION": t.activation, "OP": _TRITON[op], "BLOCK": _SUM_BLOCK}
        grid = (triton.cdiv(y.numel(), _SUM_BLOCK), 1, 1)
        yield _Call(
            _sum, grid, {"parts_ptr": sums, "y_ptr": y} | follows | sizes, constants, tile._replace(num_warps=4)
        )


# --- ops --------------------------------------------------------------------------------------------------------------


def refuse(groups: int, n: int, padding: Sequence[int]) -> str | None:
    """Why these kernels do not take a convolution of n results, or None."""
    if groups > 1 and n // groups < _FEW:
        return f"{groups} groups of {n // groups} results leave most of a tile empty"
    if any(p < 0 for p in padding):
        return f"negative padding {tuple(padding)}"
    return None


_FEW = 16
"""Results per group from which on a tile is worth it: the least rows of a dot."""


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
    parts: int | None = None,
) -> Tensor:
    """`fp4fx::conv` on CUDA, or on the CPU by Triton's interpreter.

    Args:
        x ... compute: see `fp4fx.ops.compute.conv`.
        parts: of K, added up in order; None chooses by the number of tiles.
    """
    t = _Product(x, x_scale, x_global_scale, packed, scale, global_scale, bias, channel_scale, residual, in_channels,
                 groups, activation, compute)  # fmt: skip
    spatial = tuple(x.shape[1:-1] if x_scale is not None else x.shape[2:])
    g = geometry(spatial, tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))
    return _run(t, g, dtype, parts)


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
    parts: int | None = None,
) -> Tensor:
    """`fp4fx::conv_transpose` on CUDA, or on the CPU by Triton's interpreter; the arguments are those of `conv`."""
    t = _Product(x, x_scale, x_global_scale, packed, scale, global_scale, bias, channel_scale, residual, in_channels,
                 groups, activation, compute)  # fmt: skip
    spatial = tuple(x.shape[1:-1] if x_scale is not None else x.shape[2:])
    sizes = (tuple(sizes) for sizes in (kernel_size, stride, padding, dilation, output_padding))
    return _run(t, geometry(spatial, *sizes), dtype, parts)


def _run(t: _Product, g: Geometry, dtype: torch.dtype | None, parts: int | None) -> Tensor:
    """Checks, the memory of the result, and the launches."""
    if t.x_scale is None and dtype is not None and dtype != t.x.dtype:
        t = t._replace(x=t.x.to(dtype))  # operands are of the result's dtype
    result = _check(t, g, dtype)
    last = _channels_last(t.x)
    if g.is_pointwise and t.groups == 1 and parts is None and (last or math.prod(g.inner) == 1):
        y = _pointwise(t, dtype)
        return y.movedim(-1, 1) if last else y.view(y.shape[0], -1, *y.shape[1:-1])
    shape = (t.x.shape[0], t.packed.shape[0], *g.outer[5 - t.x.dim() :])
    memory_format = CHANNELS_LAST[t.x.dim()] if last else torch.contiguous_format
    y = torch.empty(shape, dtype=result, device=t.x.device, memory_format=memory_format)
    if y.numel() == 0:
        return y
    if t.residual is not None:
        same = t.residual.shape == y.shape
        torch._check(same, lambda: f"residual: found {list(t.residual.shape)}, expected the result's {list(y.shape)}")
        if t.residual.stride() != y.stride():
            t = t._replace(residual=torch.empty_like(y).copy_(t.residual))
    dense = {name: None if v is None else v.contiguous() for name in _DENSE for v in [getattr(t, name)]}
    with torch.cuda.device_of(y):
        for call in _calls(t._replace(**dense), y, g, tuning.family_of(y.device), parts):
            call.run()
    return y


_DENSE = ("x_scale", "packed", "scale", "bias", "channel_scale")


def _check(t: _Product, g: Geometry, dtype: torch.dtype | None) -> torch.dtype:
    """Refuse what does not fit together -> the dtype of the result."""
    n = t.packed.shape[0]
    if t.groups < 1 or t.in_channels % t.groups or n % t.groups:
        raise LayoutError(f"{t.in_channels} channels and {n} results do not form {t.groups} groups")
    check_weight(t.packed, t.scale, t.global_scale, g.taps * t.in_channels // t.groups)
    check_input(t.x, t.x_scale, dtype, t.in_channels, 1)
    result = t.x.dtype if dtype is None or t.x_scale is None else dtype
    if result not in _TRITON:
        raise LayoutError(f"found {result}, the kernels take float32, bfloat16 and float16")
    check_epilogue(t.residual, result, t.activation, t.compute)
    for name, vector in (("bias", t.bias), ("channel_scale", t.channel_scale)):
        if vector is not None and vector.shape != (n,):
            raise LayoutError(f"{name} must have {n} values, found {tuple(vector.shape)}")
    if t.x.shape[0] * math.prod(g.outer) >= 2**31:
        raise LayoutError(f"a result of {t.x.shape[0]} x {g.outer} pixels: the kernels count them in 31 bits")
    return result


def _channels_last(x: Tensor) -> bool:
    """Whether the result has its channels last: see `fp4fx.ops.library.in_format_of`."""
    last = CHANNELS_LAST.get(x.dim())
    if last is None or x.dtype == torch.uint8:
        return last is not None
    return not x.is_contiguous() and x.is_contiguous(memory_format=last)


def _pointwise(t: _Product, dtype: torch.dtype | None) -> Tensor:
    """Every pixel by itself: rows [B, *spatial, N] of a linear."""
    from fp4fx.kernels.triton.linear import linear  # noqa: PLC0415

    x = t.x if t.x_scale is not None else t.x.movedim(1, -1)
    residual = None if t.residual is None else t.residual.movedim(1, -1)
    weight = (t.packed, t.scale, t.global_scale, t.bias, t.in_channels)
    follows = (t.channel_scale, residual, t.activation, t.compute)
    y: Tensor = linear(x, *weight, t.x_scale, t.x_global_scale, dtype, *follows)
    return y


# --- ahead of time ----------------------------------------------------------------------------------------------------

_SAME = ((1, 1), (1, 1), (1, 1))
_CASES: Mapping[str, tuple[tuple[int, ...], int, Any, int]] = {  # x, results, geometry, groups
    **{
        f"3x3 of {b}x{c}x{size}x{size}": ((b, c, size, size), c, ((3, 3), *_SAME), 1)
        for b, c, size in ((1, 64, 4), (1, 512, 5), (1, 512, 7), (1, 256, 14), (1, 64, 56), (32, 64, 56), (32, 512, 14))
    },
    "3x3 by 2": ((32, 128, 56, 56), 256, ((3, 3), (2, 2), (1, 1), (1, 1)), 1),
    "3x3 of 48 channels": ((32, 48, 56, 56), 48, ((3, 3), *_SAME), 1),
    "3x3 in 32 groups": ((8, 1024, 28, 28), 1024, ((3, 3), *_SAME), 32),
    "3x3 in 8 groups of 16 results": ((8, 256, 28, 28), 128, ((3, 3), *_SAME), 8),
    "1x1 by 2": ((8, 256, 56, 56), 512, ((1, 1), (2, 2), (0, 0), (1, 1)), 1),
    "7x7 of 3 channels": ((8, 3, 224, 224), 64, ((7, 7), (2, 2), (3, 3), (1, 1)), 1),
    "4x4 patches": ((8, 3, 224, 224), 96, ((4, 4), (4, 4), (0, 0), (1, 1)), 1),
    "3x3 of 16 channels": ((8, 16, 112, 112), 64, ((3, 3), *_SAME), 1),
    "1-d": ((8, 80, 3000), 512, ((3,), (1,), (1,), (1,)), 1),
    "3-d": ((1, 128, 16, 64, 64), 128, ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)), 1),
    "transposed 4x4 by 2": ((8, 256, 32, 32), 128, ((4, 4), (2, 2), (1, 1), (1, 1), (0, 0)), 1),
    "transposed 16 by 8": ((1, 512, 200), 256, ((16,), (8,), (4,), (1,), (0,)), 1),
    "transposed 4x4 of 8 channels": ((8, 8, 32, 32), 64, ((4, 4), (2, 2), (1, 1), (1, 1), (0, 0)), 1),
}
_MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}


def _example(name: str, dtype: torch.dtype, **changes: Any) -> tuple[_Product, Tensor, Geometry]:
    """A case without its data, x and y in channels_last: with a bias, and what else the changes say."""
    shape, n, axes, groups = _CASES[name]
    g = geometry(shape[2:], *axes)

    def empty(*sizes: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    x = empty(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)
    y = empty(shape[0], *g.outer[5 - len(shape) :], n, dtype=dtype).movedim(-1, 1)
    blocks, one, vector = (
        triton.cdiv(shape[1] // groups * g.taps, BLOCK),
        empty(dtype=torch.float32),
        empty(n, dtype=dtype),
    )
    t = _Product(
        x, None, None, empty(n, 8 * blocks), empty(n, blocks), one, vector, None, None, shape[1], groups, "none", "bf16"
    )
    if changes.pop("packed", False):
        lead, x_blocks = (shape[0], *shape[2:]), triton.cdiv(shape[1], BLOCK)
        t = t._replace(x=empty(*lead, 8 * x_blocks), x_scale=empty(*lead, x_blocks), x_global_scale=one)
    if changes.pop("full", False):
        t = t._replace(channel_scale=vector, residual=y, activation="gelu")
    return t._replace(**changes), y, g


def _variant(name: str, call: _Call, target: int) -> Variant:
    """What a launch of this call compiles."""
    signature, constants, aligned = {}, dict(call.constants), []
    for key in call.kernel.arg_names:
        value = call.arguments.get(key)
        if key in call.constants:
            signature[key] = "constexpr"
        elif isinstance(value, Tensor):
            signature[key] = _POINTERS[value.dtype]
            aligned.append(key)
        elif value is None or value == 1:
            signature[key], constants[key] = "constexpr", value
        else:
            signature[key] = "i32"
            if value % 16 == 0:
                aligned.append(key)
    few = call.tile.block_n < 64 and target in (90, 100)
    matrix = {target: "mma.sync" if few else _MATRIX[target]} if "BLOCK_K" in constants else {}
    return Variant(
        name=f"{name}, {'x'.join(map(str, call.tile[:3]))}",
        kernel=call.kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(aligned),
        num_warps=call.tile.num_warps,
        num_stages=call.tile.num_stages,
        matrix=matrix,
        targets=(target,),
    )


def variants() -> Iterator[Variant]:
    """Every case for bf16 x; some of them with a packed x, a whole epilogue, fp16 and fp32."""
    few = ("3x3 of 1x512x7x7", "3x3 of 32x64x56x56", "7x7 of 3 channels", "transposed 4x4 by 2")
    examples = [(name, torch.bfloat16, {}) for name in _CASES]
    examples += [(name, torch.bfloat16, change) for name in few for change in ({"packed": True}, {"full": True})]
    examples += [(name, dtype, {}) for name in few for dtype in (torch.float16, torch.float32)]
    examples += [(name, torch.float32, {"compute": "fp32"}) for name in few]
    for (name, dtype, changes), target in itertools.product(examples, _MATRIX):
        called = ", ".join((name, str(dtype).removeprefix("torch."), *map(str, changes.values())))
        for call in _calls(*_example(name, dtype, **changes), f"sm_{target}"):
            what = called if call.kernel is _conv else f"parts of {called}"
            yield _variant(f"{what}, sm_{target}", call, target)
