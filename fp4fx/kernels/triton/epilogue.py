"""What follows a product inside a Triton kernel: scale, bias, residual, activation, in fp32 and rounded once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """By exp of a negative number, which does not overflow."""
    t = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -y, y)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """An activation by its name in `fp4fx.ops.epilogue.ACTIVATIONS`, fp32 [...]; a NaN stays one."""
    if ACTIVATION == "none":
        return y
    elif ACTIVATION == "relu":
        return tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "relu6":
        return tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y))
    elif ACTIVATION == "silu":
        return y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-y))
    elif ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * y * (1.0 + _tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))
    else:
        tl.static_assert(ACTIVATION == "hardswish" or ACTIVATION == "hardsigmoid", "unknown activation")
        gate = tl.where(y < -3, 0.0, tl.where(y > 3, 6.0, y + 3.0)) * 0.16666666666666666
        if ACTIVATION == "hardsigmoid":
            return gate
        else:
            return y * gate


@triton.jit
def finish(product, n, n_mask, scale_ptr, bias_ptr, residual_ptrs, mask, HAS_SCALE: tl.constexpr,
           HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """activation(channel_scale · product + bias + residual), fp32.

    Args:
        product: fp32 [rows, columns] or [columns, rows], already times the global scales.
        n, n_mask: the channels, shaped to broadcast against it.
        scale_ptr, bias_ptr: [N] of any float dtype; read if HAS_SCALE, HAS_BIAS.
        residual_ptrs, mask: like the product; read if HAS_RESIDUAL.
    """
    y = product
    if HAS_SCALE:
        y = y * tl.load(scale_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y = y + tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    return activate(y, ACTIVATION)
