"""One quantize per shared activation."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import GraphModule, Node

from fp4fx.capture import arguments, mutated, storages, value
from fp4fx.pipeline import Context, op_name

_PURE = ("quantize", "dequantize", "fake_quantize")


def merge_qdq(gm: GraphModule, ctx: Context) -> int:
    """Merge equal quantizes (and what is computed from them alone) of one tensor, unless it is written to in between.

    Before: `q1 = fp4fx.quantize(x)`, `q2 = fp4fx.quantize(x)`
    After: `q1`, read by the users of both
    """
    seen: dict[Any, Node] = {}
    rewrites = 0
    for node in gm.graph.nodes:
        written = mutated(node)
        if written:
            seen = {key: kept for key, kept in seen.items() if not written & _reads(kept)}
        from_quantize = node.target is operator.getitem and op_name(arguments(node)[0]) == "quantize"
        if op_name(node) not in _PURE and not from_quantize:
            continue
        key = (node.target, _hashable(node.args), _hashable(tuple(node.kwargs.items())))
        kept = seen.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            rewrites += op_name(node) in ("quantize", "fake_quantize")
    return rewrites


def _reads(node: Node) -> set[int]:
    return storages(value(n) for n in node.all_input_nodes)


def _hashable(argument: Any) -> Any:
    return tuple(map(_hashable, argument)) if isinstance(argument, list | tuple) else argument
