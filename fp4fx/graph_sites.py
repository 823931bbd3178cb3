"""Sites of one fx graph, found by following data backwards from the weight of every compute op.

The graph may come from `trace.py` or from torch.compile; its compute ops must be the ATen overloads of `COMPUTE_OPS`
(`canonical.py` makes them so).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from fp4fx.dataflow import (
    CUTS,
    IDENTITIES,
    PADS,
    RESHAPES,
    TRANSPOSES,
    VIEWS,
    activation_source,
    argument,
    dependents,
    is_matrix_transpose,
    op_name,
    shape_of,
    sources,
    view_chain,
)
from fp4fx.site import Note, Op, Order, Site

aten = torch.ops.aten


class ComputeOp(NamedTuple):
    """Where an op has its weight, its activation and its groups among its arguments, and how it reads the weight."""

    op: Op
    order: Order
    weight: int = 1
    activation: int = 0
    groups: int | None = None


COMPUTE_OPS: Mapping[Any, ComputeOp] = {
    aten.linear.default: ComputeOp("linear", "rows"),
    aten.conv1d.default: ComputeOp("conv1d", "conv", groups=6),
    aten.conv1d.padding: ComputeOp("conv1d", "conv", groups=6),
    aten.conv2d.default: ComputeOp("conv2d", "conv", groups=6),
    aten.conv2d.padding: ComputeOp("conv2d", "conv", groups=6),
    aten.conv3d.default: ComputeOp("conv3d", "conv", groups=6),
    aten.conv3d.padding: ComputeOp("conv3d", "conv", groups=6),
    aten.conv_transpose1d.default: ComputeOp("conv_transpose1d", "conv_transpose", groups=6),
    aten.conv_transpose2d.input: ComputeOp("conv_transpose2d", "conv_transpose", groups=6),
    aten.conv_transpose3d.input: ComputeOp("conv_transpose3d", "conv_transpose", groups=6),
    aten.embedding.default: ComputeOp("embedding", "rows", weight=0, activation=1),
    aten.layer_norm.default: ComputeOp("norm", "rows", weight=2),
    aten.group_norm.default: ComputeOp("norm", "rows", weight=2),
    aten.rms_norm.default: ComputeOp("norm", "rows", weight=2),
    aten.batch_norm.default: ComputeOp("norm", "rows"),
    aten.instance_norm.default: ComputeOp("norm", "rows"),
}
"""The ops that eat a weight."""

RECURRENT = frozenset(f"{kind}{cell}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell"))
NO_RECURRENT = "recurrent layers are not supported yet"
COPIES = frozenset({"expand", "expand_as", "repeat", "index"})


@dataclass(frozen=True)
class GraphSites:
    """What `find_sites` found: sites in execution order, the node of each, and the parameters it left alone."""

    sites: tuple[Site, ...]
    nodes: tuple[Node, ...]
    notes: tuple[Note, ...]


def find_sites(
    graph: Graph,
    parameters: Mapping[Node, str],
    *,
    inputs: Collection[Node] | None = None,
    stock: Collection[str] = (),
    tied: Mapping[str, tuple[str, ...]] | None = None,
) -> GraphSites:
    """The sites of a graph, and a note for each parameter of rank >= 2 that it uses in another way.

    Args:
        graph: A parameter's node must carry its tensor, real, fake or on meta, in `meta["val"]` or `["example_value"]`.
        parameters: The nodes that stand for parameters, with their names; two nodes of one name are one tensor.
        inputs: The nodes that stand for activations; every placeholder that is not a parameter if not given.
        stock: Names of the modules that are linears or convolutions of PyTorch or subclasses of them.
        tied: For a parameter that has several names, the others.
    """
    if inputs is None:
        inputs = [node for node in graph.nodes if node.op == "placeholder" and node not in parameters]
    dynamic, tied = dependents(graph, inputs), tied or {}
    found: list[tuple[Node, Site]] = []
    parts: dict[str, str] = {}
    activations: dict[Node, int] = {}
    for node in graph.nodes:
        compute = COMPUTE_OPS.get(node.target)
        weight = _weight(node, compute, parameters, dynamic) if compute is not None else None
        if compute is None or weight is None:
            continue
        activation = argument(node, compute.activation)
        source = activation_source(activation) if isinstance(activation, Node) else node
        number = activations.setdefault(source, len(activations))
        groups = 1 if compute.groups is None else argument(node, compute.groups)
        called_in = module_of(node)
        parts.update(dict.fromkeys(weight.parts, weight.parameters[0]))
        for name in weight.parameters:
            names = (name, *tied.get(name, ()))
            owned = called_in in stock and called_in in {n.rpartition(".")[0] for n in names}
            shape = weight.shapes[name]
            site = Site(
                parameter=name,
                op=compute.op,
                shape=shape,
                order="conv" if weight.flattened and compute.op == "linear" else compute.order,
                groups=groups if isinstance(groups, int) else 1,
                index=len(found),
                called_in=called_in,
                own_input=owned and isinstance(activation, Node) and _comes_with_call(activation, node),
                activation=number,
                tied=names[1:],
                transform=weight.transform,
                refusal=weight.refusal,
                numel=math.prod(shape),
            )
            found.append((node, site))
    sites = _with_siblings([site for _, site in found])
    return GraphSites(sites, tuple(node for node, _ in found), _notes(parameters, {s.parameter for s in sites}, parts))


def module_of(node: Node) -> str:
    """Qualified name of the innermost module whose forward made a node; "" is the root.

    Dynamo writes `L['self'].layer1.0` where `torch.export` and the symbolic trace write `layer1.0`.
    """
    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return re.sub(r"^L\['\w+'\]\.?", "", path)


class _Weight(NamedTuple):
    """What a compute op's weight is made from."""

    parameters: list[str]
    """The parameters that are sites of the op: one, or all that make the weight, with a refusal."""
    parts: list[str]
    """Other parameters that go into it, such as the magnitudes of weight norm."""
    shapes: dict[str, tuple[int, ...]]
    transform: str | None
    refusal: str | None
    flattened: bool
    """True for a parameter of rank > 2 that is viewed as a matrix, as a 1x1 convolution run as a linear is."""


