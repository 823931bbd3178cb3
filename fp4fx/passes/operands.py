"""What the fusions read: a packed weight, and an activation that may be packed too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fp4fx.capture import arguments, emit, value
from fp4fx.pipeline import op_name
from fp4fx.site import Order


@dataclass(frozen=True)
class Weight:
    """The packed operands behind a decoded weight."""

    parts: tuple[Node, Node, Node]
    shape: tuple[int, ...]
    groups: int
    compute: str
    """Precision that the op may compute in."""


@dataclass(frozen=True)
class Activation:
    """An activation as a fused op takes it: floating point, or packed with its scales and the dtype it decodes to."""

    x: Node
    scales: tuple[Any, ...] = (None, None, None)


def weight_of(node: Any, order: Order) -> Weight | None:
    """The packed weight that a node decodes, or None if it is anything else."""
    if not isinstance(node, Node) or op_name(node) != "dequantize":
        return None
    packed, scale, global_scale, shape, _, stored_order, groups, *rest = arguments(node)
    if stored_order != order or not all(isinstance(size, int) for size in shape):
        return None
    return Weight((packed, scale, global_scale), tuple(shape), groups, rest[0] if rest else "bf16")


def activation_of(gm: GraphModule, x: Node, order: Order, dtype: torch.dtype, *, like: Node) -> Activation:
    """The activation for a fused op that computes in `dtype` (which under autocast is not x's own)."""
    if op_name(x) == "dequantize" and arguments(x)[5] == order:
        packed, scale, global_scale = arguments(x)[:3]
        return Activation(packed, (scale, global_scale, dtype))
    return Activation(cast(gm, x, dtype, like=like))


def no_epilogue(weight: Weight) -> tuple[Any, ...]:
    """The last arguments of a fused op that does nothing behind its product and bias."""
    return None, None, "none", weight.compute


def cast(gm: GraphModule, node: Any, dtype: torch.dtype, *, like: Node) -> Any:
    """The node in `dtype`; None stays None."""
    if node is None or value(node).dtype == dtype:
        return node
    return emit(gm, torch.ops.aten.to.dtype, (node, dtype), like=like)
