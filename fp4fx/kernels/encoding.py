"""Whole tensors encoded by the kernel of the device that they are on, with the bits of `nvfp4.quantize`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fp4fx import nvfp4
from fp4fx.kernels.cpu import library
from fp4fx.kernels.triton import eager
from fp4fx.site import Order

KERNELS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor] | None]] = {
    "cpu": library.quantize,
    "cuda": eager.quantize,
}
"""By device type: packed, scale and global scale of a tensor, or None for what a kernel does not take."""


def quantize(
    x: Tensor,
    *,
    scale_rule: str = "max",
    block: tuple[int, int] = (1, nvfp4.BLOCK),
    order: Order = "rows",
    groups: int = 1,
    importance: Tensor | None = None,
) -> nvfp4.NVFP4:
    """`nvfp4.quantize`: by Triton on CUDA, by the CPU's library if that is built, else by the definition itself."""
    kernel = KERNELS.get(x.device.type)
    if kernel is not None and tuple(block) in ((1, nvfp4.BLOCK), (nvfp4.BLOCK, nvfp4.BLOCK)):
        parts = kernel(x.detach(), scale_rule, block[0], order, groups, importance)
        if parts is not None:
            return nvfp4.NVFP4(*parts, x.shape, x.dtype, order, groups)
    return nvfp4.quantize(x, scale_rule=scale_rule, block=block, order=order, groups=groups, importance=importance)
