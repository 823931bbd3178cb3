"""Weights quantized outside the graph, once for every parameter that it is called with."""

from __future__ import annotations

import operator

from torch import nn
from torch.fx import GraphModule, Node

from fp4fx import ops
from fp4fx.capture import add_input, arguments, parameter_name
from fp4fx.nvfp4 import check_finite
from fp4fx.packed import PARTS
from fp4fx.pipeline import Context, Folded, op_name


def fold_weights(gm: GraphModule, ctx: Context) -> int:
    """Take the codes of a parameter as inputs, so that it is encoded when it changes and not on every call.

    Before: `p, s, g = fp4fx.quantize(parameter, ...)`
    After: `p, s, g` are inputs of the graph; the parameter is read no more
    """
    rewrites = 0
    inputs = gm.graph.find_nodes(op="placeholder")
    for node in list(gm.graph.nodes):
        if op_name(node) != "quantize":
            continue
        source, *rest = arguments(node)
        parameter = ctx.real.get(source)
        if not isinstance(parameter, nn.Parameter) or any(isinstance(a, Node) for a in rest):
            continue
        check_finite(parameter.detach(), parameter_name(gm, source))
        codes = ops.quantize(parameter.detach(), *rest)
        parts = [add_input(gm, f"{source.name}_{part}", t) for part, t in zip(PARTS, codes, strict=True)]
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(parts[arguments(user)[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        ctx.folded.append(Folded(parameter, inputs.index(source) if source in inputs else None, tuple(rest), codes))
        ctx.real = {**ctx.real, parts[0]: parameter}
        rewrites += 1
    return rewrites
