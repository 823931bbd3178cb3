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
import torch.nn.functional as F
from torch.fx import Graph, Node

from fp4fx.dataflow import (
    CUTS,
    DROPOUTS,
    IDENTITIES,
    PADS,
    RESHAPES,
    TRANSPOSES,
    VIEWS,
    activation_source,
    argument,
    axes_along,
    dependents,
    op_name,
    permutation,
    shape_of,
    sources,
    view_chain,
)
from fp4fx.products import factors
from fp4fx.site import Note, Op, Order, Site

aten = torch.ops.aten


class ComputeOp(NamedTuple):
    """Where an op has its weight, its activation and its groups among its arguments, and how it reads the weight."""

    op: Op
    order: Order
    weight: int = 1
    activation: int = 0
    groups: int | None = None
    fuses: bool = True
    """True if the op has a form that reads its weight packed."""


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
    aten.embedding_bag.default: ComputeOp("embedding", "rows", weight=0, activation=1, fuses=False),
    aten.embedding_bag.padding_idx: ComputeOp("embedding", "rows", weight=0, activation=1, fuses=False),
    F.embedding_bag: ComputeOp("embedding", "rows", weight=1, activation=0, fuses=False),
    aten.bilinear.default: ComputeOp("bilinear", "rows", weight=2, activation=1, fuses=False),
    aten.layer_norm.default: ComputeOp("norm", "rows", weight=2, fuses=False),
    aten.group_norm.default: ComputeOp("norm", "rows", weight=2, fuses=False),
    aten.rms_norm.default: ComputeOp("norm", "rows", weight=2, fuses=False),
    aten.batch_norm.default: ComputeOp("norm", "rows", fuses=False),
    aten.instance_norm.default: ComputeOp("norm", "rows", fuses=False),
}
"""The ops that eat a weight; a product of a parameter and an activation is one more, in disguise."""

PRODUCT = ComputeOp("linear", "rows")

RECURRENT = frozenset(f"{kind}{cell}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell"))
NO_RECURRENT = "recurrent layers are not supported yet"
COPIES = frozenset({"expand", "expand_as", "repeat", "index"})
RECTIFIERS = frozenset({"relu", "relu_", "relu6", "relu6_"})


@dataclass(frozen=True)
class GraphSites:
    """What `find_sites` found: sites in execution order, the node of each, and the parameters it left alone."""

    sites: tuple[Site, ...]
    nodes: tuple[Node, ...]
    weights: tuple[Node, ...]
    """What each of the nodes multiplies with: the parameter itself, or what is made from it."""
    activations: tuple[Any, ...]
    """What each of the nodes reads its activation from: an argument of it."""
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
    found: list[tuple[Node, _Use, Site]] = []
    parts: dict[str, str] = {}
    activations: dict[Node, int] = {}
    for node in graph.nodes:
        use = _use(node, parameters, dynamic)
        weight = None if use is None else _weight(use, parameters, dynamic)
        if use is None or weight is None:
            continue
        compute, activation = use.compute, use.activation
        source = activation_source(activation) if isinstance(activation, Node) else node
        number = activations.setdefault(source, len(activations))
        groups = 1 if compute.groups is None else argument(node, compute.groups)
        called_in = module_of(node)
        parts.update(dict.fromkeys(weight.parts, weight.parameters[0]))
        for name in weight.parameters:
            names = (name, *tied.get(name, ()))
            owned = called_in in stock and called_in in {n.rpartition(".")[0] for n in names}
            shape = weight.shapes[name]
            normed_by, rectified = _made_by(activation, parameters)
            site = Site(
                parameter=name,
                op=compute.op,
                shape=shape,
                order=weight.order,
                groups=groups if isinstance(groups, int) else 1,
                index=len(found),
                called_in=called_in,
                own_input=owned and use.last and isinstance(activation, Node) and comes_with_call(activation, node),
                activation=number,
                normed_by=normed_by,
                rectified=rectified,
                tied=names[1:],
                transform=weight.transform,
                refusal=weight.refusal,
                numel=math.prod(shape),
            )
            found.append((node, use, site))
    sites = _with_siblings([site for _, _, site in found])
    notes = _notes(parameters, {s.parameter for s in sites}, parts)
    nodes, uses = tuple(node for node, _, _ in found), [use for _, use, _ in found]
    return GraphSites(sites, nodes, tuple(use.weight for use in uses), tuple(use.activation for use in uses), notes)


def module_of(node: Node) -> str:
    """Qualified name of the innermost module whose forward made a node; "" is the root.

    Dynamo writes `L['self'].layer1.0` where `torch.export` and the symbolic trace write `layer1.0`.
    """
    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return re.sub(r"^L\['\w+'\]\.?", "", path)


class _Use(NamedTuple):
    """One op and the weight that it may be said to have."""

    name: str
    compute: ComputeOp
    weight: Node
    activation: Any
    reduced: int | None
    """The axis of the weight, from the end, that the op sums over; None: the op's order says it."""
    last: bool = True
    """True if the activation is reduced along its last axis, or along its channels."""


