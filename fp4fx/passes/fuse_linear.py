"""Linear layers on packed weights."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from fp4fx.capture import arguments, emit, substitute, value
from fp4fx.passes.operands import activation_of, cast, no_epilogue, weight_of
from fp4fx.pipeline import Context, aten_name

linear = torch.ops.fp4fx.linear.default


def fuse_linear(gm: GraphModule, ctx: Context) -> int:
    """Let a linear read its weight packed, and its activation too where that is quantized.

    Before: `aten.linear(x, fp4fx.dequantize(p, s, g, [N, K], dtype), bias)`
    After: `fp4fx.linear(x, p, s, g, bias, K, ...)`, or, if x is a dequantize itself,
    `fp4fx.linear(x_packed, p, s, g, bias, K, x_scale, x_global_scale, dtype, ...)`
    """
    rewrites = 0
    for node in list(gm.graph.nodes):
        if aten_name(node) != "linear":
            continue
        x, weight, bias = arguments(node)
        w = weight_of(weight, "rows")
        if w is None:
            continue
        dtype = value(node).dtype
        a = activation_of(gm, x, "rows", dtype, like=node)
        k = w.shape[-1]
        bias = cast(gm, bias, dtype, like=node)
        fused = emit(gm, linear, (a.x, *w.parts, bias, k, *a.scales, *no_epilogue(w)), like=node)
        substitute(node, fused)
        gm.graph.erase_node(node)
        rewrites += 1
    return rewrites
