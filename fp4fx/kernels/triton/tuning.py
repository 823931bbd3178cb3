"""Which tile for which product: by device family, op and bucket of M, N, K."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """How a product is cut: rows of x, rows of W and values of K per program, parts of K, warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


def tile(op: str, family: str, m: int, n: int, k: int) -> Tile:
    """The tile for a product [m, k] x [n, k]: `op` is "gemv", "split_k", "gemm", "conv", "quantize"; `family` is "sm_80",
    "sm_90", "sm_100", "sm_120" or "interpreter"."""
    if family == "interpreter":
        return Tile(16, 16, 32, 2 if op == "split_k" else 1)
    if op == "gemv":
        return Tile(1, 8, 512)
    if op == "split_k":
        return Tile(16 if m <= 16 else 32 if m <= 32 else 64, 64, 128, 4)
    return Tile(16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128, 64, 128)
