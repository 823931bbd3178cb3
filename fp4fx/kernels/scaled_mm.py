"""W4A4 linear layers by the library's own NVFP4 matmul, `torch.nn.functional.scaled_mm`, on sm_100 and later.

It multiplies the canonical codes as they lie; the block scales of both sides are put in the library's order at each
call, a ninth of the bytes that the product reads. That costs launches, so that few rows are Triton's: up to how many
says `tuning.native_rows`. It has not run on a GPU: the arguments are held against the library's documentation.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fp4fx.capture import OpOverload
from fp4fx.kernels.triton import swizzle, tuning
from fp4fx.ops.epilogue import finish, is_plain
from fp4fx.ops.library import define_for
from fp4fx.policy import Compute
from fp4fx.registry import Kernel, Request

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_CAPABILITY = 100
_K = 32
_N = 16
_SCALES = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
_ORDER = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]


def refuse(request: Request) -> str | None:
    """Why `linear` cannot take the request, or None."""
    if request.op != "linear":
        return "it multiplies matrices, and nothing else"
    if not request.quantized_input:
        return "the activation is not in 4 bits, and scaled_mm takes both sides in 4 bits"
    if (request.target.capability or 0) < _CAPABILITY:
        return f"{request.target.name} has no 4-bit matrix instruction, which sm_{_CAPABILITY} and later have"
    if request.dtype not in DTYPES:
        return f"found {request.dtype}, scaled_mm gives bfloat16, float16 and float32"
    if request.gradient:
        return "the result requires a gradient and scaled_mm has no backward; run under torch.no_grad()"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, whose kernels multiply few rows"
    if request.k is None or request.n is None or request.k % _K or request.n % _N:
        return f"found K={request.k} (in blocks), N={request.n}; scaled_mm takes multiples of {_K} and {_N}"
    return None


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    x_scale: Tensor | None = None,
    x_global_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    channel_scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    compute: Compute = "bf16",
    *,
    own_rows: int | None = None,
) -> Tensor:
    """As `fp4fx.ops.linear` of packed activations: x u8 [..., K/2], x_scale u8 [..., K/16] -> y [..., N] of `dtype`.

    Products of codes and scales are exact and sums fp32, so `compute` changes nothing. What follows the product is
    computed in fp32 and rounded once; a bias alone is added by the library. Triton's linear does up to `own_rows` rows,
    None: those of `tuning.native_rows`.
    """
    assert x_scale is not None
    assert x_global_scale is not None
    assert dtype is not None
    lead, n = x.shape[:-1], packed.shape[0]
    own_rows = tuning.native_rows(tuning.family_of(packed.device)) if own_rows is None else own_rows
    if math.prod(lead) <= own_rows:
        from fp4fx.kernels.triton.linear import linear as own  # noqa: PLC0415  (which imports Triton)

        return own(x, packed, scale, global_scale, bias, in_features, x_scale, x_global_scale, dtype, channel_scale,
                   residual, activation, compute)  # fmt: skip
    bare = is_plain(dtype, bias, channel_scale, residual, activation) and (bias is None or dtype != torch.float32)
    given = dtype if bare else torch.float32  # to which the library adds no bias
    if math.prod(lead) == 0:
        product = packed.new_empty((0, n), dtype=given)
    else:
        product = F.scaled_mm(
            x.reshape(-1, x.shape[-1]).contiguous().view(torch.float4_e2m1fn_x2),
            packed.contiguous().view(torch.float4_e2m1fn_x2).t(),
            [_blocked(x_scale), x_global_scale],
            _SCALES,
            [_blocked(scale), global_scale],
            _SCALES,
            _ORDER,
            _ORDER,
            bias=bias if bare else None,
            output_dtype=given,
        )
    product = product.view(*lead, n)
    if bare:
        return product
    return finish(product, x.dim() - 1, dtype, bias, channel_scale, residual, activation)


def _blocked(scale: Tensor) -> Tensor:
    """Scales u8 [..., blocks] -> E4M3 in the order of cuBLAS, in whole tiles of 128 rows and 4 blocks."""
    blocked: Tensor = swizzle.to_blocked(scale.reshape(-1, scale.shape[-1]))
    return blocked.view(torch.float8_e4m3fn)


@functools.cache
def _library() -> Any:
    """Defines the op, which lives as long as the library does."""
    library: Any = torch.library.Library("fp4fx_scaled_mm", "DEF")  # type: ignore[no-untyped-call]
    define_for(library, "linear", linear)
    return library


def op() -> OpOverload:
    """`torch.ops.fp4fx_scaled_mm.linear`."""
    _library()
    overload: OpOverload = torch.ops.fp4fx_scaled_mm.linear.default
    return overload


def _meant_for(request: Request) -> bool:
    return request.quantized_input and (request.target.capability or 0) >= _CAPABILITY


def _lower(node: Node) -> None:
    node.target = op()


KERNEL = Kernel(
    name="scaled_mm", ops=frozenset({"linear"}), refuse=refuse, lower=_lower, device="cuda", meant_for=_meant_for
)
"""A choice where both sides are in 4 bits and the GPU multiplies such; on others Triton's kernels emulate it."""
