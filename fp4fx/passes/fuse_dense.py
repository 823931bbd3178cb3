"""Activations behind convolutions on dense weights, done by the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fp4fx.capture import arguments, emit, needs_gradient, same_strides, substitute, value
from fp4fx.ops.library import CHANNELS_LAST
from fp4fx.passes.spellings import activation_of
from fp4fx.pipeline import Context, aten_name

_ACTIVATIONS: Mapping[str, tuple[str, list[Any], str | None]] = {
    "relu": ("relu", [], None),
    "relu6": ("hardtanh", [0.0, 6.0], None),
    "silu": ("swish", [], None),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "hardswish": ("hardswish", [], None),
    "hardsigmoid": ("hardsigmoid", [], None),
    "sigmoid": ("sigmoid", [], None),
}
"""How oneDNN's op names them: name, scalars, algorithm."""


def fuse_dense(gm: GraphModule, ctx: Context) -> int:
    """Let oneDNN apply the activation behind a bf16 convolution that it computes on a CPU.

    In fp32 a pass of Inductor's over the result costs the same. Shapes have to be known and x to be in channels_last,
    since the op's fake says that its result is. Under freezing Inductor does the same.

    Before: `F.relu(aten.conv2d(x, w, b, ...))`
    After: `mkldnn._convolution_pointwise(x, w, b, ..., "relu", [], None)`
    """
    if ctx.freezing or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    rewrites = 0
    for node in list(gm.graph.nodes):
        conv = node.args[0] if node.args else None
        name = activation_of(node, conv) if isinstance(conv, Node) and _fits(conv) else None
        if name is None or value(node).dtype != torch.bfloat16:
            continue
        assert isinstance(conv, Node)
        x, weight, bias, stride, padding, dilation, groups = arguments(conv)
        args = (x, weight, bias, padding, stride, dilation, groups, *_ACTIVATIONS[name])
        fused = emit(gm, torch.ops.mkldnn._convolution_pointwise.default, args, like=conv)
        if not same_strides(value(fused), value(node)):
            gm.graph.erase_node(fused)
            continue
        substitute(node, fused)
        gm.graph.erase_node(node)
        gm.graph.erase_node(conv)
        rewrites += 1
    return rewrites


def _fits(conv: Node) -> bool:
    """Whether oneDNN computes a call, in bf16, with its activation in channels_last."""
    if aten_name(conv) not in ("conv2d", "conv3d") or len(conv.users) != 1 or needs_gradient(conv):
        return False
    x, weight, bias, _, padding, *_ = arguments(conv)
    values = [value(n) for n in (x, weight, bias) if n is not None]
    return (
        all(v.dtype == torch.bfloat16 and v.device.type == "cpu" for v in (*values, value(conv)))
        and all(isinstance(size, int) for v in values for size in v.shape)
        and not isinstance(padding, str)
        and value(x).dim() == value(weight).dim()
        and not value(x).is_contiguous()
        and value(x).is_contiguous(memory_format=CHANNELS_LAST[value(x).dim()])
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
