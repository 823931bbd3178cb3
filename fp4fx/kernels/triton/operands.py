"""Tiles of operands inside Triton kernels, from where they lie in memory.

A product over K does not care about the order of K. Byte j of a packed row holds the values 2j and 2j + 1, so a tile of
bytes decodes to two operands, the even values and the odd ones, and a product is two dots: low · even + high · odd.
Nothing is interleaved, and the bytes are the canonical ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4fx.kernels.triton.codec import operand, operand_scale


@triton.jit
def packed_tile(packed_ptr, scale_ptr, row, row_mask, block, end, row_blocks, OP: tl.constexpr, BLOCKS: tl.constexpr,
                PTX: tl.constexpr, RUN: tl.constexpr = 0):  # fmt: skip
    """Blocks `block`, `block + 1`, ... of some packed rows -> their even and odd values over `codec.unit(OP)`.

    Args:
        packed_ptr, scale_ptr: u8 [.., row_blocks * 8] and [.., row_blocks], contiguous.
        row, row_mask: i32 or i64 [R], which rows; a row without its mask is zero.
        block, end: scalars, the first block and the one that is past the last: from `end` on all is zero.
        row_blocks: scalar, ceil(K/16).
        OP: dtype of the operands, bf16, fp16 or fp32.
        BLOCKS: blocks of the tile, a power of two.
        PTX: decode by inline PTX (bf16 and fp16), which the interpreter cannot run; the same bits.
        RUN: the order of K, the same for both operands of a dot: see `spread`.

    Returns:
        (low, high), both OP [R, BLOCKS * 8].
    """
    codes, scale = load_packed(packed_ptr, scale_ptr, row, row_mask, block, end, row_blocks, BLOCKS)
    return halves(codes, operand_scale(scale, OP), OP, PTX, RUN)


@triton.jit
def load_packed(packed_ptr, scale_ptr, row, row_mask, block, end, row_blocks, BLOCKS: tl.constexpr):
    """The bytes of `packed_tile`: codes u8 [R, BLOCKS * 8], scale u8 [R, BLOCKS]."""
    start = row.to(tl.int64)[:, None] * row_blocks
    byte = block * 8 + tl.arange(0, BLOCKS * 8)[None, :]
    codes = tl.load(packed_ptr + start * 8 + byte, mask=row_mask[:, None] & (byte < end * 8), other=0)
    of = block + tl.arange(0, BLOCKS)[None, :]
    scale = tl.load(scale_ptr + start + of, mask=row_mask[:, None] & (of < end), other=0)
    return codes, scale


@triton.jit
def spread(tile, RUN: tl.constexpr):
    """[R, C] -> the same values, within each 64 columns in the order in which 16 neighbours come to one thread.

    Four threads share a row of a matrix unit's left operand, each holds RUN neighbours of every 4 * RUN columns. In
    this order those are whole blocks: a thread decodes two scales where it would decode eight, and reads 16 bytes at
    once. RUN is 2 for wgmma, 4 for mma.sync with an operand made of bytes. With 0, or fewer than 32 columns, nothing
    moves.
    """
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    GROUP: tl.constexpr = 64 if columns % 64 == 0 else 32
    if RUN == 0 or columns % GROUP != 0:
        return tile
    else:
        runs = tile.reshape(rows, columns // GROUP, 4, GROUP // 4 // RUN, RUN)
        return runs.permute(0, 1, 3, 2, 4).reshape(rows, columns)


@triton.jit
def halves(codes, factor, OP: tl.constexpr, PTX: tl.constexpr, RUN: tl.constexpr = 0):
    """Bytes u8 [R, B * 8] and `codec.operand_scale` OP [R, B] -> (low, high) OP [R, B * 8], see `packed_tile`."""
    rows: tl.constexpr = factor.shape[0]
    blocks: tl.constexpr = factor.shape[1]
    factor = spread(tl.broadcast_to(factor[:, :, None], (rows, blocks, 8)).reshape(rows, blocks * 8), RUN)
    codes = spread(codes, RUN)
    if PTX and OP == tl.bfloat16:
        return tl.inline_asm_elementwise(DECODE_BF16, _REGISTERS, [codes, factor], (tl.bfloat16, tl.bfloat16), True, 4)
    elif PTX and OP == tl.float16:
        return tl.inline_asm_elementwise(DECODE_FP16, _REGISTERS, [codes, factor], (tl.float16, tl.float16), True, 4)
    else:
        return operand(codes, factor, OP), operand(codes >> 4, factor, OP)


# Four bytes $4 and a factor for each in $5, $6 -> operands of their low codes $0, $1, of their high codes $2, $3.
# A byte fills both halves of 16 bits: the sign of its high code is in place, that of the low one 4 bits away, and the
# magnitudes are a shift away from where the exponent ends and the mantissa begins. 0xEA: a & b | c.
_DECODE = """{{
.reg .b32 w, s, m, z;
mov.b32 z, 0x80008000;
prmt.b32 w, $4, $4, 0x1100;
{high}; and.b32 m, m, {mask}; lop3.b32 m, w, 0x80008000, m, 0xEA; {multiply}.rn.{pair} $2, m, $5{plus};
{low}; and.b32 m, m, {mask}; shl.b32 s, w, 4; lop3.b32 m, s, 0x80008000, m, 0xEA; {multiply}.rn.{pair} $0, m, $5{plus};
prmt.b32 w, $4, $4, 0x3322;
{high}; and.b32 m, m, {mask}; lop3.b32 m, w, 0x80008000, m, 0xEA; {multiply}.rn.{pair} $3, m, $6{plus};
{low}; and.b32 m, m, {mask}; shl.b32 s, w, 4; lop3.b32 m, s, 0x80008000, m, 0xEA; {multiply}.rn.{pair} $1, m, $6{plus};
}}"""
# bf16x2 has no multiplication before sm_90; adding -0 keeps every product, -0 included.
_REGISTERS = tl.constexpr("=r,=r,=r,=r,r,r,r")
DECODE_BF16 = tl.constexpr(
    _DECODE.format(
        high="shl.b32 m, w, 2", low="shr.b32 m, w, 2", mask="0x01C001C0", multiply="fma", pair="bf16x2", plus=", z"
    )
)
DECODE_FP16 = tl.constexpr(
    _DECODE.format(
        high="shr.b32 m, w, 3", low="shl.b32 m, w, 1", mask="0x0E000E00", multiply="mul", pair="f16x2", plus=""
    )
)


@triton.jit
def pair_tile(x_ptr, row, row_mask, pair, K, OP: tl.constexpr, PAIRS: tl.constexpr, RUN: tl.constexpr = 0):
    """Values 2j and 2j + 1 of some rows, j in `pair` -> (even, odd), both OP [P, R]: the right-hand sides of dots.

    Args:
        x_ptr: bf16, fp16 or fp32; values of a row lie side by side.
        row, row_mask: i32 or i64 [R], the distance of each row from x_ptr, in pairs with PAIRS and in values without;
            a row without its mask is zero.
        pair: i32 [P].
        K: scalar, values of a row; what is past them is zero.
        OP: dtype of the operands; a 16-bit x is exact in its own dtype and in fp32.
        PAIRS: 0, or 2, 4, 8, 16: read two 16-bit values at once. x_ptr and the rows are aligned to two values, and K is
            a multiple of PAIRS.
        RUN: that of the `packed_tile` it is multiplied with.
    """
    if PAIRS:
        half = tl.multiple_of(K // 2, PAIRS // 2)  # lets a vector of PAIRS values have one mask
        at = x_ptr.to(tl.pointer_type(tl.int32)) + row[None, :] + pair[:, None]
        pairs = tl.load(at, mask=row_mask[None, :] & (pair < half)[:, None], other=0)
        return split_pairs(spread(pairs.T, RUN).T, x_ptr.dtype.element_ty, OP)
    else:
        pair = spread(pair[None, :], RUN).reshape(pair.shape[0])  # single values are read in any order
        at = x_ptr + row[None, :] + 2 * pair[:, None]
        even = tl.load(at, mask=row_mask[None, :] & (2 * pair < K)[:, None], other=0.0)
        odd = tl.load(at + 1, mask=row_mask[None, :] & (2 * pair + 1 < K)[:, None], other=0.0)
        return even.to(OP), odd.to(OP)


@triton.jit
def split_pairs(pairs, X: tl.constexpr, OP: tl.constexpr):
    """Two 16-bit values of dtype X in an i32 [...] -> (even, odd) OP [...]."""
    if X == tl.bfloat16 and OP == tl.float32:
        return (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        even = pairs.to(tl.int16).to(X, bitcast=True)
        odd = (pairs >> 16).to(tl.int16).to(X, bitcast=True)
        return even.to(OP), odd.to(OP)
