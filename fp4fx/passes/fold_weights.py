"""Weights quantized outside the graph, once for every parameter that it is called with."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fp4fx.capture import add_input, arguments, parameter_name
from fp4fx.folding import Folded, Leaf, computed
from fp4fx.nvfp4 import check_finite
from fp4fx.packed import PARTS
from fp4fx.pipeline import Context, op_name


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
        encode = partial(_encode, arguments=tuple(rest))
        codes = computed(encode, [parameter])
        parts = [add_input(gm, f"{source.name}_{part}", t) for part, t in zip(PARTS, codes, strict=True)]
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(parts[arguments(user)[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        leaf = Leaf(inputs.index(source) if source in inputs else None, parameter)
        ctx.folded.append(Folded((leaf,), encode, codes))
        ctx.real = {**ctx.real, parts[0]: parameter}
        rewrites += 1
    return rewrites


def _encode(parameter: Tensor, *, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of a parameter; `arguments` is what `fp4fx::quantize` takes after it."""
    codes: tuple[Tensor, Tensor, Tensor] = torch.ops.fp4fx.quantize.default(parameter.detach(), *arguments)
    return codes
