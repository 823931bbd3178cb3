"""The bits of E2M1 elements and E4M3 scales, and two codes to a byte (see `fp4fx.nvfp4`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

E2M1_MAX, E4M3_MAX, E4M3_MIN = 6.0, 448.0, 2.0**-9  # the smallest subnormal
E4M3_NAN = 0x7F


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
