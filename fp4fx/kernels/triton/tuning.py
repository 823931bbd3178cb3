"""Which tile for which product: by device family, op and bucket of M, N, K."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """How a product is cut: rows of x, rows of W and values of K per program, parts of K, warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


def family_of(device: torch.device) -> str:
    """One of "sm_80", "sm_90", "sm_100" or "sm_120", the nearest to a device, or "interpreter"."""
    if device.type == "cpu":
        return "interpreter"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100" if major < 12 else "sm_120"


def tile(op: str, family: str, m: int, n: int, k: int) -> Tile:
    """The tile for a product [m, k] x [n, k].

    `op` is "gemv", "split_k", "gemm", "conv", or "quantize" and "dequantize" (of m rows); `family` is `family_of`'s.
    """
    if family == "interpreter":
        return Tile(16, 16, 32, 2 if op == "split_k" else 1)
    if op in ("quantize", "dequantize"):
        return Tile(8, 1, 512)
    if op == "gemv":
        return Tile(1, 8, 512)
    if op == "split_k":
        return Tile(16 if m <= 16 else 32 if m <= 32 else 64, 64, 128, 4)
    return Tile(16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128, 64, 128)
