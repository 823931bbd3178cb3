"""Codes of a convolution chosen so that errors cancel where the convolution adds them up.

Nearest values have the least error each, but inputs of a convolution are alike: over the taps of a channel, since a
picture is smooth, and over a row, since what an activation lets through is positive. For E[x xᵀ] = v (I + a Σ_c 1_c
1_cᵀ + b 1 1ᵀ), c the taps of one channel, the error e of a row of weights makes an error of the output of

    v (Σ e² + a Σ_c (Σ_{t in c} e)² + b (Σ e)²).

b = 1/2 is that of max(x, 0) of a Gaussian x (μ²/σ² = .467), a = 1 that of neighbours with a correlation of 1/2. Values
move to their other neighbour in E2M1 while that makes less of it, first those that lose least, first for the sums of
channels and then for those of rows. After SQuant (Guo et al., arXiv 2202.07471), which does so for integers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4fx.codes import E4M3_NAN, decode_e2m1, decode_e4m3, pack, unpack
from fp4fx.scales import BLOCK

CHANNEL, ROW = (1, 1), (1, 2)
"""The weight of a sum of errors, beside the errors themselves, as a fraction: a and b."""
_ZERO = 7  # the place of 0 among the 15 values of E2M1 in their order
_MOST = 1 << 62


def balanced(rows: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor, taps: int) -> Tensor:
    """Rows float [N, taps*C] and their encoded form (see `nvfp4.quantize_rows`) -> packed, some codes moved by one.

    Counts in integers of g/1024, of which every value in NVFP4 is a multiple: any order of a sum gives the same bits.
    Blocks that are NaN and values that are not finite stay.
    """
    n, k = rows.shape
    rows = rows.float()
    codes = unpack(packed)[:, :k]
    below = codes & 7
    place = torch.where(codes > _ZERO, _ZERO - below.int(), _ZERO + below.int())
    s = torch.where(scale == E4M3_NAN, 0.0, decode_e4m3(scale)).mul(512).int().repeat_interleave(BLOCK, -1)[:, :k]
    w = (rows / global_scale * 1024).round()
    w = torch.where((s > 0) & rows.isfinite(), w.nan_to_num(0.0, 0.0, 0.0).int(), _doubled(place) * s)
    moved = place
    if taps > 1:
        w_, moved, s_ = (t.reshape(n, taps, k // taps).transpose(1, 2) for t in (w, moved, s))
        moved = _moved(w_, moved, s_, CHANNEL).transpose(1, 2).reshape(n, k)
    moved = _moved(w, moved, s, ROW)
    there = torch.where(moved < _ZERO, 2 * _ZERO + 1 - moved, moved - _ZERO).to(torch.uint8)
    return pack(pad(torch.where(moved == place, codes, there), (0, -k % BLOCK)))


def _doubled(place: Tensor) -> Tensor:
    """Twice the E2M1 value at each place int [...]."""
    magnitude = decode_e2m1(torch.arange(8, dtype=torch.uint8, device=place.device)).mul(2).int()
    values = torch.cat([-magnitude.flip(0), magnitude[1:]])
    return values.index_select(0, place.flatten()).view(place.shape)


def _moved(w: Tensor, place: Tensor, s: Tensor, weight: tuple[int, int]) -> Tensor:
    """Places int [..., L] of w in units of s, moved towards a sum of errors over L that counts by `weight`."""
    q = _doubled(place) * s
    error = w - q
    total = error.sum(-1, keepdim=True)
    way = total.sign().int()
    other = (place + way).clamp(0, 2 * _ZERO)
    step, towards = (_doubled(other) * s - q) * way, error * way
    loss = step.long() - 2 * towards
    length = w.shape[-1]
    numbered = loss * length + torch.arange(length, device=w.device)
    most = min(length, 4 * math.isqrt(length) + 4)  # moves in a row, several times what random errors need
    least, order = torch.where((step > 0) & (towards > 0), numbered, _MOST).topk(most, largest=False)
    step, loss = step.gather(-1, order).long(), least.div(length, rounding_mode="floor")
    rest = total.abs() - (step.cumsum(-1) - step)
    better = (weight[0] * (2 * rest - step) > weight[1] * loss) & (least < _MOST)
    taken = better.int().cumprod(-1) > 0
    return place.scatter(-1, order, torch.where(taken, other.gather(-1, order), place.gather(-1, order)))
