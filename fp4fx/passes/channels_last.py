"""Images with their channels last in memory, as the kernels of convolutions read them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fp4fx.capture import STANDS_IN, arguments, emit, needs_gradient, value
from fp4fx.ops.library import CHANNELS_LAST
from fp4fx.pipeline import Context, aten_name, op_name

aten = torch.ops.aten

_DENSE = ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d")


def channels_last(gm: GraphModule, ctx: Context) -> int:
    """Ask for channels_last in front of every convolution on a CPU, those on dense weights too.

    A convolution answers in the format of its input and what follows keeps it, so that all but the first of these
    requests cost nothing; the pass `restride` finds out and takes them away. Nothing is asked for where gradients flow
    or where the graph has no fused op.

    Before: `fp4fx.conv(x, ...)`
    After: `fp4fx.conv(aten.contiguous(x, memory_format=channels_last), ...)`
    """
    if not any(op_name(node) in ("linear", "conv", "conv_transpose") for node in gm.graph.nodes):
        return 0
    rewrites = 0
    for node in list(gm.graph.nodes):
        if not _reads_an_image(node) or needs_gradient(node):
            continue
        x = arguments(node)[0]
        if value(x).device.type == "cpu" and value(x).dim() in CHANNELS_LAST:
            last = emit(gm, aten.contiguous.default, (x,), {"memory_format": CHANNELS_LAST[value(x).dim()]}, like=node)
            node.update_arg(0, last)
            node.meta[STANDS_IN] = True
            rewrites += 1
    return rewrites


def _reads_an_image(node: Node) -> bool:
    """Whether a call reads [B, C, *spatial] along the channels: a convolution, or the quantize in front of one."""
    name = op_name(node)
    if name in ("conv", "conv_transpose"):
        return bool(value(arguments(node)[0]).is_floating_point())
    if name == "quantize":
        return arguments(node)[2:3] == ("channels",)
    if aten_name(node) not in _DENSE:
        return False
    x, weight = arguments(node)[:2]
    return bool(value(x).dim() == value(weight).dim())
