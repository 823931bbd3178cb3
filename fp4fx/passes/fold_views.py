"""Views of decoded weights."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fp4fx.capture import arguments, emit, mutated, storages, substitute, value
from fp4fx.dataflow import CUTS, SPLITS, TRANSPOSES, cuts_rows, gathers, permutation
from fp4fx.dataflow import op_name as name_of
from fp4fx.pipeline import Context, op_name
from fp4fx.site import Order

aten = torch.ops.aten
dequantize = torch.ops.fp4fx.dequantize.default

_TURNED: dict[str, Order] = {"rows": "columns", "columns": "rows"}


def fold_views(gm: GraphModule, ctx: Context) -> int:
    """Decode a view of a weight in the place of the whole: its transpose, some of its rows, matrices of a stack.

    Nothing is folded where the decoded weight is written to.

    Before: `aten.t(fp4fx.dequantize(p, s, g, [K, N], dtype, "columns"))`, `fp4fx.dequantize(p, s, g, [E, N, K])[i]`
    After: `fp4fx.dequantize(p, s, g, [N, K], dtype, "rows")`, `fp4fx.dequantize(p[i], s[i], g, [N, K])`
    """
    written = set().union(*map(mutated, gm.graph.nodes))
    rewrites = 0
    for node in list(gm.graph.nodes):
        split = _split_of(node)
        weight: Any = (split or node).args[0] if (split or node).args else None
        if not isinstance(weight, Node) or op_name(weight) != "dequantize":
            continue
        packed, scale, global_scale, shape, dtype, order, *rest = arguments(weight)
        if (
            order not in _TURNED
            or not all(isinstance(size, int) for size in shape)
            or storages([value(weight)]) & written
        ):
            continue
        if name_of(node) in TRANSPOSES:
            order = _turned(permutation(node, len(shape)), order)
            if order is None:
                continue
        elif name_of(node) in ("contiguous", "detach"):
            if not value(weight).is_contiguous(memory_format=node.kwargs.get("memory_format", torch.contiguous_format)):
                continue
        elif _gathers(node) or (len(shape) > (order == "columns") + 1 and _is_cut(node, split)):
            packed, scale = (_same_view(gm, node, split, part) for part in (packed, scale))
        else:
            continue
        sizes = [
            emit(gm, aten.sym_size.int, (packed, dim), like=node) if isinstance(size, torch.SymInt) else size
            for dim, size in enumerate(value(node).shape)
        ]
        decoded = emit(gm, dequantize, (packed, scale, global_scale, sizes, dtype, order, *rest), like=node)
        substitute(node, decoded)
        for gone in (node, split):
            if gone is not None and not gone.users:
                gm.graph.erase_node(gone)
        rewrites += 1
    return rewrites


def _gathers(node: Node) -> bool:
    """True if a node picks matrices of a stack by their numbers; of a mask codes and scales would not know one size."""
    return gathers(node) and not any(
        isinstance(value(n), torch.Tensor) and value(n).dtype == torch.bool for n in node.all_input_nodes[1:]
    )


def _split_of(node: Node) -> Node | None:
    """The split that a node takes one part of, or None."""
    source = node.args[0] if node.target is operator.getitem else None
    return source if isinstance(source, Node) and name_of(source) in SPLITS else None


def _is_cut(node: Node, split: Node | None) -> bool:
    """True if a node keeps whole rows, or whole matrices of a stack."""
    return cuts_rows(split) if split is not None else name_of(node) in CUTS - SPLITS and cuts_rows(node)


def _turned(permuted: tuple[int, ...] | None, order: Order) -> Order | None:
    """The order after a permutation that swaps the last two axes or none; None for any other."""
    plain = tuple(range(len(permuted or ())))
    if permuted == plain:
        return order
    return _TURNED[order] if permuted == (*plain[:-2], *reversed(plain[-2:])) else None


def _same_view(gm: GraphModule, node: Node, split: Node | None, part: Node) -> Node:
    """Of codes or scales what a node takes of the weight."""
    for view in filter(None, (split, node)):
        target: Any = view.target if callable(view.target) else getattr(torch, view.target)
        part = emit(gm, target, (part, *view.args[1:]), view.kwargs, like=node)
    return part
