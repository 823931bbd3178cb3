"""Arithmetic on vectors of channels, as calls of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fp4fx.capture import arguments, emit, value
from fp4fx.passes.operands import cast

aten = torch.ops.aten


@dataclass(frozen=True)
class Vectors:
    """Emits calls before `like`; a vector that is None is not there: zeros in a sum, ones in a product."""

    gm: GraphModule
    like: Node

    def wide(self, node: Node | None) -> Node | None:
        """As fp32 [N]."""
        if node is not None and value(node).dim() != 1:
            node = self._call(aten.reshape.default, node, [-1])
        return cast(self.gm, node, torch.float32, like=self.like)  # type: ignore[no-any-return]

    def times(self, a: Node | None, b: Node | None) -> Node | None:
        """a · b."""
        return a if b is None else b if a is None else self._call(aten.mul.Tensor, a, b)

    def plus(self, a: Node | None, b: Node | None) -> Node | None:
        """a + b."""
        return a if b is None else b if a is None else self._call(aten.add.Tensor, a, b)

    def normed(self, norm: Node, bias: Node | None) -> tuple[Node | None, Node | None]:
        """Scale and bias, fp32 [N], by which a batch_norm in evaluation maps y + bias: scale · y + the new bias."""
        _, weight, shift, mean, variance, _, _, eps, *_ = arguments(norm)
        inverse = self._call(aten.rsqrt.default, self._call(aten.add.Scalar, self.wide(variance), eps))
        scale = self.times(inverse, self.wide(weight))
        centred = self.plus(self.wide(bias), self._call(aten.neg.default, self.wide(mean)))
        return scale, self.plus(self.times(centred, scale), self.wide(shift))

    def _call(self, target: Any, *args: Any) -> Node:
        return emit(self.gm, target, args, like=self.like)
