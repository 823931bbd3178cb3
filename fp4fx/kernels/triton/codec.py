"""E2M1 and E4M3 inside Triton kernels.

Integer arithmetic that the interpreter, every NVIDIA GPU since sm_80 and `fp4fx.nvfp4` agree on bit by bit. Scales are
uint8 throughout, since sm_80 has no fp8 pointers. The plain-PyTorch twin of each piece is the function of the same name
in `fp4fx.nvfp4`.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(16)
"""Values that share a scale."""


@triton.jit
def decode_e4m3(byte):
    """E4M3 bits, any integer dtype [...] -> values fp32 [...]."""
    bits = byte.to(tl.int32)
    magnitude = bits & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(bits & 0x80 != 0, -value, value)


@triton.jit
def encode_e4m3(x):
    """Values fp32 [...] -> E4M3 bits u8 [...]: nearest, ties to even, saturating at 448; NaN gives 0x7F or 0xFF."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    capped = tl.minimum(magnitude, 0x43E00000)  # 448
    normal = ((capped + 0x7FFFF + ((capped >> 20) & 1)) >> 20) - (120 << 3)
    # At 2**14 the spacing of fp32 is 2**-9, that of subnormal E4M3: the addition rounds, the low bits are the answer.
    subnormal = (capped.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    byte = tl.where(capped < (121 << 23), subnormal, normal)  # 2**-6
    byte = tl.where(magnitude > 0x7F800000, 0x7F, byte)
    return (byte | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_e2m1(code):
    """Codes, any integer dtype [...] (bits 0 to 3) -> values fp32 [...]."""
    return _half(code).to(tl.float32) * 16384.0


@triton.jit
def encode_e2m1(x):
    """Values fp32 [...] -> codes i32 [...]: nearest, ties to the even code, saturating at 6; NaN gives 0.

    Below 1 codes step by 1/2, which adding 2**22 rounds to; from 1 on a code is two bits of the exponent and one of the
    mantissa, rounded where they lie.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    capped = tl.minimum(magnitude, 0x40C00000)  # 6
    small = (capped.to(tl.float32, bitcast=True) + 4194304.0).to(tl.int32, bitcast=True) & 7
    large = ((capped + 0x1FFFFF + ((capped >> 22) & 1)) >> 22) - (126 << 1)
    code = tl.where(capped < 0x3F800000, small, large)
    code = code | tl.where((bits < 0) & (magnitude != 0), 8, 0)
    return tl.where(magnitude > 0x7F800000, 0, code)


@triton.jit
def _half(code):
    """Codes -> values fp16 times 2**-14: E2M1's bits are the last of fp16's exponent and the first of its mantissa."""
    c = code.to(tl.int32)
    return (((c & 8) << 12) | ((c & 7) << 9)).to(tl.int16).to(tl.float16, bitcast=True)


# --- operands of a product --------------------------------------------------------------------------------------------
# A code times its scale has six significant bits, so it is exact in bf16 and fp16. The bits of a code are those of a
# very small number; its scale makes up for as much of that as its own range allows, the epilogue for the rest (`unit`).


@triton.jit
def operand_scale(byte, OP: tl.constexpr):
    """E4M3 bits [...] -> the factors of `operand`, OP [...]."""
    if OP == tl.bfloat16:
        return (decode_e4m3(byte) * 3.323069e35).to(tl.bfloat16)  # 2**118: the largest scale stays finite
    elif OP == tl.float16:
        return (decode_e4m3(byte) * 128.0).to(tl.float16)
    else:
        return decode_e4m3(byte) * 16384.0


@triton.jit
def operand(code, factor, OP: tl.constexpr):
    """Codes, integers [...] (bits 0 to 3), and `operand_scale` -> code times scale, exact, over `unit`: OP [...]."""
    c = code.to(tl.int32)
    if OP == tl.bfloat16:
        bits = ((c & 8) << 12) | ((c & 7) << 6)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True) * factor
    elif OP == tl.float16:
        return _half(c) * factor
    else:
        return _half(c).to(tl.float32) * factor


@triton.jit
def unit(OP: tl.constexpr):
    """What products with an `operand` are multiplied by, fp32."""
    if OP == tl.bfloat16:
        return 256.0
    elif OP == tl.float16:
        return 128.0
    else:
        return 1.0
