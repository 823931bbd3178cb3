"""The op's body opened into the compiled graph: Inductor fuses the decoding, the library does the rest.

The dense weight exists only inside the call. Where Inductor freezes parameters it would fold the decoding into a dense
constant, so there this kernel refuses.
"""

from __future__ import annotations

from torch.fx import Node

from fp4fx import ops
from fp4fx.registry import Kernel, Request
from fp4fx.scales import searched

_OPS = frozenset(ops.__all__) - {"fake_quantize"}  # which needs its own op for the straight-through gradient


_WITH_EPILOGUE = ("linear", "conv", "conv_transpose")


def _refuse(request: Request) -> str | None:
    if request.freezing:
        return "Inductor's freezing would fold the decoded weight back to a dense constant"
    if request.op == "quantize" and searched(request.scale_rule) == "search":
        return f"scale_rule={request.scale_rule!r} tries eleven scales a block: too much for loops made by a compiler"
    return None


def _lower(node: Node) -> None:
    name = node.target._opname  # type: ignore[union-attr]
    node.target = getattr(ops, name)
    if name in _WITH_EPILOGUE:  # a library is fast in x's dtype, and the epilogue is in fp32 all the same
        node.kwargs = {**node.kwargs, "widen": False}


KERNEL = Kernel(name="inductor", ops=_OPS, refuse=_refuse, lower=_lower)
