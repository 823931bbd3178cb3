"""Autograd of the ops: straight through the roundings; gradients for activations and biases only.

An op with an epilogue beyond its bias has no gradient: the compiler makes such ops where none is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp4fx.errors import GradientError
from fp4fx.ops.library import LIBRARY, Body
from fp4fx.site import Order


def _nones(n: int) -> tuple[None, ...]:
    return (None,) * n


def _save_epilogue(ctx: Any, channel_scale: Tensor | None, residual: Tensor | None, activation: str, _: str) -> None:
    given = {"channel_scale": channel_scale is not None, "residual": residual is not None, activation: True}
    ctx.epilogue = [name for name, found in given.items() if found and name != "none"]


def _require_no_epilogue(ctx: Any) -> None:
    if ctx.epilogue:
        raise GradientError(
            f"fp4fx ops have no gradient with {', '.join(ctx.epilogue)}; apply these after the op, or call it under "
            "torch.no_grad()"
        )


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, global_scale, bias, k, *rest = inputs
    _save_epilogue(ctx, *rest[-4:])
    ctx.save_for_backward(packed, scale, global_scale)
    ctx.k, ctx.dtype, ctx.biased = k, x.dtype, bias is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _require_no_epilogue(ctx)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.fp4fx.dequantize.default(*ctx.saved_tensors, (grad.shape[-1], ctx.k), ctx.dtype)
        grad_x = grad.to(ctx.dtype) @ weight
    if ctx.biased and ctx.needs_input_grad[4]:
        grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
    return grad_x, None, None, None, grad_bias, *_nones(8)


def _convolution_gradients(
    ctx: Any, grad: Tensor, order: Order, weight_shape: tuple[int, ...], arguments: tuple[Any, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and the bias; `arguments` are aten.convolution's from stride on."""
    _require_no_epilogue(ctx)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        groups = arguments[-1]
        weight = torch.ops.fp4fx.dequantize.default(*ctx.saved_tensors, weight_shape, ctx.dtype, order, groups)
        like = weight.new_empty(1).expand(ctx.x_shape)
        grad_y, mask = grad.to(ctx.dtype), [True, False, False]
        grad_x = torch.ops.aten.convolution_backward(grad_y, like, weight, [0], *arguments, mask)[0]
    if ctx.biased and ctx.needs_input_grad[4]:
        grad_bias = grad.sum([d for d in range(grad.dim()) if d != 1])
    return grad_x, grad_bias


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, global_scale, bias, channels, kernel_size, *geometry = inputs
    ctx.save_for_backward(packed, scale, global_scale)
    ctx.x_shape, ctx.dtype, ctx.biased = x.shape, x.dtype, bias is not None
    ctx.channels, ctx.kernel_size, ctx.geometry = channels, kernel_size, geometry[:-7]
    _save_epilogue(ctx, *geometry[-4:])


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    stride, padding, dilation, groups = ctx.geometry
    shape = (grad.shape[1], ctx.channels // groups, *ctx.kernel_size)
    arguments = (stride, padding, dilation, False, [0] * len(stride), groups)
    grad_x, grad_bias = _convolution_gradients(ctx, grad, "conv", shape, arguments)
    return grad_x, None, None, None, grad_bias, *_nones(13)


def _conv_transpose_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    stride, padding, output_padding, dilation, groups = ctx.geometry
    shape = (ctx.channels, grad.shape[1] // groups, *ctx.kernel_size)
    arguments = (stride, padding, dilation, True, output_padding, groups)
    grad_x, grad_bias = _convolution_gradients(ctx, grad, "conv_transpose", shape, arguments)
    return grad_x, None, None, None, grad_bias, *_nones(14)


def register_autograd() -> None:
    """Attach the formulas to the ops; called once, when the ops are defined."""
    table: dict[str, tuple[Body, Body]] = {
        "fake_quantize": (lambda ctx, grad: (grad, *_nones(6)), lambda ctx, inputs, output: None),
        "linear": (_linear_backward, _save_linear),
        "conv": (_conv_backward, _save_convolution),
        "conv_transpose": (_conv_transpose_backward, _save_convolution),
    }
    for name, (backward, save) in table.items():
        torch.library.register_autograd(f"fp4fx::{name}", backward, setup_context=save, lib=LIBRARY)
