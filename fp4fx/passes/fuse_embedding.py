"""Embeddings on packed tables."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from fp4fx.capture import emit, substitute, value
from fp4fx.passes.operands import weight_of
from fp4fx.pipeline import Context, aten_name

embedding = torch.ops.fp4fx.embedding.default


def fuse_embedding(gm: GraphModule, ctx: Context) -> int:
    """Gather packed rows and decode only those.

    Before: `aten.embedding(fp4fx.dequantize(p, s, g, [V, D], dtype), indices, ...)`
    After: `fp4fx.embedding(indices, p, s, g, D, dtype)`
    """
    rewrites = 0
    for node in list(gm.graph.nodes):
        if aten_name(node) != "embedding":
            continue
        weight, indices, *_ = node.args  # what follows matters to the gradient of the table only, which is frozen
        w = weight_of(weight, "rows")
        if w is None:
            continue
        fused = emit(gm, embedding, (indices, *w.parts, w.shape[-1], value(node).dtype), like=node)
        substitute(node, fused)
        gm.graph.erase_node(node)
        rewrites += 1
    return rewrites
