"""The order in which cuBLAS reads block scales: tiles of 128 rows and 4 blocks, each of 512 consecutive bytes.

The scale of row r and block c lies at
`((r // 128) · ⌈blocks / 4⌉ + c // 4) · 512 + (r % 32) · 16 + (r % 128 // 32) · 4 + c % 4`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def padded(rows: int, blocks: int) -> tuple[int, int]:
    """The rows and blocks of whole tiles."""
    return -(-rows // 128) * 128, -(-blocks // 4) * 4


def to_blocked(scale: Tensor) -> Tensor:
    """Scales u8 [rows, blocks] -> u8 [padded rows * padded blocks], zeros where there was nothing."""
    rows, blocks = scale.shape
    high, wide = padded(rows, blocks)
    tiles = pad(scale, (0, wide - blocks, 0, high - rows)).view(high // 128, 4, 32, wide // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).flatten()


def from_blocked(blocked: Tensor, rows: int, blocks: int) -> Tensor:
    """u8 [padded rows * padded blocks] -> scales u8 [rows, blocks]: the inverse of `to_blocked`."""
    high, wide = padded(rows, blocks)
    tiles = blocked.view(high // 128, wide // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high, wide)[:rows, :blocks].contiguous()
