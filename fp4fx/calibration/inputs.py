"""The input of an op as the rows that its weight's rows are multiplied with: convolutions by unfolding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4fx import nvfp4
from fp4fx.observe import Call


def input_rows(call: Call, limit: int) -> Tensor:
    """A call of a linear or convolution -> inputs fp32 [G, P, K], samples first, so that output = inputs · rowsᵀ.

    The K values are in the order of `nvfp4.to_rows`; G is the number of groups of a convolution, or of matrices that
    the op read of a stack; P is the number of positions (samples times places), or `limit` of them evenly spaced.
    """
    if call.site.op.startswith("conv"):
        return _unfolded(call, limit)
    x = call.x.float() if call.weight.dim() > 2 else call.x.float().flatten(0, -2).unsqueeze(0)
    x = x.reshape(-1, *x.shape[-2:])
    x = x if x.shape[1] <= limit else x[:, _evenly(x.shape[1], limit, x.device)]
    if call.site.order == "conv":  # a convolution that is run as a linear
        x = torch.unflatten(x, -1, (call.site.shape[1], -1)).transpose(-1, -2).flatten(-2)
    return x


def weight_rows(call: Call) -> Tensor:
    """The weight as the op read it -> [G, N/G, K] in its dtype, as `input_rows` has its input."""
    site, weight = call.site, call.weight
    if site.op.startswith("conv"):
        rows = nvfp4.to_rows(weight, site.order, site.groups)
        return rows.reshape(site.groups, -1, rows.shape[-1])
    if site.order == "conv" and weight.numel() == site.numel:
        weight = nvfp4.to_rows(weight.reshape(site.shape), "conv")
    return weight.reshape(-1, *weight.shape[-2:])


def _unfolded(call: Call, limit: int) -> Tensor:
    """The windows of a convolution's input, [G, P, K]; a transposed one reads its input with zeros between."""
    a, x, kernel = call.arguments, call.x.float(), call.weight.shape[2:]
    rank = len(kernel)
    stride, padding, dilation, extra = (
        list(a[name]) * (1 if len(a[name]) == rank else rank)
        for name in ("stride", "padding", "dilation", "output_padding")
    )
    low = high = padding
    if a["transposed"]:
        sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True)]
        apart = x.new_zeros(*x.shape[:2], *sizes)
        places = tuple(slice(None, None, s) for s in stride)
        apart[(slice(None), slice(None), *places)] = x
        x, stride = apart, [1] * rank
        low = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        high = [p + e for p, e in zip(low, extra, strict=True)]
    x = pad(x, [size for pair in zip(reversed(low), reversed(high), strict=True) for size in pair])
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    windows = x.movedim(1, 1 + rank)  # [B, *s', C, *k], a view
    shape = windows.shape[: 1 + rank]
    chosen = _evenly(shape.numel(), limit, x.device)
    picked = windows[torch.unravel_index(chosen, shape)]
    if a["transposed"]:
        picked = picked.flip(tuple(range(2, 2 + rank)))
    grouped = torch.unflatten(picked, 1, (a["groups"], -1))  # [P, G, C/G, *k]
    return grouped.movedim(2, -1).flatten(2).transpose(0, 1).contiguous()


def _evenly(count: int, limit: int, device: torch.device) -> Tensor:
    """int64 [min(count, limit)]: so many of 0 … count - 1, evenly spaced."""
    chosen = min(count, limit)
    return torch.arange(chosen, device=device) * count // max(chosen, 1)
