"""The ops under torch.vmap: one call where a batch is just more rows, a call per example where it is not.

A dynamic global scale belongs to one example, as a batch of packed weights does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fp4fx.ops.library import LIBRARY

_IMAGES = ("conv", "conv_transpose")


def _vmap(name: str, info: Any, in_dims: tuple[int | None, ...], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    op = getattr(torch.ops.fp4fx, name).default
    named = {argument.name: given for argument, given in zip(op._schema.arguments, args, strict=False)} | kwargs
    first, *others = in_dims
    if first is not None and all(dim is None for dim in pytree.tree_leaves(others)) and _takes_more_rows(name, named):
        x = args[0].movedim(first, 0)
        if name in _IMAGES or named.get("order") == "channels":
            result = op(x.flatten(0, 1), *args[1:], **kwargs)
            unflattened = pytree.tree_map(lambda y: y.unflatten(0, x.shape[:2]) if y.dim() else y, result)
            return unflattened, pytree.tree_map(lambda y: 0 if y.dim() else None, unflattened)
        result = op(x, *args[1:], **kwargs)
        return result, pytree.tree_map(lambda y: 0 if y.dim() else None, result)
    examples = [
        op(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True)), **kwargs)
        for i in range(info.batch_size)
    ]
    stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *examples)
    return stacked, pytree.tree_map(lambda _: 0, stacked)


def _takes_more_rows(name: str, given: dict[str, Any]) -> bool:
    """Whether examples are independent of each other in one call."""
    if name in ("quantize", "fake_quantize"):
        rows = given.get("order", "rows") in ("rows", "channels") and given.get("block_rows", 1) == 1
        return rows and isinstance(given.get("global_scale"), Tensor)
    return name != "dequantize" and given.get("x_scale") is None and given.get("residual") is None


def register_batching(names: list[str]) -> None:
    """Attach the rule to the ops; called once, when they are defined."""
    for name in names:
        torch.library.register_vmap(f"fp4fx::{name}", functools.partial(_vmap, name), lib=LIBRARY)
