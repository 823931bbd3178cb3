"""Weights quantized outside the graph, once for every parameter that it is called with."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fp4fx.capture import add_input, arguments, parameter_name
from fp4fx.folding import Folded, Leaf, computed
from fp4fx.nvfp4 import check_finite
from fp4fx.packed import PARTS
from fp4fx.passes.fold_parameters import program_of
from fp4fx.passes.insert_qdq import SETTLED
from fp4fx.pipeline import Context, op_name


def fold_weights(gm: GraphModule, ctx: Context) -> int:
    """Take the codes of a parameter as inputs, so that it is encoded when it changes and not on every call.

    Before: `p, s, g = fp4fx.quantize(parameter, ...)`, or of a weight that `insert_qdq` takes as it is computed
    After: `p, s, g` are inputs of the graph; the parameter is read no more
    """
    rewrites = 0
    inputs = gm.graph.find_nodes(op="placeholder")
    for node in list(gm.graph.nodes):
        if op_name(node) != "quantize":
            continue
        source, *rest = arguments(node)
        if any(isinstance(a, Node) for a in rest):
            continue
        encode: Callable[..., tuple[Tensor, ...]] = partial(_encode, arguments=tuple(rest))
        parameter = ctx.real.get(source)
        program = program_of(gm, ctx, source) if SETTLED in node.meta else None
        leaves: tuple[Leaf, ...]
        if isinstance(parameter, nn.Parameter):
            dense: Tensor = parameter
            leaves = (Leaf(inputs.index(source) if source in inputs else None, parameter),)
        elif program is not None:
            compute, leaves = program
            encode = partial(_encode_computed, compute=compute, arguments=tuple(rest))
            (dense,) = computed(compute, [leaf.tensor for leaf in leaves])
            parameter = max((leaf.tensor for leaf in leaves if isinstance(leaf.tensor, nn.Parameter)), key=Tensor.numel)
        else:
            continue
        check_finite(dense.detach(), parameter_name(gm, source))
        codes = computed(encode, [leaf.tensor for leaf in leaves])
        parts = [add_input(gm, f"{source.name}_{part}", t) for part, t in zip(PARTS, codes, strict=True)]
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(parts[arguments(user)[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        ctx.folded.append(Folded(leaves, encode, codes))
        ctx.real = {**ctx.real, parts[0]: parameter}
        rewrites += 1
    return rewrites


def _encode(parameter: Tensor, *, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of a parameter; `arguments` is what `fp4fx::quantize` takes after it."""
    codes: tuple[Tensor, Tensor, Tensor] = torch.ops.fp4fx.quantize.default(parameter.detach(), *arguments)
    return codes


def _encode_computed(
    *tensors: Tensor, compute: Callable[..., tuple[Tensor, ...]], arguments: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of what is computed from parameters and buffers."""
    (dense,) = compute(*tensors)
    return _encode(dense, arguments=arguments)
