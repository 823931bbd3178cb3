"""What follows a fused product, drawn into its op: norms in evaluation, per-channel factors, residuals, activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fp4fx.capture import (
    arguments,
    emit,
    mutated,
    needs_gradient,
    refresh,
    storages,
    substitute,
    value,
)
from fp4fx.passes.replay import is_context_switch
from fp4fx.passes.spellings import (
    activation_of,
    inverse,
    is_identity,
    is_trivial,
    operands_of,
    permutation_of,
)
from fp4fx.passes.vectors import Vectors
from fp4fx.pipeline import Context, aten_name, op_name
from fp4fx.sizes import same_shape

aten = torch.ops.aten


def fuse_epilogue(gm: GraphModule, ctx: Context) -> int:
    """Let linears and convolutions do what is done to their results next, where nobody else reads what is in between.

    Before: `y = fp4fx.conv(x, p, s, g, bias, ...)`, `y = aten.batch_norm(y, w, b, mean, var, ...)`, `y += identity`,
    `F.relu(y, inplace=True)`
    After: `fp4fx.conv(x, p, s, g, (bias - mean) · scale + b, ..., scale, identity, "relu")` in the place of the last of
    them, with `scale = w · rsqrt(var + eps)` computed in fp32
    """
    writers = _Writers(gm)
    rewrites = 0
    for node in list(gm.graph.nodes):
        if op_name(node) not in ("linear", "conv", "conv_transpose"):
            continue
        if arguments(node)[-4:-1] == (None, None, "none"):
            rewrites += _Chain(node, writers).fuse(gm)
    return rewrites


class _Writers:
    """The calls of a graph that write into tensors, or that switch a mode which no call may be moved across."""

    def __init__(self, gm: GraphModule) -> None:
        self.switches = [node for node in gm.graph.nodes if is_context_switch(node)]
        written = {node: mutated(node) for node in gm.graph.nodes if node not in self.switches}
        self.written = {node: storage for node, storage in written.items() if storage}

    def between(self, first: Node, last: Node, read: set[int], own: Sequence[Node]) -> bool:
        """Whether between two nodes one of these storages is written to, by other nodes than `own`, or a mode set."""
        return any(first < node < last for node in self.switches) or any(
            storage & read and first < node < last and node not in own for node, storage in self.written.items()
        )


@dataclass
class _Chain:
    """A fused op and the calls after it that it takes over, each of which reads the one before and is read by one."""

    op: Node
    writers: _Writers
    absorbed: list[Node] = field(default_factory=list)
    affine: list[Node] = field(default_factory=list)
    """Those of the calls that scale or shift channels."""
    residual: Node | None = None
    residual_dims: tuple[int, ...] = ()
    """How the product was permuted where the residual was added."""
    activation: str = "none"

    def __post_init__(self) -> None:
        self.rank = value(self.op).dim()
        self.axis = self.rank - 1 if op_name(self.op) == "linear" else 1
        self.dims: tuple[int, ...] = tuple(range(self.rank))  # the last value is the product permuted so

    @property
    def last(self) -> Node:
        return self.absorbed[-1] if self.absorbed else self.op

    @property
    def channels_at(self) -> int:
        """Where the channels are in the last value."""
        return self.dims.index(self.axis)

    def fuse(self, gm: GraphModule) -> bool:
        """Take over what fits; False if that is nothing."""
        while self._grow():
            pass
        while self.absorbed and permutation_of(self.last, self.rank):  # at the end it is a view like any other
            dims = permutation_of(self.absorbed.pop(), self.rank) or ()
            self.dims = tuple(self.dims[d] for d in inverse(dims))
        if not self.affine and self.residual is None and self.activation == "none":
            return False
        self._rewrite(gm)
        return True

    def _grow(self) -> bool:
        if self.activation != "none" or len(self.last.users) != 1:
            return False
        last, (node,) = self.last, self.last.users
        result = value(node)
        if not isinstance(result, Tensor) or result.dtype != value(last).dtype or result.dtype == torch.float64:
            return False
        if needs_gradient(node) or _count(node, last) != 1:
            return False
        own = [self.op, *self.absorbed]
        read = {n for reader in (*own, node) for n in reader.all_input_nodes if n not in own}
        if self.writers.between(self.op, node, storages(map(value, read)), own) or not self._take(node, last):
            return False
        self.absorbed.append(node)
        return True

    def _take(self, node: Node, last: Node) -> bool:
        """Note what a call does to the last value; False if no op can do that."""
        activation, dims = activation_of(node, last), permutation_of(node, self.rank)
        if is_identity(node):
            return node.args[0] is last
        if activation is not None:
            self.activation = activation
            return True
        if dims is not None:
            self.dims = tuple(self.dims[d] for d in dims)
            return True
        if self.residual is not None:
            return False
        if aten_name(node) == "batch_norm":
            x, _, _, mean, variance, training, *_ = arguments(node)
            if training or mean is None or variance is None or x is not last or self.channels_at != 1:
                return False
            self.affine.append(node)
            return True
        kind, other = operands_of(node, last) or (None, None)
        if not isinstance(other, Node) or not isinstance(value(other), Tensor) or not _alike(value(node), value(last)):
            return False
        if kind == "add" and _alike(value(other), value(last)):
            self.residual, self.residual_dims = other, self.dims
        elif self._is_per_channel(value(other)):
            self.affine.append(node)
        else:
            return False
        return True

    def _is_per_channel(self, tensor: Tensor) -> bool:
        n = value(self.op).shape[self.axis]
        shape = [1] * (self.rank - tensor.dim()) + list(tensor.shape)
        return tensor.is_floating_point() and shape == [n if d == self.channels_at else 1 for d in range(self.rank)]

    def _rewrite(self, gm: GraphModule) -> None:
        """Move the op to the place of the last call, with its epilogue, and erase the calls."""
        op, last = self.op, self.last
        last.prepend(op)
        scale, bias = self._scale_and_bias(gm)
        residual = self.residual
        if residual is not None and not is_trivial(self.residual_dims):
            residual = _permuted(gm, residual, inverse(self.residual_dims), like=op)
        args = list(arguments(op))
        args[4], args[-4:-1] = bias, [scale, residual, self.activation]
        op.args = tuple(args)
        result = op
        if not is_trivial(self.dims):
            refresh(gm, op)
            result = emit(gm, aten.permute.default, (op, list(self.dims)), like=last)
        substitute(last, result)
        for node in reversed(self.absorbed):
            self.writers.written.pop(node, None)
            gm.graph.erase_node(node)

    def _scale_and_bias(self, gm: GraphModule) -> tuple[Node | None, Node | None]:
        """Scale and bias, in fp32 [N] where a step has changed them."""
        vectors = Vectors(gm, self.op)
        scale: Node | None = None
        bias: Node | None = arguments(self.op)[4]
        for node in self.affine:
            factor: Node | None = None
            if aten_name(node) == "batch_norm":
                factor, bias = vectors.normed(node, bias)
            else:
                last = next(a for a in node.args if a is self.op or a in self.absorbed)
                kind, other = operands_of(node, last)  # type: ignore[misc,arg-type]
                if kind == "add":
                    bias = vectors.plus(vectors.wide(bias), vectors.wide(other))
                else:
                    factor = vectors.wide(other)
                    bias = None if bias is None else vectors.times(vectors.wide(bias), factor)
            scale = vectors.times(scale, factor)
        return scale, bias


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and same_shape(a, b)


def _count(node: Node, argument: Node) -> int:
    """How often a call reads a node."""
    seen: list[Node] = []
    torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: seen.append(n) or n)  # type: ignore[func-returns-value]
    return seen.count(argument)


def _permuted(gm: GraphModule, node: Node, dims: tuple[int, ...], *, like: Node) -> Node:
    """The node permuted; what is permuted the other way round already is taken as it was."""
    if permutation_of(node, len(dims)) == inverse(dims):
        return node.args[0]  # type: ignore[return-value]
    return emit(gm, aten.permute.default, (node, list(dims)), like=like)
