"""A product with a packed weight on the matrix unit: yᵀ = W · xᵀ, so that the decoded weight stays in registers.

`gemm` does all of K in one program, or its share of it, which `reduce` then adds up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4fx.kernels.triton.codec import unit
from fp4fx.kernels.triton.epilogue import finish
from fp4fx.kernels.triton.operands import load_packed, packed_tile, pair_tile


@triton.jit
def _dot(w, x, acc, PRECISE: tl.constexpr):
    """w · x + acc, fp32 [N, M]. PRECISE: an fp32 x in two parts of 11 bits, a decoded w has 6."""
    if PRECISE:
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        low = tl.where(tl.abs(x) < float("inf"), x - high, 0.0)
        return tl.dot(w, high, tl.dot(w, low, acc, input_precision="tf32"), input_precision="tf32")
    else:
        return tl.dot(w, x, acc, input_precision="tf32")


@triton.jit(do_not_specialize=["M"])
def gemm(x_ptr, x_scale_ptr, x_global_ptr, packed_ptr, scale_ptr, global_ptr, out_ptr, channel_scale_ptr, bias_ptr,
         residual_ptr, M, N, K, x_row, blocks, OP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
         BLOCK_K: tl.constexpr, X_PACKED: tl.constexpr, PAIRS: tl.constexpr, PRECISE: tl.constexpr,
         PTX: tl.constexpr, RUN: tl.constexpr, NATIVE: tl.constexpr, PARTIAL: tl.constexpr, HAS_SCALE: tl.constexpr,
         HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """x [M, K] times a packed weight [N, K] -> out [M, N], contiguous; program (tile of N and M, part of K).

    Args:
        x_ptr: [M, K] bf16, fp16 or fp32, rows `x_row` apart (in pairs with PAIRS); with X_PACKED u8 [M, blocks * 8].
        x_scale_ptr, x_global_ptr: u8 [M, blocks] and fp32 [], read with X_PACKED.
        packed_ptr, scale_ptr, global_ptr: u8 [N, blocks * 8], u8 [N, blocks], fp32 [].
        out_ptr: [M, N]; with PARTIAL fp32 [parts, M, N] for `reduce`.
        channel_scale_ptr, bias_ptr, residual_ptr: [N], [N], [M, N] of any float dtype.
        OP, PAIRS, PTX, RUN: see `operands`. PRECISE: see `_dot`.
        NATIVE: with X_PACKED, let the matrix unit read the codes (sm_100 and later).
    """
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)  # programs that share a weight tile run side by side
    m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n_mask, m_mask = n < N, m < M
    BLOCKS: tl.constexpr = BLOCK_K // 16
    each = tl.cdiv(tl.cdiv(blocks, BLOCKS), tl.num_programs(1)) * BLOCKS
    first = tl.program_id(1) * each
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, tl.minimum(first + each, blocks), BLOCKS):
        if NATIVE:
            w, ws = load_packed(packed_ptr, scale_ptr, n, n_mask, block, blocks, blocks, BLOCKS)
            x, xs = load_packed(x_ptr, x_scale_ptr, m, m_mask, block, blocks, blocks, BLOCKS)
            ws, xs = ws.to(tl.float8e4nv, bitcast=True), xs.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot_scaled(w, ws, "e2m1", x.T, xs, "e2m1", acc)
        else:
            low, high = packed_tile(packed_ptr, scale_ptr, n, n_mask, block, blocks, blocks, OP, BLOCKS, PTX, RUN)
            if X_PACKED:
                even, odd = packed_tile(x_ptr, x_scale_ptr, m, m_mask, block, blocks, blocks, OP, BLOCKS, PTX, RUN)
                even, odd = even.T, odd.T
            else:
                pair = block * 8 + tl.arange(0, BLOCK_K // 2)
                even, odd = pair_tile(x_ptr, m.to(tl.int64) * x_row, m_mask, pair, K, OP, PAIRS, RUN)
            acc = _dot(low, even, acc, PRECISE)
            acc = _dot(high, odd, acc, PRECISE)
    factor = tl.load(global_ptr)
    if X_PACKED:
        factor = factor * tl.load(x_global_ptr)
    if not NATIVE:
        factor = factor * unit(OP)
        if X_PACKED:
            factor = factor * unit(OP)
    mask = n_mask[:, None] & m_mask[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    y = acc * factor
    if PARTIAL:
        tl.store(out_ptr + tl.program_id(1).to(tl.int64) * M * N + at, y, mask=mask)
    else:
        y = finish(y, n[:, None], n_mask[:, None], channel_scale_ptr, bias_ptr, residual_ptr + at, mask,
                   HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)  # fmt: skip
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "parts"])
def reduce(part_ptr, out_ptr, channel_scale_ptr, bias_ptr, residual_ptr, M, N, parts, BLOCK: tl.constexpr,
           HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
           ACTIVATION: tl.constexpr):  # fmt: skip
    """Sum of [parts, M, N] (fp32, or one part of the result's dtype, also in place) and epilogue -> out [M, N]."""
    columns = tl.cdiv(N, BLOCK)
    m = (tl.program_id(0) // columns).to(tl.int64)  # not an axis of the grid, which has 65535 programs at most
    n = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    at = m * N + n
    total = tl.load(part_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for _ in range(1, parts):
        part_ptr += M.to(tl.int64) * N
        total += tl.load(part_ptr + at, mask=mask, other=0.0)
    y = finish(total, n, mask, channel_scale_ptr, bias_ptr, residual_ptr + at, mask, HAS_SCALE, HAS_BIAS,
               HAS_RESIDUAL, ACTIVATION)  # fmt: skip
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
