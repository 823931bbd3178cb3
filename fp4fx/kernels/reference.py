"""The op as it stands: its plain PyTorch body behind `fp4fx::`, opaque to Inductor. Takes everything."""

from __future__ import annotations

from fp4fx import ops
from fp4fx.registry import Kernel

KERNEL = Kernel(name="reference", ops=frozenset(ops.__all__), refuse=lambda _: None, lower=lambda _: None)
