"""What a kernel is, and how one is chosen: the first that does not refuse, in the order of a flat list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fp4fx.target import Target


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a kernel is asked to do; never the batch, which may be dynamic."""

    op: str
    """Name under `fp4fx::`."""
    target: Target
    dtype: torch.dtype
    """Floating-point dtype of the result, or of what is quantized."""
    n: int | None
    """Rows of the packed weight; None for an op on an activation, whose sizes may be dynamic."""
    k: int | None
    """Length of its rows, padded to whole blocks of 16."""
    quantized_input: bool
    """The activation arrives packed (W4A4)."""
    freezing: bool
    """Inductor's freezing will fold whatever depends on weights alone."""
    gradient: bool = False
    """The result requires a gradient."""
    groups: int = 1
    """Of a convolution, as its padding."""
    padding: tuple[int | torch.SymInt, ...] = ()
    scale_rule: str = "max"
    """Of a quantize."""
    symbolic_image: bool = False
    """The height or width that a convolution reads is dynamic."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to run an op."""

    name: str
    ops: frozenset[str]
    refuse: Callable[[Request], str | None]
    """Why this kernel cannot take the request, or None."""
    lower: Callable[[Node], None]
    """Retargets the node to the kernel."""
    rounds: bool = False
    """Rounds the operands of fp32 ops to bf16 where `compute` lets it, and takes x and answers in different dtypes."""
    device: str | None = None
    """The one device type it is for; elsewhere it is no choice, and gives no reason. None: any."""
    meant_for: Callable[[Request], bool] = lambda _: True
    """Which requests on that device it is a choice for; for others it gives no reason either."""


def select(request: Request, kernels: Sequence[Kernel]) -> tuple[Kernel, tuple[str, ...]]:
    """The first kernel that takes the request, and what those before it gave as reasons ("name: reason").

    The last kernel of the list takes everything: the op's own body.
    """
    refusals: list[str] = []
    for kernel in kernels:
        if request.op not in kernel.ops or kernel.device not in (None, request.target.device):
            continue
        if not kernel.meant_for(request):
            continue
        reason = kernel.refuse(request)
        if reason is None:
            return kernel, tuple(refusals)
        refusals.append(f"{kernel.name}: {reason}")
    raise LookupError(f"no kernel for fp4fx::{request.op}; the reference body must be the last of the list")
