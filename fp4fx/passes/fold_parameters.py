"""What is computed from parameters and buffers alone, computed outside the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fp4fx.capture import add_input, arguments, emit, mutated, needs_gradient, storages, value
from fp4fx.folding import Folded, Leaf, computed
from fp4fx.passes.replay import is_context_switch
from fp4fx.pipeline import Context, aten_name

aten = torch.ops.aten

MOST = 1 << 18
"""Values of a result that may be kept beside the parameters that it is computed from."""

_ARITHMETIC = frozenset(
    {
        aten.add.Scalar,
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.neg.default,
        aten.reshape.default,
        aten.rsqrt.default,
        aten.to.dtype,
    }
)
"""What passes emit for norms, factors and biases: functions of values, under any autocast."""


def fold_parameters(gm: GraphModule, ctx: Context) -> int:
    """Take what is computed from parameters and buffers alone as inputs, so that it is computed when one changes.

    Nothing is taken out through which a gradient flows, nor what the graph itself writes to. Under freezing all of it
    is left to Inductor, for which parameters are constants.

    Before: `scale = aten.mul(aten.rsqrt(aten.add(variance, eps)), weight)`, `fp4fx.conv(x, ..., scale, ...)`
    After: `scale` is an input of the graph
    """
    if ctx.freezing:
        return 0
    _widen(gm)
    constants = leaves, calls = computable(gm, ctx)
    known = {*leaves, *calls}
    roots = [node for node in calls if _is_worth_it(node, known)]
    inputs = take_out(gm, ctx, constants, {root.name: root for root in roots})
    for root, node in zip(roots, inputs, strict=True):
        root.replace_all_uses_with(node)
    return len(roots)


def take_out(
    gm: GraphModule,
    ctx: Context,
    constants: tuple[list[Node], list[Node]],
    roots: Mapping[str, Node],
    then: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None,
) -> list[Node]:
    """New inputs of the graph, by these names, for values among the `computable`, or for what `then` makes of them."""
    if not roots:
        return []
    leaves, calls = constants
    program, read = _program(list(roots.values()), calls, leaves)
    compute = program if then is None else partial(_in_turn, first=program, then=then)
    positions = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    tensors = tuple(Leaf(positions.get(node), ctx.real[node]) for node in read)
    parts = computed(compute, [leaf.tensor for leaf in tensors])
    ctx.folded.append(Folded(tensors, compute, parts))
    return [add_input(gm, f"folded_{name}", part) for name, part in zip(roots, parts, strict=True)]


def _in_turn(
    *tensors: Tensor,
    first: Callable[..., tuple[Tensor, ...]],
    then: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    return then(first(*tensors))


def computable(gm: GraphModule, ctx: Context) -> tuple[list[Node], list[Node]]:
    """The parameters and buffers that the graph does not write to, and the calls of passes on these alone, in order."""
    leaves = constant_inputs(gm, ctx)
    known = set(leaves)
    calls: list[Node] = []
    for node in gm.graph.nodes:
        if node.target in _ARITHMETIC and not needs_gradient(node) and known.issuperset(node.all_input_nodes):
            known.add(node)
            calls.append(node)
    return leaves, calls


def constant_inputs(gm: GraphModule, ctx: Context) -> list[Node]:
    """The parameters and buffers that the graph does not write to, in its order."""
    ours = sum(len(f.parts) for f in ctx.folded)
    placeholders = gm.graph.find_nodes(op="placeholder")
    given = placeholders[: len(placeholders) - ours] + gm.graph.find_nodes(op="get_attr")
    calls = [node for node in gm.graph.nodes if not is_context_switch(node)]
    written = set().union(*(mutated(node) | _statistics(node) for node in calls))
    return [node for node in given if node in ctx.real and not storages([value(node)]) & written]


def program_of(
    gm: GraphModule, ctx: Context, node: Node
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Leaf, ...]] | None:
    """How a value of any shape is computed from parameters and buffers alone, and these; None if it is not.

    The function gives a tuple of the one value. What another call could answer otherwise is none: random numbers are
    not looked for, writes and regions of autocast are.
    """
    if any(map(is_context_switch, gm.graph.nodes)):
        return None
    leaves = constant_inputs(gm, ctx)
    needed, stack = set(leaves), [node]
    while stack:
        current = stack.pop()
        if current not in needed:
            if not current.all_input_nodes or current.op not in ("call_function", "call_method") or mutated(current):
                return None
            needed.add(current)
            stack.extend(current.all_input_nodes)
    compute, read = _program([node], [n for n in gm.graph.nodes if n in needed and n not in set(leaves)], leaves)
    positions = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    return compute, tuple(Leaf(positions.get(n), ctx.real[n]) for n in read)


def _statistics(node: Node) -> set[int]:
    """Storages of the running statistics that a norm in training writes to, which its schema does not tell."""
    if aten_name(node) not in ("batch_norm", "instance_norm"):
        return set()
    _, _, _, mean, variance, training, *_ = arguments(node)
    return storages(value(n) for n in (mean, variance) if isinstance(n, Node)) if training else set()


def _is_worth_it(node: Node, known: set[Node]) -> bool:
    """Whether something that is no such call itself reads a result, which is not large, and no gradient flows there."""
    readers = [user for user in node.users if user not in known]
    return bool(readers) and value(node).numel() <= MOST and not any(map(needs_gradient, readers))


def _program(
    roots: list[Node], calls: list[Node], leaves: list[Node]
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Node]]:
    """A function that computes the roots, and the leaves that it takes."""
    graph = Graph()
    copies = {leaf: graph.placeholder(leaf.name) for leaf in leaves}
    for node in calls:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {}
    graph.output(tuple(copies[root] for root in roots))
    graph.eliminate_dead_code()
    read = [leaf for leaf in leaves if copies[leaf].users]
    for leaf in leaves:
        if leaf not in read:
            graph.erase_node(copies[leaf])
    return GraphModule(torch.nn.Module(), graph), read


def _widen(gm: GraphModule) -> None:
    """Widen the biases of the CPU kernels here, which they would do themselves on every call."""
    for node in gm.graph.nodes:
        if getattr(node.target, "namespace", None) != "fp4fx_cpu" or len(node.args) < 5:
            continue
        bias = node.args[4]
        if isinstance(bias, Node) and value(bias).dim() == 1 and value(bias).dtype in (torch.bfloat16, torch.float16):
            node.update_arg(4, emit(gm, aten.to.dtype, (bias, torch.float32), like=node))
