"""The library `fp4fx::` and the decorator that puts an op into it; the checks that every body begins with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp4fx import nvfp4

Body = Callable[..., Any]

LIBRARY: Any = torch.library.Library("fp4fx", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str) -> Callable[[Body], Body]:
    """Register a function as `fp4fx::<its name>` with the given arguments, and return it unchanged.

    The body is the fake too: what it does to shapes, strides and dtypes is by definition right.
    """

    def register(body: Body) -> Body:
        name = body.__name__
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fp4fx::{name}", body, lib=LIBRARY)
        return body

    return register


def check_weight(packed: Tensor, scale: Tensor, global_scale: Tensor, k: int) -> None:
    """Refuse operands that are not the packed form of a matrix with `k` columns."""
    blocks = -(-k // nvfp4.BLOCK)
    torch._check(packed.dtype == torch.uint8 and scale.dtype == torch.uint8, lambda: "packed and scale must be uint8")
    torch._check(global_scale.dtype == torch.float32, lambda: f"global_scale must be fp32, is {global_scale.dtype}")
    torch._check(
        packed.shape[-1] == 8 * blocks and scale.shape[-1] == blocks,
        lambda: (
            f"K={k} needs {8 * blocks} code bytes and {blocks} scales a row, "
            f"found packed {tuple(packed.shape)} and scale {tuple(scale.shape)}"
        ),
    )


def check_input(x: Tensor, x_scale: Tensor | None, dtype: torch.dtype | None, k: int, dim: int) -> None:
    """Refuse an activation whose reduction axis `dim` does not hold `k` values."""
    blocks = -(-k // nvfp4.BLOCK)
    if x_scale is None:
        torch._check(x.is_floating_point(), lambda: f"x must be floating point, is {x.dtype}")
        torch._check(x.shape[dim] == k, lambda: f"x has {x.shape[dim]} values along axis {dim}, the weight expects {k}")
    else:
        torch._check(dtype is not None, lambda: "a quantized x needs the dtype that it decodes to")
        torch._check(
            x.dtype == torch.uint8 and x.shape[-1] == 8 * blocks,
            lambda: f"a quantized x with K={k} is uint8 [..., {8 * blocks}], found {x.dtype} {tuple(x.shape)}",
        )
