"""Attention opened into its projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from fp4fx import capture
from fp4fx.pipeline import Context

_CLOSED = (F.multi_head_attention_forward, torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd)


def open_attention(gm: GraphModule, ctx: Context) -> int:
    """Replace attention calls that take projection weights by the ATen graph of what they do.

    Before: `F.multi_head_attention_forward(q, q, q, ..., in_proj_weight, ..., out_proj_weight, ...)`
    After: `aten.linear(q, in_proj_weight, ...)`, views, `aten.scaled_dot_product_attention`,
    `aten.linear(..., out_proj_weight, ...)`
    """
    closed = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in _CLOSED]
    for node in closed:
        capture.inline(gm, node)
    return len(closed)
