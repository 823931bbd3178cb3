"""Sizes, which may be symbolic: compared and estimated without a guard, which would bind a graph to the example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def known_equal(m: int | torch.SymInt, n: int | torch.SymInt) -> bool:
    """Whether two sizes are known to be equal, without a guard on symbolic ones."""
    same = m == n
    if isinstance(same, bool):
        return same
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(same))


def estimate(n: int | torch.SymInt) -> int:
    """A size, or what a symbolic one was when it was captured, without a guard: to choose by, not to compute with."""
    if isinstance(n, int):
        return n
    if n.node.hint is not None:
        return int(n.node.hint)
    from torch.fx.experimental.symbolic_shapes import optimization_hint  # which older versions of torch do not have

    return int(optimization_hint(n))


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two shapes are known to be equal, without a guard on symbolic sizes."""
    return a.dim() == b.dim() and all(known_equal(m, n) for m, n in zip(a.shape, b.shape, strict=True))


def same_strides(a: Any, b: Any) -> bool:
    """Whether two fake values of one shape (tensors, or tuples of them) are known to be laid out alike."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    def alike(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return True
        dims = [d for d in range(a.dim()) if not statically_known_true(a.shape[d] == 1)]
        return all(statically_known_true(a.stride(d) == b.stride(d)) for d in dims)

    return all(map(alike, pytree.tree_leaves(a), pytree.tree_leaves(b)))
