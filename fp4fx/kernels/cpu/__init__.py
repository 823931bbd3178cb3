"""Kernels in C++ for x86-64: the packed weight is decoded on its way into the product, at every instruction set.

`csrc/api.h` says what a kernel takes and gives; one `tier.cpp` is compiled per instruction set, `dispatch.cpp` chooses
at run time, and `binding.cpp` is the only file that knows torch.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fp4fx import capture
from fp4fx.kernels.cpu import fused, library
from fp4fx.registry import Kernel, Request
from fp4fx.scales import LARGEST_SCALE

_FEW = 8
"""Results per group of a convolution from which on its kernels are worth it."""


def _refuse(request: Request) -> str | None:
    if request.dtype not in library.DTYPES:
        return f"found {request.dtype}, the kernels take float32, bfloat16 and float16"
    if request.gradient:
        return "the result requires a gradient and the kernels have no backward; run under torch.no_grad()"
    if request.groups > 1 and request.n is not None and request.n // request.groups < _FEW:
        return f"{request.groups} groups of {request.n // request.groups} channels leave most of a vector empty"
    if any(padding < 0 for padding in request.padding):
        return f"negative padding {request.padding}"
    if request.op == "quantize" and request.scale_rule not in LARGEST_SCALE:
        return f"scale_rule={request.scale_rule!r} is the op's own body around the kernel"
    return library.load()  # last: it may build


def _lower(node: Node) -> None:
    name = node.target._opname  # type: ignore[union-attr]
    node.target = getattr(torch.ops.fp4fx_cpu, name).default
    if name == "linear":
        fused.quantize_inside(node)
    if name == "dequantize":
        capture.never_fold(node.target)


KERNEL = Kernel(name="cpu", ops=frozenset(library.OPS), refuse=_refuse, lower=_lower, rounds=True, device="cpu")
"""Every op but fake_quantize, whose gradient passes straight through."""
