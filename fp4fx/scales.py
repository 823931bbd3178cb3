"""How the scale of a block is chosen: the rules by name, and the error that each of them makes least.

* "max": s = block_amax/(6g), the block's largest value becomes 6. g = amax/(6·448).
* "four_over_six": s or 1.5 s, so that the largest value becomes 6 or 4, by squared error; "four_over_six_mae": by
  absolute error. Of equals s. Cook et al., "Four Over Six", arXiv 2512.02010.
* "search": of the scales from 3 codes below that of "max" to 7 above, the one of least squared error, the lowest of
  equals. That range holds the best of all scales ("ScaleSweep", arXiv 2606.07618).
* "unbiased": the scales of "search", codes of convolutions such that errors cancel (see `fp4fx.balance`), and g times
  <w, w>/<w, q>. Least squares shrink: what is left of w in the rounded q is too small by about the squared error, and
  that adds up from layer to layer where no norm undoes it.

All but "max" take g = amax/(6·256), which leaves room above.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4fx.codes import E2M1_MAX, E4M3_MAX, E4M3_MIN, E4M3_NAN, decode_e2m1, decode_e4m3, encode_e2m1, encode_e4m3
from fp4fx.errors import LayoutError, PolicyError

BLOCK = 16
LARGEST_SCALE = {"max": E4M3_MAX, "search": 256.0, "four_over_six": 256.0, "four_over_six_mae": 256.0}
"""By rule, the scale of the block that holds the tensor's amax; "unbiased" is "search" with another g."""
UNBIASED = "unbiased"
SEARCH = range(-3, 8)
"""The codes that "search" tries, from that of "max"."""


def searched(scale_rule: str) -> str:
    """The rule that scales of blocks are chosen by: "search" for "unbiased", any other itself."""
    return "search" if scale_rule == UNBIASED else scale_rule


def check_rule(scale_rule: str, block_rows: int = 1, *, weighted: bool = False) -> None:
    """Nothing, if there is such a rule for such a block, with weights of its errors or without.

    Raises:
        PolicyError: there is not.
    """
    if searched(scale_rule) not in LARGEST_SCALE:
        known = ", ".join(map(repr, (*LARGEST_SCALE, UNBIASED)))
        raise PolicyError(f"unknown scale_rule {scale_rule!r}; use one of {known}")
    if block_rows not in (1, BLOCK):
        raise PolicyError(f"a block has 1 or {BLOCK} rows, found block_rows={block_rows}")
    if scale_rule != "max" and block_rows != 1:
        raise PolicyError(
            f"scale_rule={scale_rule!r} chooses a scale per 16 values, and hardly gains where 256 share one; "
            "a 16x16 block needs scale_rule='max'"
        )
    if scale_rule == "max" and weighted:
        raise PolicyError("scale_rule='max' compares no errors that importance could weight; use scale_rule='search'")


def scale_codes(
    blocks: Tensor, block_amax: Tensor, global_scale: Tensor, scale_rule: str, weights: Tensor | None = None
) -> Tensor:
    """Blocks fp32 [..., 16], their maxima fp32 [...] and g fp32 [] -> E4M3 bits u8 [...]; 1 where the maximum is 0.

    Weights fp32 [..., 16] up to 1 (or what broadcasts to it) are factors of the errors, see `weights_of`.
    """
    s = (block_amax / (E2M1_MAX * global_scale)).clamp(E4M3_MIN, E4M3_MAX)
    start = encode_e4m3(torch.where(block_amax == 0, 1.0, s))
    if scale_rule == "max":
        return start
    return torch.where(block_amax == 0, start, _least(blocks, start, s, global_scale, scale_rule, weights))


def _least(
    blocks: Tensor, start: Tensor, s: Tensor, global_scale: Tensor, scale_rule: str, weights: Tensor | None
) -> Tensor:
    """The candidate of the least error, the first of equals.

    Magnitudes count in units of the scale of "max", up to 16, ±Inf as 0; an error is cut to a multiple of 2**-19. So no
    magnitude overflows, and the order of a sum does not matter: the errors are integers.
    """
    unit = decode_e4m3(start)
    x = (finite_abs(blocks) / (unit * global_scale).unsqueeze(-1)).clamp(max=16.0)
    best, least = start, torch.full_like(start, torch.iinfo(torch.int32).max, dtype=torch.int32)
    for tried in _candidates(start, s, scale_rule):
        scale = (decode_e4m3(tried) / unit).unsqueeze(-1)
        error = x - decode_e2m1(encode_e2m1(x / scale)) * scale
        error = error.abs() if scale_rule == "four_over_six_mae" else error.square()
        if weights is not None:
            error = error * weights
        total = (error * 2.0**19).int().sum(-1, dtype=torch.int32)
        best, least = torch.where(total < least, tried, best), torch.minimum(total, least)
    return best


def _candidates(start: Tensor, s: Tensor, scale_rule: str) -> Iterator[Tensor]:
    """Scale bits u8 [...] in the order in which the first of equals is taken; s fp32 [...] is `start` unrounded."""
    if scale_rule == "search":
        for step in SEARCH:
            yield (start.int() + step).clamp(1, E4M3_NAN - 1).to(torch.uint8)
    else:
        yield start
        yield encode_e4m3(s * 1.5)


def weights_of(importance: Tensor, rows: Tensor) -> Tensor:
    """Importance fp32 [K] or [G, K] for rows [..., K] -> weights of their errors in blocks, fp32 [..., ceil(K/16), 16].

    They are relative to the greatest of their block, in which one scale is chosen; all zeros become ones.

    Raises:
        LayoutError: shape, dtype or device do not fit, or there are values that no weight can have.
    """
    k, found = rows.shape[-1], f"{importance.dtype} {tuple(importance.shape)}"
    if importance.dtype != torch.float32 or importance.dim() not in (1, 2) or importance.shape[-1] != k:
        raise LayoutError(f"importance: found {found}, expected fp32 [{k}], or [groups, {k}]; it is one per column")
    if importance.dim() == 2 and (rows.dim() != 2 or not len(importance) or len(rows) % len(importance)):
        raise LayoutError(f"importance: found {found} for rows {tuple(rows.shape)}, expected groups of as many rows")
    if importance.device != rows.device:
        raise LayoutError(f"importance: found it on {importance.device}, expected {rows.device}; move it there")
    if not bool(((importance >= 0) & importance.isfinite()).all()):
        raise LayoutError("importance: found NaN, Inf or negative values, expected a mean of squares; check the inputs")
    blocks = torch.unflatten(pad(importance.detach(), (0, -k % BLOCK)), -1, (-1, BLOCK))
    most = blocks.amax(-1, keepdim=True)
    return torch.where(most == 0, 1.0, blocks / most)


def finite_abs(x: Tensor) -> Tensor:
    """Values float [...] -> magnitudes, 0 for what is not finite."""
    return x.nan_to_num(0.0, 0.0, 0.0).abs()
