"""Attention opened into its projections."""

from __future__ import annotations

import torch.nn.functional as F
from torch.fx import GraphModule

from fp4fx import capture
from fp4fx.pipeline import Context


def open_attention(gm: GraphModule, ctx: Context) -> int:
    """Replace the function behind `nn.MultiheadAttention` by the ATen graph of what it does.

    PyTorch's fused inference ops have no such graph; a weight that they read is reported as not fused.

    Before: `F.multi_head_attention_forward(q, q, q, ..., in_proj_weight, ..., out_proj_weight, ...)`
    After: `aten.linear(q, in_proj_weight, ...)`, views, `aten.scaled_dot_product_attention`,
    `aten.linear(..., out_proj_weight, ...)`
    """
    closed = [n for n in gm.graph.nodes if n.target is F.multi_head_attention_forward]
    for node in closed:
        capture.inline(gm, node)
    return len(closed)
