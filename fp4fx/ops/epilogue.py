"""What follows a product inside one op: channel scale, bias, residual, activation, in fp32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4fx.policy import Compute

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
}


def is_plain(
    dtype: torch.dtype, bias: Tensor | None, channel_scale: Tensor | None, residual: Tensor | None, activation: str
) -> bool:
    """Whether nothing follows the product but a bias of its own dtype, which the library's op adds."""
    biased = bias is not None and bias.dtype != dtype
    return channel_scale is None and residual is None and activation == "none" and not biased


def check_epilogue(residual: Tensor | None, dtype: torch.dtype, activation: str, compute: str) -> None:
    """Refuse an unknown activation or precision, and a residual of another dtype than the result's."""
    torch._check(
        activation in ACTIVATIONS,
        lambda: f"activation: found {activation!r}, expected one of {', '.join(ACTIVATIONS)}",
    )
    computes = get_args(Compute)
    torch._check(compute in computes, lambda: f"compute: found {compute!r}, expected one of {', '.join(computes)}")
    if residual is not None:
        torch._check(
            residual.dtype == dtype, lambda: f"residual: found {residual.dtype}, expected the result's dtype, {dtype}"
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a product and its epilogue are computed in: fp32, and fp64 for itself."""
    return torch.promote_types(dtype, torch.float32)


def finish(
    product: Tensor,
    axis: int,
    dtype: torch.dtype,
    bias: Tensor | None,
    channel_scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """activation(channel_scale · product + bias + residual), in fp32 (fp64 with an fp64 product), rounded to `dtype`.

    Args:
        product: [..., N, ...] with the N channels along `axis`.
        axis: the channels' axis in the product, not negative.
        dtype: of the result and the residual.
        bias: [N] of any float dtype, or None.
        channel_scale: [N] of any float dtype, or None.
        residual: of the product's shape, or None.
        activation: a key of `ACTIVATIONS`.
    """
    shape = [1] * product.dim()
    shape[axis] = product.shape[axis]
    y = product.to(torch.promote_types(wide(product.dtype), dtype))
    if channel_scale is not None:
        y = y * channel_scale.to(y.dtype).reshape(shape)
    if bias is not None:
        y = y + bias.to(y.dtype).reshape(shape)
    if residual is not None:
        same = residual.dim() == y.dim() and all(a == b for a, b in zip(residual.shape, y.shape, strict=True))
        torch._check(same, lambda: f"residual: found {list(residual.shape)}, expected the result's {list(y.shape)}")
        y = y + residual.to(y.dtype)
    return ACTIVATIONS[activation](y).to(dtype)
