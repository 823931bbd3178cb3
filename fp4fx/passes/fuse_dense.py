"""Convolutions that stay dense, as an op that takes what is done to their results next."""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fp4fx.capture import arguments, emit, needs_gradient, substitute, value
from fp4fx.dataflow import op_name as name_of
from fp4fx.passes.fold_parameters import MOST, computable, take_out
from fp4fx.passes.fuse_conv import numeric_padding
from fp4fx.passes.narrow import readers
from fp4fx.pipeline import Context, aten_name, op_name
from fp4fx.target import onednn_computes

log = logging.getLogger(__name__)


def fuse_dense(gm: GraphModule, ctx: Context) -> int:
    """Let oneDNN run dense convolutions on a CPU by the op that Inductor takes under freezing, which does so itself.

    Inductor draws an activation, a sum or both behind such a call into it. The weight is an input of the graph in the
    order that the library reads, while `aten.conv2d` reorders it on every call; it is a second copy, so large ones are
    left alone. So is a graph without any fused op.

    Before: `aten.conv2d(x, w, b, ...)`
    After: `mkldnn._convolution_pointwise(x, folded, b, ..., "none", [], "")`
    """
    if ctx.freezing or not any(op_name(node) in ("linear", "conv", "conv_transpose") for node in gm.graph.nodes):
        return 0
    constants = leaves, calls = computable(gm, ctx)
    known = {*leaves, *calls}
    chosen: list[Node] = []
    for node in list(gm.graph.nodes):
        if aten_name(node) not in ("conv2d", "conv3d"):
            continue
        objection = _objection(node, known)
        if objection:
            log.debug("%s stays aten.%s: %s", node, aten_name(node), objection)
            continue
        _count_padding(gm, node)
        chosen.append(node)
    order = partial(_ordered, calls=[(_geometry(node), list(value(arguments(node)[0]).shape)) for node in chosen])
    weights = take_out(gm, ctx, constants, {node.name: arguments(node)[1] for node in chosen}, order)
    for node, weight in zip(chosen, weights, strict=True):
        x, _, bias, *_ = arguments(node)
        convolution = torch.ops.mkldnn._convolution_pointwise.default  # which a build without oneDNN has not
        call = emit(gm, convolution, (x, weight, bias, *_geometry(node), "none", [], ""), like=node)
        substitute(node, call)
        gm.graph.erase_node(node)
    return len(chosen)


Geometry = tuple[list[int], list[int], list[int], int]
"""Padding, stride, dilation and groups, in oneDNN's order."""


def _geometry(node: Node) -> Geometry:
    stride, padding, dilation, groups = arguments(node)[3:]
    return padding, stride, dilation, groups


def _count_padding(gm: GraphModule, node: Node) -> None:
    """Put numbers in the place of padding="same" and "valid"."""
    x, weight, _, _, padding, dilation, _ = arguments(node)
    if isinstance(padding, str):
        x, padding = numeric_padding(gm, x, padding, list(value(weight).shape[2:]), dilation, like=node)
        node.update_arg(0, x)
        node.update_arg(4, padding)


def _ordered(weights: tuple[Tensor, ...], *, calls: list[tuple[Geometry, list[int]]]) -> tuple[Tensor, ...]:
    """The weights as the library reads them, for an x of these shapes."""
    reorder = torch.ops.mkldnn._reorder_convolution_weight.default
    return tuple(reorder(weight, *geometry, shape) for weight, (geometry, shape) in zip(weights, calls, strict=True))


def _objection(node: Node, constant: set[Node]) -> str:
    """Why a convolution stays as it is; empty if nothing is against it."""
    x, weight = map(value, arguments(node)[:2])
    dtypes = {value(n).dtype for n in (node, *arguments(node)[:3]) if n is not None}
    if x.device.type != "cpu":
        return f"it is on {x.device.type}"
    if needs_gradient(node):
        return "a gradient flows through it"
    if len(dtypes) > 1:
        return f"its dtypes are {', '.join(sorted(map(str, dtypes)))}, expected one"
    if not onednn_computes(x.dtype):
        return f"oneDNN does not compute in {x.dtype} here"
    if x.dim() != weight.dim():
        return "its input has no batch"
    if not all(isinstance(size, int) and size > 0 for size in x.shape):
        return f"its input is of shape {tuple(x.shape)}, expected fixed sizes, none of them 0"
    if arguments(node)[1] not in constant:
        return "its weight is not computed from parameters alone"
    if weight.numel() > MOST:
        return f"its weight has {weight.numel()} values, more than the {MOST} that are kept twice"
    sums = [name for _, reader in readers(node) if _may_add(name := name_of(reader))]
    if sums and arguments(node)[6] != 1 and x.dtype != torch.float32:
        return f"it is read by {sums[0]}, and PyTorch has no sum and ReLU of {x.dtype} behind groups"
    return ""


def _may_add(name: str) -> bool:
    """Whether a call may be a sum in the end, or be nothing and leave the place to one."""
    return "add" in name or name in ("to", "clone")
