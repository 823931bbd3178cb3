"""An implementation for every fp4fx op."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fp4fx.capture import OpOverload, arguments, needs_gradient, value
from fp4fx.dataflow import GATHERS, VIEWS
from fp4fx.dataflow import op_name as name_of
from fp4fx.kernels import KERNELS, reference
from fp4fx.lowering import Lowering
from fp4fx.pipeline import Context, op_name
from fp4fx.registry import Kernel, Request, select
from fp4fx.target import Target, target_of


def select_kernels(gm: GraphModule, ctx: Context) -> int:
    """Give every fp4fx op the first kernel that takes it, and note the choice and the refusals.

    Before: `fp4fx.linear(x, p, s, g, bias, K)`
    After: the same call on the kernel's own target
    """
    rewrites = 0
    for node in gm.graph.nodes:
        name = op_name(node)
        if name is None:
            continue
        stored = _stored(node, name, ctx)
        kernel, refusals = choose(node, ctx)
        if name == "dequantize" and stored is not None and not ctx.unfused:
            readers = sorted({_spelling(user) for user in node.users})
            reason = ctx.refusals.get(node, f"its decoded value is read by {', '.join(readers)}")
            refusals = (f"fusion: {reason}", *refusals)
        ctx.lowerings.append((stored, Lowering(name, kernel.name, refusals, ctx.between.get(node))))
        kernel.lower(node)
        rewrites += 1
    return rewrites


def choose(
    node: Node, ctx: Context, kernels: Sequence[Kernel] | None = None, target: Target | None = None
) -> tuple[Kernel, tuple[str, ...]]:
    """The kernel for an op under `fp4fx::`, and why it is none of those before it.

    Args:
        node: a call under `fp4fx::`.
        ctx: what the passes found out.
        kernels: to choose from, the last takes everything; None: all.
        target: what the ops of its device type are compiled for; None: the device that they are on.
    """
    name = str(op_name(node))
    if ctx.unfused:
        return reference.KERNEL, (f"fusion: {ctx.unfused}",)
    request = _request(node, name, ctx, frozen=_stored(node, name, ctx) is not None)
    if target is not None and request.target.device == target.device:
        request = replace(request, target=target)
    return select(request, KERNELS if kernels is None else kernels)


_PACKED = {
    "linear": 1,
    "conv": 1,
    "conv_transpose": 1,
    "embedding": 1,
    "dequantize": 0,
    "quantize": 0,
    "fake_quantize": 0,
}
"""Where an op takes its stored weight."""


def _stored(node: Node, name: str, ctx: Context) -> Tensor | None:
    operand: Any = arguments(node)[_PACKED[name]]
    codes = value(operand).dtype == torch.uint8
    while codes and name_of(operand) in VIEWS | GATHERS and op_name(operand.args[0]) is None:  # a part of a weight
        operand = operand.args[0]
    if operand.target is operator.getitem and op_name(arguments(operand)[0]) == "quantize":
        operand = arguments(arguments(operand)[0])[0]  # quantized on every call: the parameter itself
    return ctx.real.get(operand)


def _request(node: Node, name: str, ctx: Context, *, frozen: bool) -> Request:
    result = value(node)
    result = result[0] if isinstance(result, tuple) else result
    first, operand = value(arguments(node)[0]), value(arguments(node)[_PACKED[name]])
    is_weight = _PACKED[name] == 1 and operand.dim() == 2
    named = _named(node)
    image = first.shape[1:-1] if first.dtype == torch.uint8 else first.shape[2:]
    return Request(
        op=name,
        target=target_of(result.device),
        dtype=first.dtype if name == "quantize" else result.dtype,
        n=operand.shape[0] if is_weight else None,
        k=2 * operand.shape[1] if is_weight else None,
        quantized_input=is_weight and first.dtype == torch.uint8,
        freezing=ctx.freezing and frozen,
        gradient=needs_gradient(node),
        groups=named.get("groups", 1),
        padding=tuple(named.get("padding", ())),
        scale_rule=named.get("scale_rule", "max"),
        symbolic_image=name in ("conv", "conv_transpose") and any(isinstance(n, torch.SymInt) for n in image),
    )


def _named(node: Node) -> dict[str, Any]:
    """The arguments of an op by name."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return {argument.name: given for argument, given in zip(schema, arguments(node), strict=False)}


def _spelling(node: Node) -> str:
    return (
        str(node.target) if isinstance(node.target, OpOverload | str) else getattr(node.target, "__name__", node.name)
    )
