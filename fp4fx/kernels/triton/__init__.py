"""Kernels in Triton for NVIDIA GPUs from sm_80 on: the packed weight is decoded on its way into the product.

They read canonical bytes, so that a model moves between devices without a change of layout. `codec.py` holds what they
share; `tuning.py` says which tile a product gets; `program.py` has the ops of programs for AOTInductor, for whose sake
kernels call functions by their own names, not through a module: Inductor copies the sources of those. Importing this
package does not import Triton.
"""

from __future__ import annotations

import importlib.util

import torch
from torch.fx import Node

from fp4fx import capture
from fp4fx.registry import Kernel, Request
from fp4fx.target import Target

_OLDEST = 80
"""Compute capability, times ten, from which on there are bf16 products and asynchronous copies."""


def missing(target: Target) -> str | None:
    """Why no kernel here runs on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "this is torch for ROCm, the kernels are for NVIDIA GPUs"
    if target.capability is not None and target.capability < _OLDEST:
        return f"found {target.name} (sm_{target.capability}), the kernels need sm_{_OLDEST} or newer"
    return None


def _refuse(request: Request) -> str | None:
    if (reason := missing(request.target)) is not None:
        return reason
    from fp4fx.kernels.triton import library  # noqa: PLC0415  (which imports Triton)

    if request.dtype not in library.DTYPES:
        return f"found {request.dtype}, the kernels take float32, bfloat16 and float16"
    if request.gradient:
        return "the result requires a gradient and the kernels have no backward; run under torch.no_grad()"
    return library.refuse(request)


def _lower(node: Node) -> None:
    from fp4fx.kernels.triton import library  # noqa: PLC0415

    name = node.target._opname  # type: ignore[union-attr]
    node.target = library.op(name)
    if name == "dequantize":
        capture.never_fold(node.target)


OPS = ("conv", "conv_transpose", "dequantize", "embedding", "linear", "quantize")

KERNEL = Kernel(name="triton", ops=frozenset(OPS), refuse=_refuse, lower=_lower, device="cuda")
"""Every op but fake_quantize, whose gradient passes straight through."""
