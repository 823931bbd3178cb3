"""Convolutions on packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fp4fx.capture import arguments, emit, substitute, value
from fp4fx.passes.operands import activation_of, cast, no_epilogue, weight_of
from fp4fx.pipeline import Context, aten_name, op_name

aten = torch.ops.aten
conv = torch.ops.fp4fx.conv.default
conv_transpose = torch.ops.fp4fx.conv_transpose.default


def fuse_conv(gm: GraphModule, ctx: Context) -> int:
    """Let a convolution, plain or transposed, read its weight packed, and its activation too where that is quantized.

    Before: `aten.conv2d(x, fp4fx.dequantize(p, s, g, [N, C, 3, 3], dtype, "conv"), bias, [1, 1], [1, 1], [1, 1], 1)`
    After: `fp4fx.conv(x, p, s, g, bias, C, [3, 3], [1, 1], [1, 1], [1, 1], 1, ...)`
    """
    rewrites = 0
    for node in list(gm.graph.nodes):
        name = aten_name(node) or ""
        if name in ("conv1d", "conv2d", "conv3d"):
            rewrites += _fuse(gm, ctx, node, transposed=False)
        elif name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
            rewrites += _fuse(gm, ctx, node, transposed=True)
    return rewrites


def _fuse(gm: GraphModule, ctx: Context, node: Node, *, transposed: bool) -> bool:
    x, weight, bias, *geometry = arguments(node)
    w = weight_of(weight, "conv_transpose" if transposed else "conv")
    if w is None:
        return False
    kernel = list(w.shape[2:])
    dtype = value(node).dtype
    unbatched = value(x).dim() == len(kernel) + 1
    if unbatched:
        x = emit(gm, aten.unsqueeze.default, (x, 0), like=node)
    if transposed:
        stride, padding, output_padding, groups, dilation = geometry
        target, tail = conv_transpose, [stride, padding, output_padding, dilation, groups]
        channels = w.shape[0]
    else:
        stride, padding, dilation, groups = geometry
        if isinstance(padding, str):
            if op_name(x) == "dequantize" and padding == "same" and _uneven(kernel, dilation):
                ctx.refusals[weight] = "padding='same' is uneven here and would pad a packed activation"
                return False
            x, padding = numeric_padding(gm, x, padding, kernel, dilation, like=node)
        target, tail = conv, [stride, padding, dilation, groups]
        channels = w.shape[1] * groups
    a = activation_of(gm, x, "channels", dtype, like=node)
    bias = cast(gm, bias, dtype, like=node)
    args = (a.x, *w.parts, bias, channels, kernel, *tail, *a.scales, *no_epilogue(w))
    fused = emit(gm, target, args, like=node)
    if unbatched:
        fused = emit(gm, aten.squeeze.dim, (fused, 0), like=node)
    substitute(node, fused)
    gm.graph.erase_node(node)
    return True


def _total(kernel: list[int], dilation: list[int]) -> list[int]:
    """Zeros that padding="same" adds along every axis."""
    return [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]


def _uneven(kernel: list[int], dilation: list[int]) -> bool:
    return any(total % 2 for total in _total(kernel, dilation))


def numeric_padding(
    gm: GraphModule, x: Node, padding: str, kernel: list[int], dilation: list[int], *, like: Node
) -> tuple[Node, list[Any]]:
    """Numbers for padding="same" or "valid"; where "same" is uneven the odd zero goes last, by a pad of its own."""
    if padding == "valid":
        return x, [0] * len(kernel)
    totals = _total(kernel, dilation)
    if not _uneven(kernel, dilation):
        return x, [total // 2 for total in totals]
    pads = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return emit(gm, aten.constant_pad_nd.default, (x, pads), like=like), [0] * len(kernel)
