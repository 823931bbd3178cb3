"""A product of at most four rows with a packed weight, without the matrix unit: whole words of codes, sums in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from fp4fx.kernels.triton.codec import decode_e4m3
from fp4fx.kernels.triton.epilogue import finish


@triton.jit
def _two(words, SHIFT: tl.constexpr):
    """Words i32 [...] of eight codes -> codes SHIFT / 4 and SHIFT / 4 + 4 times 2**-14, fp32 [...].

    Both are made in one register, as the fp16 values that `codec.decode_e2m1` makes of one.
    """
    w = words >> SHIFT
    both = ((w & 0x00080008) << 12) | ((w & 0x00070007) << 9)
    low = both.to(tl.int16).to(tl.float16, bitcast=True)
    high = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _eight(x_ptr, k, K):
    """Values k + i of a row, k i32 [B] -> for i = 0 to 7, fp32 [1, B] each; zero past K."""
    k = k[:, None] + tl.arange(0, 8)[None, :]
    x = tl.load(x_ptr + k, mask=k < K, other=0.0)
    even, odd = tl.split(x.reshape(1, x.shape[0], 2, 2, 2))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04.to(tl.float32))
    x1, x5 = tl.split(x15.to(tl.float32))
    x2, x6 = tl.split(x26.to(tl.float32))
    x3, x7 = tl.split(x37.to(tl.float32))
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _dot(words, x_ptr, k, K):
    """Words i32 [N, B] of the codes for x from k on, k i32 [B] -> sums of eight products over 2**14, fp32 [N, B]."""
    x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x_ptr, k, K)
    w0, w4 = _two(words, 0)
    w1, w5 = _two(words, 4)
    w2, w6 = _two(words, 8)
    w3, w7 = _two(words, 12)
    return w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3 + w4 * x4 + w5 * x5 + w6 * x6 + w7 * x7


@triton.jit
def gemv(x_ptr, packed_ptr, scale_ptr, global_ptr, out_ptr, channel_scale_ptr, bias_ptr, residual_ptr, N, K, x_row,
         blocks, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_SCALE: tl.constexpr,
         HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """x [M, K] times a packed weight [N, K] -> out [M, N]; one program does BLOCK_N rows of the weight.

    The arguments are those of `gemm.gemm`; the bytes of the weight are aligned to 8. A thread reads the 16 codes of a
    block at once and multiplies their sum by the block's scale.
    """
    BLOCKS: tl.constexpr = BLOCK_K // 16
    tl.static_assert(BLOCKS > 1, "gemv: a tile has two blocks of K or more")
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    start = n.to(tl.int64)[:, None] * blocks
    accs = (tl.zeros((BLOCK_N, BLOCKS), tl.float32),) * M
    for first in range(0, blocks, BLOCKS):
        # Neighbours change places so that every load gives one block to a thread, of x too: no layout is converted.
        block = first + (tl.arange(0, BLOCKS) ^ 1)
        mask = n_mask[:, None] & (block < blocks)[None, :]
        words = tl.load(packed_ptr.to(tl.pointer_type(tl.int64)) + start + block[None, :], mask=mask, other=0)
        factor = decode_e4m3(tl.load(scale_ptr + start + block[None, :], mask=mask, other=0))
        sums = ()
        for m in tl.static_range(M):
            row = x_ptr + m * tl.cast(x_row, tl.int64)
            dot = _dot(words.to(tl.int32), row, block * 16, K)
            dot += _dot((words >> 32).to(tl.int32), row, block * 16 + 8, K)
            sums = sums + (accs[m] + dot * factor,)  # type: ignore[assignment]
        accs = sums
    unit = tl.load(global_ptr) * 16384.0
    for m in tl.static_range(M):
        y = tl.sum(accs[m], axis=1) * unit
        at = m * N + n
        y = finish(y, n, n_mask, channel_scale_ptr, bias_ptr, residual_ptr + at, n_mask, HAS_SCALE, HAS_BIAS,
                   HAS_RESIDUAL, ACTIVATION)  # fmt: skip
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=n_mask)
