"""W4A4 linears: a quantize that one of them alone reads happens in its kernel, where x becomes operands."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from fp4fx.capture import arguments, mutated, storages, value

_X = (0, 6, 7)
"""Where linear takes codes, scales and the global scale of x."""
_DTYPE, _COMPUTE = 8, 12
_DEFAULTS: tuple[Any, ...] = ("rows", 1, "max", 1)


def quantize_inside(node: Node) -> bool:
    """Let a lowered linear quantize x itself if nobody else reads the codes and x is not written to in between.

    Before: `p, s, g = fp4fx_cpu.quantize(x, given)`, `fp4fx_cpu.linear(p, w, ..., s, g, x.dtype, ...)`
    After: `fp4fx_cpu.linear(x, w, ..., None, given, None, ..., quantize_x=rule)`

    The operands have the same bits. With `compute="int8"` a row is read twice, and would be quantized twice.
    """
    args = list(arguments(node))
    parts = [args[i] for i in _X if i < len(args) and isinstance(args[i], Node)]
    if len(parts) < len(_X) or any(part.target is not operator.getitem for part in parts):
        return False
    whole: Node = parts[0].args[0]
    if whole.target is not torch.ops.fp4fx_cpu.quantize.default or whole.kwargs:
        return False
    if [part.args for part in parts] != [(whole, i) for i in range(3)] or set(whole.users) != set(parts):
        return False
    x, given, *how = (*arguments(whole), None)[:2] + arguments(whole)[2:]
    order, groups, rule, block_rows, *others = (*how, *_DEFAULTS[len(how) :])
    if others or (order, groups, block_rows) != ("rows", 1, 1) or any(set(part.users) != {node} for part in parts):
        return False
    if value(x).dtype != args[_DTYPE] or "int8" in args[_COMPUTE : _COMPUTE + 1]:
        return False
    read = storages(value(n) for n in whole.all_input_nodes)
    between = whole.next
    while between is not node:
        if mutated(between) & read:
            return False
        between = between.next
    for i, new in zip((*_X, _DTYPE), (x, None, given, None), strict=True):
        args[i] = new
    node.args, node.kwargs = tuple(args), {**node.kwargs, "quantize_x": rule}
    return True
