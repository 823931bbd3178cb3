"""The ops `fp4fx_triton::*`: the kernels with the schemas and fakes of `fp4fx::*`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fp4fx.capture import OpOverload
from fp4fx.kernels.triton import OPS, conv, dequantize, linear, quantize
from fp4fx.ops.library import Body, define_for
from fp4fx.registry import Request

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

BODIES: dict[str, Body] = {
    "conv": conv.conv,
    "conv_transpose": conv.conv_transpose,
    "dequantize": dequantize.dequantize,
    "embedding": dequantize.embedding,
    "linear": linear.linear,
    "quantize": quantize.quantize,
}
"""The kernels by op, with its arguments."""


def refuse(request: Request) -> str | None:
    """What one op cannot do that the others can."""
    if request.op in ("conv", "conv_transpose"):
        return conv.refuse(request.groups, request.n, request.padding)
    if request.op == "quantize":
        return quantize.refuse_quantize(request.scale_rule)
    return None


@functools.cache
def _library() -> Any:
    """Defines the ops; on the CPU they run where Triton's interpreter does."""
    library: Any = torch.library.Library("fp4fx_triton", "DEF")
    for name in OPS:
        define_for(library, name, BODIES[name])
    return library


def op(name: str) -> OpOverload:
    """`torch.ops.fp4fx_triton.<name>`."""
    _library()
    overload: OpOverload = getattr(torch.ops.fp4fx_triton, name).default
    return overload
