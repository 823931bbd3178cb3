"""The kernels of `quantize`: the greatest value, and one tile of x to packed codes and scales.

A program reads a tile of whole blocks once: block maxima, scales, codes, and two codes to a byte. The even and the odd
values of a row are apart from the load on, so that packing needs no exchange between threads. Where the bits are those
of `nvfp4.quantize_rows`, no product may be contracted with a sum: they are launched with `EXACT`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4fx.kernels.triton.codec import decode_e2m1, decode_e4m3, encode_e2m1, encode_e4m3

_INFINITY = tl.constexpr(0x7F800000)

# --- pieces -----------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(t, rows, columns, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Number of a tile -> rows i64 [ROWS, 1, 1] of x, whether its matrix has them, and blocks i32 [1, BLOCKS, 1].

    A tile ends with its matrix of `rows` rows; `columns` tiles lie side by side.
    """
    high = tl.cdiv(rows, ROWS)
    down = t // columns
    inside = (down % high) * ROWS + tl.arange(0, ROWS)[:, None, None]
    row = (down // high).to(tl.int64) * rows + inside
    block = (t % columns) * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
    return row, inside < rows, block


@triton.jit
def _load(x_ptr, at, mask):
    """Values as fp32, zeros outside of the mask; those of bf16 by their bits, which the interpreter also has exact."""
    if x_ptr.dtype.element_ty == tl.bfloat16:
        bits = tl.load(x_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + at, mask=mask, other=0)
        x = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _halves(x_ptr, hadamard_ptr, row, row_ok, block, stride, k, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
            WHOLE: tl.constexpr, HADAMARD: tl.constexpr):  # fmt: skip
    """The even and the odd values of a tile, fp32 [ROWS, BLOCKS, 8] each; zeros beyond the edges.

    WHOLE: k and the stride are whole blocks, the stride counts them, and pairs of values are read as words.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    unit: tl.constexpr = 16 if WHOLE else 1
    if HADAMARD:
        i = tl.arange(0, 16)
        x = _load(x_ptr, row * stride * unit + block * 16 + i, row_ok & (block * 16 + i < k))
        flat = tl.reshape(x, (ROWS * BLOCKS, 16))
        at = i[:, None] * 16 + 2 * tl.arange(0, 8)[None, :]
        even = tl.reshape(tl.dot(flat, tl.load(hadamard_ptr + at), input_precision="ieee"), (ROWS, BLOCKS, 8))
        odd = tl.reshape(tl.dot(flat, tl.load(hadamard_ptr + at + 1), input_precision="ieee"), (ROWS, BLOCKS, 8))
    elif WHOLE:
        word: tl.constexpr = tl.int64 if dtype == tl.float32 else tl.int32
        at = (row * stride + block) * 8 + tl.arange(0, 8)[None, None, :]
        pair = tl.load(x_ptr.to(tl.pointer_type(word), bitcast=True) + at, mask=row_ok & (block * 16 < k), other=0)
        if dtype == tl.float32:
            even = pair.to(tl.int32).to(tl.float32, bitcast=True)
            odd = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        elif dtype == tl.bfloat16:
            even = (pair << 16).to(tl.float32, bitcast=True)
            odd = (pair & -65536).to(tl.float32, bitcast=True)
        else:
            even = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            odd = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        i = block * 16 + 2 * tl.arange(0, 8)[None, None, :]
        even = _load(x_ptr, row * stride + i, row_ok & (i < k))
        odd = _load(x_ptr, row * stride + i + 1, row_ok & (i + 1 < k))
    return even, odd


@triton.jit
def _magnitude(x):
    """Values fp32 -> the bits of their magnitudes i32, which are ordered like them; infinities give 0, NaN the most."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(bits == _INFINITY, 0, bits)


@triton.jit
def _stochastic_e2m1(x, random):
    """Values fp32 [...] and random u32 [...] -> codes i32 [...]: of the two neighbours the nearer one oftener.

    The mean is the value, up to 6 where it saturates; NaN gives 0.
    """
    bits = x.to(tl.int32, bitcast=True)
    a = tl.minimum(tl.abs(x), 6.0)
    t = tl.where(a < 2.0, a * 2.0, tl.where(a < 4.0, a, a * 0.5))  # codes in steps of one
    below = t.to(tl.int32)
    up = (random >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 < t - below.to(tl.float32)
    code = below + tl.where(a < 2.0, 0, tl.where(a < 4.0, 2, 4)) + up.to(tl.int32)
    code = code | tl.where((bits < 0) & (bits & 0x7FFFFFFF != 0), 8, 0)
    return tl.where(bits & 0x7FFFFFFF > _INFINITY, 0, code)


@triton.jit
def _least(even, odd, start, s, g, RULE: tl.constexpr):
    """Halves fp32 [R, B, 8], scales of "max" i32 [R, B] and unrounded -> those of the rule, as `scales` finds them."""
    unit = decode_e4m3(start)
    whole = (unit * g)[:, :, None]
    even = tl.minimum(tl.div_rn(_finite_abs(even), whole), 16.0)
    odd = tl.minimum(tl.div_rn(_finite_abs(odd), whole), 16.0)
    best = start
    least = tl.full(start.shape, 0x7FFFFFFF, tl.int32)
    steps: tl.constexpr = 11 if RULE == "search" else 2
    for step in range(steps):  # not unrolled: registers are for the values
        if RULE == "search":
            tried = tl.minimum(tl.maximum(start + (step - 3), 1), 0x7E)
        else:
            tried = tl.where(step == 0, start, encode_e4m3(s * 1.5).to(tl.int32))
        ratio = tl.div_rn(decode_e4m3(tried), unit)[:, :, None]
        error = tl.sum(_error(even, ratio, RULE) + _error(odd, ratio, RULE), 2)
        best = tl.where(error < least, tried, best)
        least = tl.minimum(error, least)
    return best


@triton.jit
def _error(x, s, RULE: tl.constexpr):
    """Magnitudes fp32 in steps of s -> the error of their codes in units of 2**-19, squared or not, i32."""
    difference = x - decode_e2m1(encode_e2m1(tl.div_rn(x, s))) * s
    error = tl.abs(difference) if RULE == "four_over_six_mae" else difference * difference
    return (error * 524288.0).to(tl.int32)


@triton.jit
def _finite_abs(x):
    """Magnitudes fp32, 0 where there is none."""
    bits = _magnitude(x)
    return tl.where(bits > _INFINITY, 0, bits).to(tl.float32, bitcast=True)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def amax_kernel(x_ptr, hadamard_ptr, out_ptr, rows, k, stride, columns, tiles, limit, ROWS: tl.constexpr,
                 BLOCKS: tl.constexpr, WHOLE: tl.constexpr, HADAMARD: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """The greatest finite magnitude of every `num_programs`-th tile, fp32 [programs]; LAST: the global scale."""
    most = tl.zeros((ROWS, BLOCKS, 8), tl.int32)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, row_ok, block = _tile(t, rows, columns, ROWS, BLOCKS)
        even, odd = _halves(x_ptr, hadamard_ptr, row, row_ok, block, stride, k, ROWS, BLOCKS, WHOLE, HADAMARD)
        even, odd = _magnitude(even), _magnitude(odd)
        most = tl.maximum(most, tl.where(even > _INFINITY, 0, even))
        most = tl.maximum(most, tl.where(odd > _INFINITY, 0, odd))
    result = tl.max(tl.reshape(most, (ROWS * BLOCKS * 8,)), 0).to(tl.float32, bitcast=True)
    if LAST:
        g = tl.maximum(tl.div_rn(result, limit), 1.1754943508222875e-38)  # 2**-126
        result = tl.where(result == 0.0, 1.0, g)
    tl.store(out_ptr + tl.program_id(0), result)


@triton.jit
def quantize_kernel(x_ptr, global_ptr, hadamard_ptr, packed_ptr, scale_ptr, used_ptr, seed_ptr, rows, k, stride,
                    columns, blocks, ROWS: tl.constexpr, BLOCKS: tl.constexpr, TALL: tl.constexpr, WHOLE: tl.constexpr,
                     RULE: tl.constexpr, HADAMARD: tl.constexpr, STOCHASTIC: tl.constexpr, SWIZZLED: tl.constexpr,
                     COPY: tl.constexpr):  # fmt: skip
    """One tile of x -> its packed codes and scales. TALL: a scale is that of 16 rows; COPY: also the global scale.

    RULE: the scale rule.

    The seed, i64 [], is read with STOCHASTIC.
    """
    t = tl.program_id(0)
    g = tl.load(global_ptr)
    if COPY:
        tl.store(used_ptr, g, mask=t == 0)
    row, row_ok, block = _tile(t, rows, columns, ROWS, BLOCKS)
    even, odd = _halves(x_ptr, hadamard_ptr, row, row_ok, block, stride, k, ROWS, BLOCKS, WHOLE, HADAMARD)

    most = tl.max(tl.maximum(_magnitude(even), _magnitude(odd)), 2)
    if TALL:
        tall = tl.max(tl.reshape(most, (ROWS // 16, 16, BLOCKS)), 1)
        most = tl.reshape(tl.broadcast_to(tall[:, None, :], (ROWS // 16, 16, BLOCKS)), (ROWS, BLOCKS))
    amax = most.to(tl.float32, bitcast=True)
    if STOCHASTIC:
        amax = amax * 1.0625  # a stored scale lies at most 1/17 below: nothing saturates, which would bias the mean
    s = tl.div_rn(amax, 6.0 * g)
    s = tl.minimum(tl.maximum(s, 0.001953125), 448.0)
    scale = encode_e4m3(tl.where(most == 0, 1.0, s)).to(tl.int32)
    scale = tl.where(most > _INFINITY, 0x7F, scale)
    if RULE != "max":
        scale = tl.where((most == 0) | (most > _INFINITY), scale, _least(even, odd, scale, s, g, RULE))

    step = (decode_e4m3(scale) * g)[:, :, None]
    even, odd = tl.div_rn(even, step), tl.div_rn(odd, step)
    byte = (row * blocks + block) * 8 + tl.arange(0, 8)[None, None, :]
    if STOCHASTIC:
        first, second, _, _ = tl.randint4x(tl.load(seed_ptr), byte)
        low, high = _stochastic_e2m1(even, first), _stochastic_e2m1(odd, second)
    else:
        low, high = encode_e2m1(even), encode_e2m1(odd)
    mask = row_ok & (block < blocks)
    tl.store(packed_ptr + byte, (low | (high << 4)).to(tl.uint8), mask=mask)

    at = row * blocks + block
    if SWIZZLED:
        tile = (row // 128) * tl.cdiv(blocks, 4) + block // 4
        at = tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + block % 4
    tl.store(scale_ptr + at, scale[:, :, None].to(tl.uint8), mask=mask)
