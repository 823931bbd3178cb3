"""Norms in evaluation behind convolutions on dense weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fp4fx.capture import arguments, emit, needs_gradient, substitute, value
from fp4fx.passes.fold_parameters import MOST, constant_inputs
from fp4fx.passes.operands import cast
from fp4fx.passes.vectors import Vectors
from fp4fx.pipeline import Context, aten_name, op_name

aten = torch.ops.aten


def fold_norms(gm: GraphModule, ctx: Context) -> int:
    """Let the weight and bias of a dense convolution hold what a norm behind it would do on every call.

    The new weight is a second copy, so large ones are left alone; so is a graph without any fused op. Under freezing
    Inductor does the same.

    Before: `y = aten.conv2d(x, w, b, ...)`, `y = aten.batch_norm(y, weight, shift, mean, var, ...)`
    After: `aten.conv2d(x, w · scale, (b - mean) · scale + shift, ...)` with `scale = weight · rsqrt(var + eps)`
    """
    if ctx.freezing or not any(op_name(node) in ("linear", "conv", "conv_transpose") for node in gm.graph.nodes):
        return 0
    constant = set(constant_inputs(gm, ctx))
    rewrites = 0
    for norm in gm.graph.nodes:
        conv = _convolution_of(norm, constant)
        if conv is None:
            continue
        _, weight, bias, *_ = arguments(conv)
        vectors = Vectors(gm, conv)
        scale, shift = vectors.normed(norm, bias)
        assert scale is not None
        dtype = value(weight).dtype
        column = emit(gm, aten.reshape.default, (scale, [-1, *[1] * (value(weight).dim() - 1)]), like=conv)
        wide = cast(gm, weight, torch.float32, like=conv)
        scaled = emit(gm, aten.mul.Tensor, (wide, column), like=conv)
        conv.update_arg(1, cast(gm, scaled, dtype, like=conv))
        conv.update_arg(2, cast(gm, shift, dtype, like=conv))
        substitute(norm, conv)
        gm.graph.erase_node(norm)
        rewrites += 1
    return rewrites


def _convolution_of(norm: Node, constant: set[Node]) -> Node | None:
    """The convolution that can take over a norm behind it; None if there is none."""
    if aten_name(norm) != "batch_norm" or needs_gradient(norm):
        return None
    conv, *affine, training, _, eps = arguments(norm)[:8]
    if aten_name(conv) not in ("conv1d", "conv2d", "conv3d") or len(conv.users) != 1 or training:
        return None
    if isinstance(eps, Node):  # under dynamic=True Dynamo may take floats for inputs at first
        return None
    x, weight, bias, *_ = arguments(conv)
    own: list[Any] = [weight, *affine[2:], *(n for n in (bias, *affine[:2]) if n is not None)]
    fits = (
        all(node in constant for node in own)
        and not needs_gradient(conv)
        and value(x).dim() == value(weight).dim()
        and value(weight).numel() <= MOST
        and value(norm).dtype == value(conv).dtype != torch.float64
    )
    return conv if fits else None
