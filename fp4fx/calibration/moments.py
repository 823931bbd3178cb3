"""The distribution of an activation, channel by channel, from the BatchNorms ahead of it: no data needed.

In evaluation a BatchNorm gives each channel about the mean `bias` and the deviation `|weight|`, by its making; taken as
a normal distribution, that goes through elementwise functions, sums, concatenations and means (Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, who have it for ReLU).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fp4fx.dataflow import CASTS, DROPOUTS, IDENTITIES, argument, op_name

SAME = CASTS | IDENTITIES | DROPOUTS | {"Identity"}
MEANS = frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d", "mean", "flatten", "view", "reshape", "squeeze"}) | {
    f"adaptive_avg_pool{n}d" for n in (1, 2, 3)
}
"""What leaves the mean of a channel as it is, where channels stay channels."""
ELEMENTWISE = frozenset(
    {"relu", "relu_", "relu6", "silu", "silu_", "gelu", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_"}
    | {"hardtanh", "hardtanh_", "sigmoid", "sigmoid_", "tanh", "tanh_", "leaky_relu", "leaky_relu_", "elu", "elu_"}
    | {"mish", "softplus", "clamp", "clamp_"}
)
SUMS = frozenset({"add", "add_", "iadd"})


@dataclass(frozen=True, eq=False)
class Moments:
    """Of every channel."""

    mean: Tensor
    """fp32 [C]."""
    variance: Tensor
    """fp32 [C]."""


def moments(node: Any) -> Moments | str:
    """Mean and variance of what a node of `trace.symbolic_graph` stands for, or why they are not known."""
    if not isinstance(node, Node) or node.op in ("placeholder", "get_attr"):
        return "its input is that of the model, or comes from where the trace cannot follow"
    name, sources = op_name(node), [a for a in node.args if isinstance(a, Node)]
    if name == "batch_norm":
        return _normed(node)
    if name == "cat" and argument(node, 1, "dim") == 1:
        parts = [moments(part) for part in node.args[0]]  # type: ignore[union-attr]
        unknown = next((part for part in parts if isinstance(part, str)), None)
        known = [part for part in parts if isinstance(part, Moments)]
        if unknown is not None:
            return unknown
        return Moments(torch.cat([p.mean for p in known]), torch.cat([p.variance for p in known]))
    if name in SUMS and len(sources) == 2:
        a, b = moments(sources[0]), moments(sources[1])
        if isinstance(a, str) or isinstance(b, str):
            return a if isinstance(a, str) else str(b)
        return Moments(a.mean + b.mean, a.variance + b.variance)
    if name in SAME | MEANS and sources:
        return moments(sources[0])
    if name in ELEMENTWISE and sources:
        given = moments(sources[0])
        return given if isinstance(given, str) else _through(node, given)
    return f"its input comes from {name}, not from a BatchNorm through functions whose mean is known"


def _normed(node: Node) -> Moments | str:
    """A BatchNorm in evaluation."""
    _, weight, bias, mean, _, training = node.args[:6]
    if training or not isinstance(mean, Node):
        return "the BatchNorm ahead of it has no statistics, or is in training"
    like = mean.meta["val"].float()
    shift = bias.meta["val"].detach().float() if isinstance(bias, Node) else torch.zeros_like(like)
    scale = weight.meta["val"].detach().float() if isinstance(weight, Node) else torch.ones_like(like)
    return Moments(shift, scale.square())


def _through(node: Node, given: Moments) -> Moments:
    """A function of one value, integrated over the normal distribution by trapezoids from -8 to 8 deviations."""
    z = torch.linspace(-8, 8, 1601, device=given.mean.device)
    density = torch.exp(-z.square() / 2) * ((z[1] - z[0]) / math.sqrt(2 * math.pi))
    x = given.mean[:, None] + given.variance.sqrt()[:, None] * z
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda _: x)
    y = getattr(x, str(node.target))(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)  # type: ignore[operator]
    mean = y @ density
    return Moments(mean, ((y - mean[:, None]).square() @ density))
