"""What the compiler did with one op: the note that it leaves on a tensor for the report."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ATTRIBUTE = "fp4fx_lowering"
DECISION = "fp4fx_decision"
NOTE = "fp4fx_note"


@dataclass(frozen=True)
class Lowering:
    """One use of a packed weight in a compiled graph."""

    op: str
    """The fused op that eats the weight, e.g. `linear`; `dequantize` if nothing could be fused."""
    kernel: str
    """Name of the kernel that was selected."""
    refusals: tuple[str, ...] = ()
    """Why the kernels ahead of it were not: one `name: reason` each."""
    between: str | None = None
    """Why the result of an op of fp32 is not stored in bf16, empty if it is; None for any other op."""


def lowerings_of(tensor: Tensor) -> tuple[Lowering, ...]:
    """The notes on a packed buffer, or on a dense parameter quantized while compiling; empty before that."""
    notes: tuple[Lowering, ...] = getattr(tensor, ATTRIBUTE, ())
    return notes
