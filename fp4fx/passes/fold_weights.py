"""Weights quantized once, at compile time."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule

from fp4fx import ops
from fp4fx.capture import add_constant, arguments, parameter_name
from fp4fx.nvfp4 import check_finite
from fp4fx.packed import PARTS
from fp4fx.pipeline import Context, Folded, op_name


def fold_weights(gm: GraphModule, ctx: Context) -> int:
    """Quantize parameters now and keep the codes in the graph.

    Before: `p, s, g = fp4fx.quantize(parameter, ...)`
    After: `p, s, g` are attributes of the graph; the parameter is read no more
    """
    rewrites = 0
    for node in gm.graph.nodes:
        if op_name(node) != "quantize" or arguments(node)[0] not in ctx.real:
            continue
        source, *rest = arguments(node)
        if any(isinstance(a, torch.fx.Node) for a in rest):
            continue  # a static activation scale, which is an input of its own
        parameter = ctx.real[source].detach()
        check_finite(parameter, parameter_name(gm, source))
        parts = ops.quantize(parameter, *rest)
        constants = [
            add_constant(gm, f"fp4fx_{source.name}_{node.name}_{part}", tensor)
            for part, tensor in zip(PARTS, parts, strict=True)
        ]
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(constants[arguments(user)[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        ctx.folded.append(Folded(ctx.real[source], parts, tuple(rest)))
        ctx.real = {**ctx.real, constants[0]: ctx.real[source]}
        rewrites += 1
    return rewrites
