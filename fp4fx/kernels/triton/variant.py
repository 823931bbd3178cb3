"""One specialisation of a kernel, as ahead-of-time compilation needs it spelled out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

FUSED: Mapping[str, Any] = MappingProxyType({"enable_fp_fusion": True})
"""Launch options of a kernel whose sums may be contracted with products; what Triton does unasked is its version's."""
EXACT: Mapping[str, Any] = MappingProxyType({"enable_fp_fusion": False})
"""Launch options of a kernel whose bits are promised: a product and a sum are rounded each by itself."""
NO_FMA = ("fma.rn.f32", "div.full", ".approx", ".ftz")
"""What the PTX of such a kernel has not, except where it multiplies matrices."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What `triton.compile` is told about one kernel."""

    name: str
    """Unique in its module: the kernel, its operands, its tile."""
    kernel: Any
    """The `@triton.jit` function."""
    signature: Mapping[str, str]
    """Every argument in order: "*bf16", "*u8", "*fp32", "i32", ... or "constexpr"."""
    constants: Mapping[str, Any]
    """The constexpr arguments."""
    aligned: tuple[str, ...] = ()
    """Arguments that are multiples of 16: pointers, strides."""
    num_warps: int = 4
    num_stages: int = 3
    matrix: Mapping[int, str] = field(default_factory=dict)
    """The matrix instruction that has to be in the PTX, by target (80, 90, 100, 120); one that is missing needs none.
    Words apart by spaces have to be in one line: "tcgen05.mma block_scale"."""
    options: Mapping[str, Any] = field(default_factory=lambda: FUSED)
    """Other options of the launch: `FUSED` or `EXACT`, "debug"."""
    absent: tuple[str, ...] = ()
    """What must not be in the PTX."""
    targets: tuple[int, ...] = (80, 90, 100, 120)
    """Those it is for."""
    since: Mapping[int, str] = field(default_factory=dict)
    """The oldest Triton that compiles it ("3.9"), by target; a target that is missing: any."""