def _use(node: Node, parameters: Mapping[Node, str], dynamic: Collection[Node]) -> _Use | None:
    """A compute op, or a product of an activation and something that is a parameter up to views."""
    name, compute = op_name(node), COMPUTE_OPS.get(node.target)
    if compute is not None:
        weight = argument(node, compute.weight)
        if not isinstance(weight, Node) or node.kwargs.get("max_norm") is not None:
            return None
        reduced = -1 if compute.order == "rows" and compute.op != "norm" else None
        return _Use(name, compute, weight, argument(node, compute.activation), reduced)
    left, right = factors(node) or (None, None)
    if left is None or right is None:
        return None
    for mine, other in ((right, left), (left, right)):
        *_, end = view_chain(mine.node, parameters)
        if end in parameters and len(shape_of(end) or ()) > 1 and other.node in dynamic:
            return _Use(name, PRODUCT, mine.node, other.node, mine.reduced, last=other.reduced == -1)
    return None


class _Weight(NamedTuple):
    """What a compute op's weight is made from."""

    parameters: list[str]
    """The parameters that are sites of the op: one, or all that make the weight, with a refusal."""
    parts: list[str]
    """Other parameters that go into it, such as the magnitudes of weight norm."""
    shapes: dict[str, tuple[int, ...]]
    transform: str | None
    refusal: str | None
    order: Order


def _weight(use: _Use, parameters: Mapping[Node, str], dynamic: Collection[Node]) -> _Weight | None:
    """The weight of a compute op; None if no parameter goes into it."""
    compute = use.compute
    if compute.op == "norm" and use.activation not in dynamic:
        return None  # weight standardisation: the norm of a weight is a transform, not a layer
    chain = list(view_chain(use.weight, parameters))
    end = chain[-1]
    leaves = [end] if end in parameters else _leaves(end, parameters, dynamic)
    shapes = {parameters[leaf]: shape for leaf in leaves if (shape := shape_of(leaf)) is not None}
    if not shapes:
        return None
    names, refusal = _choose(shapes, end, dynamic)
    if not names:
        return None
    parts = [name for name in shapes if name not in names]
    order = _order(use, chain, shapes[names[0]])
    if end not in parameters or order is None:
        transform = _transform(chain, parameters, compute)
        if order is None and compute is PRODUCT and refusal is None:
            refusal = _no_axis(use, chain, shapes[names[0]])
        return _Weight(names, parts, shapes, transform, refusal, order or compute.order)
    return _Weight(names, parts, shapes, None, refusal, order)


def _order(use: _Use, chain: Sequence[Node], shape: tuple[int, ...]) -> Order | None:
    """The order in which a parameter's blocks run along what the op reduces; None where views of it hide that."""
    rank, names = len(shape), [op_name(node) for node in chain]
    axis = _axis(use, chain, shape)
    if axis == rank - 1:
        return "rows"
    flattened = rank > 2 and not RESHAPES.isdisjoint(names) and CUTS.isdisjoint(names)
    if flattened and use.compute.op == "linear" and (use.compute is not PRODUCT or axis == 1 == math.prod(shape[2:])):
        return "conv"  # a convolution that is run as a linear
    return "columns" if rank > 1 and axis == rank - 2 else None


def _axis(use: _Use, chain: Sequence[Node], shape: tuple[int, ...]) -> int | None:
    """The axis that an op reduces of the parameter of this shape at the end of a chain of views, or None."""
    axes = axes_along(chain) if shape_of(chain[-1]) == shape else None
    if not axes or use.reduced is None:
        return None
    return axes[max(use.reduced, -len(axes))]  # the right factor of a product may be a vector


def _no_axis(use: _Use, chain: Sequence[Node], shape: tuple[int, ...]) -> str:
    """Why a product has no order for its parameter."""
    axis = _axis(use, chain, shape)
    if axis is None:
        return f"{use.name} does not sum over exactly one of its axes"
    return f"{use.name} sums over its axis {axis} of {len(shape)}, and blocks run along one of the last two"


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
    if len(turns) % 2 or not all(permutation(node, 2) == (1, 0) for node in turns):
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
        elif (current.target not in COMPUTE_OPS and factors(current) is None) or current not in dynamic:
            stack.extend(reversed(sources(current)))
    return leaves


def comes_with_call(activation: Node, node: Node) -> bool:
    """True if `activation`, up to padding and casts, was made before the call of the module that ran `node`."""
    call = next(reversed(node.meta["nn_module_stack"]))
    while activation.op != "placeholder" and call in activation.meta.get("nn_module_stack", ()):
        if op_name(activation) not in PADS | IDENTITIES or not activation.all_input_nodes:
            return False
        activation = activation.all_input_nodes[0]
    return True


def _made_by(activation: Any, parameters: Mapping[Node, str]) -> tuple[str, bool]:
    """The weight of the normalisation that made an activation, "" if none did; and whether a ReLU lies between."""
    node, rectified = activation, False
    while isinstance(node, Node) and node.op != "placeholder" and node.all_input_nodes:
        compute, name = COMPUTE_OPS.get(node.target), op_name(node)
        if compute is not None:
            weight = argument(node, compute.weight)
            return parameters.get(weight, "") if compute.op == "norm" and isinstance(weight, Node) else "", rectified
        rectifies = name in RECTIFIERS or (name.rstrip("_") == "hardtanh" and argument(node, 1) == 0)
        rectified |= rectifies
        if not rectifies and name not in VIEWS | DROPOUTS | PADS:
            break
        node = node.all_input_nodes[0]
    return "", rectified


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
        elif what in ("embedding", "embedding_bag"):
            notes[name] = f"used in {what} with max_norm, which writes to the table, or a negative padding_idx"
        elif user.target in COMPUTE_OPS:
            notes[name] = f"used in {what}, but not as its weight"
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
