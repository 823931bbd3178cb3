"""fake_quantize split into its two halves."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fp4fx.capture import arguments, emit, needs_gradient, value
from fp4fx.dataflow import VIEWS
from fp4fx.dataflow import op_name as name_of
from fp4fx.pipeline import Context, op_name

quantize = torch.ops.fp4fx.quantize.default
dequantize = torch.ops.fp4fx.dequantize.default


def expose_qdq(gm: GraphModule, ctx: Context) -> int:
    """Split fake_quantize where nothing needs its gradient; where something does, it stays whole, straight through.

    Before: `y = fp4fx.fake_quantize(x, g, order, groups, ...)`
    After: `p, s, g = fp4fx.quantize(x, g, order, groups, ...)`,
    `y = fp4fx.dequantize(p, s, g, x.shape, x.dtype, order, groups, compute)`
    """
    rewrites = 0
    for node in gm.graph.nodes:
        if op_name(node) != "fake_quantize" or _needs_gradient(node):
            continue
        given = arguments(node)
        x, global_scale, order, groups, *rest, compute = given + _DEFAULTS[len(given) :]
        whole = emit(gm, quantize, (x, global_scale, order, groups, *rest), like=node)
        parts = [emit(gm, operator.getitem, (whole, i), like=node) for i in range(3)]
        shape = list(value(x).shape)
        if any(isinstance(size, torch.SymInt) for size in shape):
            shape = [
                emit(gm, torch.ops.aten.sym_size.int, (x, dim), like=node) if isinstance(size, torch.SymInt) else size
                for dim, size in enumerate(shape)
            ]
        dense = emit(gm, dequantize, (*parts, shape, value(x).dtype, order, groups, compute), like=node)
        node.replace_all_uses_with(dense)
        rewrites += 1
    return rewrites


def _needs_gradient(node: Node) -> bool:
    """Whether a gradient flows through; asked of what was captured, not of the grad mode that the passes run under."""
    return bool(value(arguments(node)[0]).requires_grad) and any(map(feeds_gradient, node.users))


_DEFAULTS: tuple[Any, ...] = (None, None, "rows", 1, "max", 1, "bf16")


def feeds_gradient(node: Node) -> bool:
    """Whether a call that reads a parameter does so under gradients; a view says so in any mode, as Dynamo has it."""
    return any(map(feeds_gradient, node.users)) if name_of(node) in VIEWS else needs_gradient(node)
