"""The kernels of `conv`: one tile of a convolution, and the sum of its parts."""

from __future__ import annotations

import triton
import triton.language as tl

from fp4fx.kernels.triton.codec import operand, operand_scale, unit
from fp4fx.kernels.triton.epilogue import finish
from fp4fx.kernels.triton.operands import halves, packed_tile, split_pairs


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
    return split_pairs(x, x_ptr.dtype.element_ty, OP)


@triton.jit
def _value(x_ptr, x_scale_ptr, pixel, channel, x_blocks, mask, OP: tl.constexpr):
    """One value for each pixel and channel: `pixel` values from x_ptr, or of that packed row -> OP like `mask`."""
    if x_scale_ptr is None:
        return tl.load(x_ptr + pixel + channel, mask=mask, other=0.0).to(OP)
    else:
        row = pixel * x_blocks
        codes = tl.load(x_ptr + row * 8 + channel // 2, mask=mask, other=0).to(tl.int32) >> channel % 2 * 4
        scale = tl.load(x_scale_ptr + row + channel // 16, mask=mask, other=0)
        return operand(codes, operand_scale(scale, OP), OP)


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
        return halves(codes, operand_scale(scale, OP), OP, PTX)
    else:
        return packed_tile(packed_ptr, scale_ptr, row, row_mask, block, end, row_blocks, OP, BLOCKS, PTX)


@triton.jit
def _unit(global_ptr, x_global_ptr, OP: tl.constexpr):
    """What sums of products of operands are multiplied by, fp32."""
    factor = tl.load(global_ptr) * unit(OP)
    if x_global_ptr is not None:
        factor = factor * (tl.load(x_global_ptr) * unit(OP))
    return factor


@triton.jit
def conv_kernel(  # noqa: PLR0915
                x_ptr, x_scale_ptr, x_global_ptr, packed_ptr, scale_ptr, global_ptr, channel_scale_ptr, bias_ptr,
                residual_ptr, y_ptr, groups, rows, channels, row_blocks, x_blocks, batch, in0, in1, in2, out0, out1,
                out2, x_image, x0, x1, x2, y_image, y_channel, y0, y1, y2, y_part, parts,
                KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
                COMMON: tl.constexpr, INVERSE: tl.constexpr, BOUNDED: tl.constexpr, TRANSPOSED: tl.constexpr,
                PHASES: tl.constexpr, FLAT: tl.constexpr, FOURS: tl.constexpr, PAIRS: tl.constexpr,
                PART: tl.constexpr, ACTIVATION: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
                PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
                even, odd = packed_tile(x_ptr, x_scale_ptr, at, mask, group * blocks + of_tap,
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
        y = finish(acc * _unit(global_ptr, x_global_ptr, OP), n[:, None], n_mask[:, None], channel_scale_ptr,
                   bias_ptr, residual_ptr + at if residual_ptr is not None else at, mask,
                   channel_scale_ptr is not None, bias_ptr is not None, residual_ptr is not None,
                   ACTIVATION)  # fmt: skip
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(parts_ptr, x_global_ptr, global_ptr, channel_scale_ptr, bias_ptr, residual_ptr, y_ptr, size, rows,
               inner, parts, ACTIVATION: tl.constexpr, OP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums fp32 [parts, size] -> y [size] as it lies in memory: value i is of channel i // inner % rows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    part = parts_ptr + at
    product = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        product += tl.load(part, mask=mask, other=0.0)
        part += size
    y = finish(product * _unit(global_ptr, x_global_ptr, OP), at // inner % rows, mask, channel_scale_ptr,
               bias_ptr, residual_ptr + at if residual_ptr is not None else at, mask,
               channel_scale_ptr is not None, bias_ptr is not None, residual_ptr is not None,
               ACTIVATION)  # fmt: skip
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
