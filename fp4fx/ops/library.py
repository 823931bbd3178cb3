"""The library `fp4fx::` and the decorator that puts an op into it; the checks that every body begins with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp4fx import nvfp4

Body = Callable[..., Any]

LIBRARY: Any = torch.library.Library("fp4fx", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, **shapes_only: Body) -> Callable[[Body], Body]:
    """Register a function as `fp4fx::<its name>` with the given arguments, and return it unchanged.

    The body is the fake too, so that shapes, strides and dtypes are right by definition; `shapes_only` replaces those
    of its keyword arguments that would compute (decoding, encoding), which keeps a symbolic batch free of guards.
    """

    def register(body: Body) -> Body:
        name = body.__name__
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fp4fx::{name}", functools.partial(body, **shapes_only), lib=LIBRARY)
        return body

    return register


def define_for(library: Any, name: str, body: Body) -> None:
    """Register a kernel in another library with the arguments and the fake of `fp4fx::<name>`."""
    like = getattr(torch.ops.fp4fx, name).default
    library.define(name + str(like._schema).removeprefix(f"fp4fx::{name}"))
    library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{name}", like, lib=library)


def _blocks(k: int) -> int:
    """Blocks in a row, in one spelling: a symbolic k would need a guard to see that two spellings are equal."""
    return (k + nvfp4.BLOCK - 1) // nvfp4.BLOCK


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format of an image with its batch and channel axes, by rank."""


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """y in channels_last if x is, else contiguous: strides follow from the arguments alone.

    An x of bytes is packed, with its channels last by definition.
    """
    last = CHANNELS_LAST.get(x.dim())
    if last is not None and x.dtype == torch.uint8:
        return y.contiguous(memory_format=last)
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return y.contiguous()
    return y.contiguous(memory_format=last)


def undecoded(packed: Tensor, scale: Tensor, global_scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The shape of what `nvfp4.dequantize_rows` gives."""
    return packed.new_empty((*packed.shape[:-1], k), dtype=dtype)


def unencoded(rows: Tensor, global_scale: Tensor | None, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of what `nvfp4.quantize_rows` gives."""
    *lead, k = rows.shape
    blocks = _blocks(k)
    packed, scale = (rows.new_empty((*lead, n * blocks), dtype=torch.uint8) for n in (nvfp4.BLOCK // 2, 1))
    return packed, scale, rows.new_empty((), dtype=torch.float32)


def check_weight(packed: Tensor, scale: Tensor, global_scale: Tensor, k: int) -> None:
    """Refuse operands that are not the packed form of a matrix with `k` columns."""
    blocks = _blocks(k)
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
    blocks = _blocks(k)
    if x_scale is None:
        torch._check(x.is_floating_point(), lambda: f"x must be floating point, is {x.dtype}")
        torch._check(x.shape[dim] == k, lambda: f"x has {x.shape[dim]} values along axis {dim}, the weight expects {k}")
    else:
        torch._check(dtype is not None, lambda: "a quantized x needs the dtype that it decodes to")
        torch._check(
            x.dtype == torch.uint8 and x.shape[-1] == 8 * blocks,
            lambda: f"a quantized x with K={k} is uint8 [..., {8 * blocks}], found {x.dtype} {tuple(x.shape)}",
        )
