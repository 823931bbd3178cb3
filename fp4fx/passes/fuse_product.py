"""Products with packed weights that are linear layers in disguise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fp4fx.capture import emit, substitute, value
from fp4fx.dataflow import op_name as name_of
from fp4fx.passes.operands import Weight, activation_of, cast, no_epilogue, weight_of
from fp4fx.pipeline import Context
from fp4fx.products import factors, terms_of
from fp4fx.sizes import known_equal

aten = torch.ops.aten
linear = torch.ops.fp4fx.linear.default

MOST = 32
"""Matrices of a stack that become calls of their own."""


@dataclass(frozen=True)
class _Product:
    """A product as a linear layer, with a letter for every axis."""

    x: Node
    read: str
    """The axes of x."""
    w: Weight
    sizes: tuple[int, ...]
    rows: str
    """The axes of the weight, of these sizes, the one that is reduced last."""
    result: str

    @property
    def stack(self) -> str:
        """The axis along which there is a matrix of its own for each part of x, if there is one."""
        return self.rows[0] if self.rows[0] in self.read and len(self.rows) > 1 else ""

    @property
    def outer(self) -> str:
        """The axes of the weight that the result has from it."""
        return self.rows[len(self.stack) : -1]

    @property
    def rest(self) -> str:
        """The axes of x that the result has from it alone."""
        return "".join(axis for axis in self.result if axis not in self.stack + self.outer)

    @property
    def is_linear(self) -> bool:
        """True if it reduces the last axis of the rows and no other, and broadcasts no axis of size 1."""
        sizes, k = dict(zip(self.rows, self.sizes, strict=True)), self.rows[-1]
        alike = all(known_equal(n, sizes.get(axis, n)) for axis, n in zip(self.read, value(self.x).shape, strict=True))
        reads = sorted(self.read) == sorted(self.stack + self.rest + k)
        return alike and reads and bool(self.outer) and set(self.outer) <= set(self.result)


def fuse_product(gm: GraphModule, ctx: Context) -> int:
    """Let a product of an activation and a decoded weight, or with a stack of them, be linears on what is packed.

    Before: `aten.matmul(x, fp4fx.dequantize(p, s, g, [K, N], dtype, "columns"))`
    After: `fp4fx.linear(x, p, s, g, None, K, ...)`, with permutations around it where axes stand otherwise; for a stack
    of up to 32 matrices one call each, and `aten.stack`
    """
    rewrites = 0
    for node in list(gm.graph.nodes):
        product = _product(node, ctx)
        if product is None:
            continue
        added = node.args[0] if name_of(node) in ("addmm", "baddbmm") else None
        substitute(node, _emit(gm, product, added, like=node))
        gm.graph.erase_node(node)
        rewrites += 1
    return rewrites


def _product(node: Node, ctx: Context) -> _Product | None:
    """A node as a linear layer; None if it is none."""
    pair = factors(node)
    if pair is None or any(given != 1 for given in node.kwargs.values()):  # beta and alpha, or another's memory
        return None
    left, right = pair
    terms = terms_of(node, (value(left.node).dim(), value(right.node).dim()))
    if terms is None:
        return None
    for mine, axes, x, read in ((right, terms.right, left, terms.left), (left, terms.left, right, terms.right)):
        turned = weight_of(mine.node, "columns")
        w = turned or weight_of(mine.node, "rows")
        if w is None:
            continue
        order = sorted(range(len(axes)), key=lambda i: (i == len(axes) - 2) if turned else 0)
        rows, sizes = "".join(axes[i] for i in order), tuple(w.shape[i] for i in order)
        product = _Product(x.node, read, w, sizes, rows, terms.result)
        if not product.is_linear:
            continue
        if product.stack and product.sizes[0] > MOST:
            ctx.refusals[mine.node] = (
                f"{product.sizes[0]} matrices in one product, of which {MOST} at most become calls"
            )
            continue
        return product
    return None


def _emit(gm: GraphModule, product: _Product, added: Any, *, like: Node) -> Node:
    """The calls that a product becomes, before `like`."""
    dtype, stack = value(like).dtype, len(product.stack)
    outer, k = product.sizes[stack:-1], product.sizes[-1]
    x = _permuted(gm, product.x, product.read, product.stack + product.rest + product.rows[-1], like=like)
    fuses = added is not None and not stack and product.result.endswith(product.outer) and value(added).shape == outer
    bias = cast(gm, added, dtype, like=like) if fuses and len(outer) == 1 else None

    def one(x: Node, packed: Node, scale: Node) -> Node:
        if len(outer) > 1:
            packed, scale = (emit(gm, aten.flatten.using_ints, (part, 0, -2), like=like) for part in (packed, scale))
        a = activation_of(gm, x, "rows", dtype, like=like)
        args = (a.x, packed, scale, product.w.parts[2], bias, k, *a.scales, *no_epilogue(product.w))
        return emit(gm, linear, args, like=like)

    operands = (x, *product.w.parts[:2])
    if stack:
        x = cast(gm, x, dtype, like=like)
        operands = (x, *operands[1:])
        each = [
            one(*(emit(gm, aten.select.int, (part, 0, i), like=like) for part in operands))
            for i in range(product.sizes[0])
        ]
        y = emit(gm, aten.stack.default, (each,), like=like)
    else:
        y = one(*operands)
    if len(outer) > 1:
        y = emit(gm, aten.unflatten.int, (y, -1, list(outer)), like=like)
    y = _permuted(gm, y, product.stack + product.rest + product.outer, product.result, like=like)
    if added is not None and bias is None:
        y = emit(gm, aten.add.Tensor, (y, cast(gm, added, dtype, like=like)), like=like)
    return y


def _permuted(gm: GraphModule, node: Node, axes: str, wanted: str, *, like: Node) -> Node:
    """A tensor with these axes in the wanted order."""
    if axes == wanted:
        return node
    return emit(gm, aten.permute.default, (node, [axes.index(axis) for axis in wanted]), like=like)