def _weight(
    node: Node, compute: ComputeOp, parameters: Mapping[Node, str], dynamic: Collection[Node]
) -> _Weight | None:
    """The weight of a compute op; None if no parameter goes into it."""
    weight = argument(node, compute.weight)
    if not isinstance(weight, Node):
        return None
    if compute.op == "norm" and argument(node, compute.activation) not in dynamic:
        return None  # weight standardisation: the norm of a weight is a transform, not a layer
    chain = list(view_chain(weight, parameters))
    end = chain[-1]
    leaves = [end] if end in parameters else _leaves(end, parameters, dynamic)
    shapes = {parameters[leaf]: shape for leaf in leaves if (shape := shape_of(leaf)) is not None}
    if not shapes:
        return None
    names, refusal = _choose(shapes, end, dynamic)
    if not names:
        return None
    parts = [name for name in shapes if name not in names]
    flattened = any(op_name(n) in RESHAPES for n in chain) and not any(op_name(n) in CUTS for n in chain)
    flattened = flattened and len(shapes[names[0]]) > 2
    return _Weight(names, parts, shapes, _transform(chain, parameters, compute), refusal, flattened)


def _choose(
    shapes: Mapping[str, tuple[int, ...]], value: Node, dynamic: Collection[Node]
) -> tuple[list[str], str | None]:
    """Which of the parameters that make `value` are sites, and why they cannot be quantized, or None."""
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    if value in dynamic:
        return matrices, "the weight depends on an activation"
    if len(shapes) == 1:
        return list(shapes), None
    whole = shape_of(value)
    full = [name for name, shape in shapes.items() if whole is not None and math.prod(shape) == math.prod(whole)]
    if len(full) == 1:
        return full, None
    return matrices, f"{' and '.join(matrices)} make one weight together"


def _transform(chain: Sequence[Node], parameters: Mapping[Node, str], compute: ComputeOp) -> str | None:
    """The op nearest the compute op that does more than a view, a cast or a block of rows, or None."""
    end = chain[-1]
    if end not in parameters:
        return op_name(end)
    turns = [node for node in chain if op_name(node) in TRANSPOSES]
    if len(turns) % 2 or not all(is_matrix_transpose(node) for node in turns):
        return op_name(turns[0])
    reshapes = [node for node in chain if op_name(node) in RESHAPES]
    flat = compute.op != "norm" and len(shape_of(end) or (0, 0)) < 2  # a view gives it its rows
    return op_name(reshapes[0]) if flat and reshapes else None


def _leaves(node: Node, parameters: Mapping[Node, str], dynamic: Collection[Node]) -> list[Node]:
    """The parameters that a value is made from, but for those that belong to layers which run on activations."""
    leaves: list[Node] = []
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in parameters:
            leaves.append(current)
        elif current.target not in COMPUTE_OPS or current not in dynamic:
            stack.extend(reversed(sources(current)))
    return leaves


def _comes_with_call(activation: Node, node: Node) -> bool:
    """True if `activation`, up to padding and casts, was made before the call of the module that ran `node`."""
    call = next(reversed(node.meta["nn_module_stack"]))
    while activation.op != "placeholder" and call in activation.meta.get("nn_module_stack", ()):
        if op_name(activation) not in PADS | IDENTITIES or not activation.all_input_nodes:
            return False
        activation = activation.all_input_nodes[0]
    return True


def _with_siblings(sites: Sequence[Site]) -> tuple[Site, ...]:
    """`sites` with the parameters of the other linears and convolutions that read the same activation."""
    readers: dict[int, dict[str, None]] = {}
    for site in sites:
        if site.op not in {"norm", "embedding"}:
            readers.setdefault(site.activation, {})[site.parameter] = None
    return tuple(
        site
        if site.op in {"norm", "embedding"}
        else replace(site, siblings=tuple(name for name in readers[site.activation] if name != site.parameter))
        for site in sites
    )


def _notes(parameters: Mapping[Node, str], eaten: Collection[str], parts: Mapping[str, str]) -> tuple[Note, ...]:
    """A note for each parameter of rank >= 2 that is used but is nobody's weight."""
    notes: dict[str, str] = {}
    for node, name in parameters.items():
        shape, user = shape_of(node), _first_use(node)
        if name in eaten or shape is None or len(shape) < 2 or user is None:
            continue
        what = op_name(user)
        if name in parts:
            notes[name] = f"part of the weight that is made from {parts[name]}"
        elif what in RECURRENT:
            notes[name] = NO_RECURRENT
        elif what == "embedding_bag":
            notes[name] = "used in embedding_bag, which is not supported yet"
        else:
            notes[name] = f"used in {what}, which is not a linear, a convolution or an embedding"
    return tuple(Note(name, reason) for name, reason in notes.items())


def _first_use(node: Node) -> Node | None:
    """The first op that does more with a value than view, cast, split or copy it."""
    for user in node.users:
        deeper = _first_use(user) if op_name(user) in VIEWS | COPIES else user
        if deeper is not None:
            return deeper
    return None
