"""One spelling per op."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fp4fx.canonical import canonical
from fp4fx.capture import OpOverload
from fp4fx.graph_sites import COMPUTE_OPS
from fp4fx.pipeline import Context, op_name


def canonicalize(gm: GraphModule, ctx: Context) -> int:
    """Spell calls as ATen overloads with all arguments in the schema's order.

    Before: `torch.conv2d(x, w, b, stride=2)`, `torch._C._nn.linear(x, w)` or `aten.linear(x, w)`, `F.embedding(i, w)`
    After: `aten.conv2d(x, w, b, [2, 2], [0, 0], [1, 1], 1)`, `aten.linear(x, w, None)`,
    `aten.embedding(w, i, -1, False, False)`
    """
    rewrites = 0
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if isinstance(node.target, OpOverload) and (node.target in COMPUTE_OPS or op_name(node) is not None):
            rewrites += _fill(node)
            continue
        call = canonical(node.target, node.args, node.kwargs)
        if call is not None:
            node.op = "call_function"
            node.target, node.args, node.kwargs = call
            rewrites += 1
    return rewrites


def _fill(node: Node) -> bool:
    """Give a call of an op all its arguments by position, as exported programs and direct calls leave out defaults."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    if len(node.args) == len(arguments):
        return False
    given = {**dict(zip((a.name for a in arguments), node.args, strict=False)), **node.kwargs}
    node.args, node.kwargs = tuple(given.get(a.name, a.default_value) for a in arguments), {}
    return True
