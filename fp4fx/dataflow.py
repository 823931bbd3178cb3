"""What single nodes of an fx graph do with their inputs, known by the name of the op.

`torch.reshape`, `Tensor.reshape` and `aten.reshape` are one op here, so that graphs of the symbolic trace, of
`torch.export` and of torch.compile are read alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

CASTS = frozenset({"to", "_to_copy", "type", "type_as", "float", "half", "bfloat16", "double"})
IDENTITIES = CASTS | {"contiguous", "clone", "detach", "detach_", "alias", "lift_fresh_copy", "requires_grad_"}
DROPOUTS = frozenset({"dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
PADS = frozenset({"pad", "constant_pad_nd"})
TRANSPOSES = frozenset({"t", "transpose", "swapaxes", "swapdims", "permute", "numpy_T", "mT"})
RESHAPES = frozenset(
    {"view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten", "view_as", "reshape_as"}
)
SPLITS = frozenset({"split", "split_with_sizes", "chunk", "tensor_split", "unbind"})
CUTS = SPLITS | {"slice", "select", "narrow", "getitem"}
GATHERS = frozenset({"index", "index_select"})
VIEWS = IDENTITIES | TRANSPOSES | RESHAPES | CUTS

_SHAPE_READS = frozenset({"size", "dim", "numel", "sym_size", "sym_numel", "is_floating_point", "element_size"})
_SHAPE_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "layout", "itemsize"})


def op_name(node: Node) -> str:
    """Name of a node's op without namespace and overload: `reshape` for the method, the function and the ATen op."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return packet if isinstance(packet, str) else getattr(packet, "__name__", str(packet))


def argument(node: Node, position: int, name: str = "") -> Any:
    """An argument by its position or else by its name; None if it is not given."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def shape_of(node: Node) -> tuple[int, ...] | None:
    """Shape of the tensor in a node's `meta["val"]` or Dynamo's `meta["example_value"]`; None if not known in full."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, torch.Tensor) or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(value.shape)


def sources(node: Node) -> Sequence[Node]:
    """The inputs whose values, not only shape, dtype or device, a node reads."""
    name = op_name(node)
    if name in _SHAPE_READS or (name == "getattr" and node.args[1] in _SHAPE_ATTRIBUTES):
        return ()
    return node.all_input_nodes[:1] if name in CASTS else node.all_input_nodes


def dependents(graph: Graph, inputs: Collection[Node]) -> set[Node]:
    """`inputs` and the nodes that depend on their values."""
    found = set(inputs)
    for node in graph.nodes:
        if any(source in found for source in sources(node)):
            found.add(node)
    return found


def activation_source(node: Node) -> Node:
    """The value that an activation holds, ahead of casts, dropout and swaps of dimensions other than the last."""
    while node.op != "placeholder" and node.all_input_nodes:
        name, rank = op_name(node), len(shape_of(node) or ())
        swapped = name == "transpose" and all(isinstance(d, int) and d % rank < rank - 1 for d in node.args[1:] if rank)
        if name not in IDENTITIES | DROPOUTS and not (swapped and rank):
            return node
        node = node.all_input_nodes[0]
    return node


def view_chain(node: Node, ends: Collection[Node]) -> Iterator[Node]:
    """`node`, what it is a view, a cast or some rows of, and so on back to one of `ends` or to an op that does more."""
    while True:
        yield node
        name = op_name(node)
        if node in ends or not node.all_input_nodes:
            return
        if not gathers(node) and (name not in VIEWS or (name in CUTS and not cuts_rows(node))):
            return
        node = node.all_input_nodes[0]


def permutation(node: Node, rank: int) -> tuple[int, ...] | None:
    """The order in which a node of `TRANSPOSES` puts the axes of its input, not negative; None if it is not known."""
    name = op_name(node)
    dims: list[Any] = list(node.args[1:])
    order = list(range(rank))
    if name == "permute" and len(dims) == 1 and isinstance(dims[0], (list, tuple)):
        dims = list(dims[0])
    if node.kwargs or rank < 1 or not all(isinstance(d, int) and -rank <= d < rank for d in dims):
        return None
    if name == "permute":
        return tuple(d % rank for d in dims) if len(dims) == rank else None
    if name == "numpy_T" or (name == "t" and rank <= 2):
        return tuple(reversed(order))
    if name == "mT":
        dims = [-2, -1]
    if rank < 2 or len(dims) != 2:
        return None
    a, b = (d % rank for d in dims)
    order[a], order[b] = b, a
    return tuple(order)


def axes_along(chain: Sequence[Node]) -> list[int | None] | None:
    """For each axis of the first node of a `view_chain`, that of the last one that it is, or None; None if not known.

    Axes are to be counted from the end: how many there are in front is not known of one of a stack.
    """
    shape = shape_of(chain[-1])
    if shape is None:
        return None
    axes: list[int | None] = list(range(len(shape)))
    for node in reversed(chain[:-1]):
        name = op_name(node)
        if name in TRANSPOSES:
            order = permutation(node, len(axes))
            if order is None:
                return None
            axes = [axes[i] for i in order]
        elif name in RESHAPES:
            before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
            if before is None or after is None or len(before) != len(axes):
                return None
            places = {(size, math.prod(before[i + 1 :])): axes[i] for i, size in enumerate(before) if size > 1}
            axes = [places.get((size, math.prod(after[i + 1 :]))) for i, size in enumerate(after)]
        elif gathers(node) or (name in CUTS and _drops_first(node)):
            rank = len(shape_of(node) or axes[1:])
            axes = [*[None] * (rank - len(axes) + 1), *axes[1:]]
    return axes


def _drops_first(node: Node) -> bool:
    """True if a node of `CUTS` takes the first axis away."""
    if op_name(node) != "getitem":
        return op_name(node) in {"select", "unbind"}
    source, index = node.args
    if isinstance(source, Node) and op_name(source) in SPLITS:
        return False
    return isinstance(index[0] if isinstance(index, tuple) else index, int)


def gathers(node: Node) -> bool:
    """True if a node picks parts of a stack of matrices along the first axis, whole and by their numbers."""
    stack = node.all_input_nodes[0] if node.all_input_nodes else None
    if stack is None or node.args[0] is not stack or len(shape_of(stack) or ()) < 3 or len(node.args) < 2:
        return False
    name, index = op_name(node), node.args[1]
    if name == "index_select":
        return isinstance(index, int) and index == 0
    if name == "index" and isinstance(index, (list, tuple)):
        return len(index) == 1 and isinstance(index[0], Node)
    return name == "getitem" and isinstance(index, Node) and op_name(stack) not in SPLITS


def cuts_rows(node: Node) -> bool:
    """True if a node of `CUTS` keeps whole rows, that is, cuts dimension 0 only."""
    name = op_name(node)
    if name != "getitem":
        return (argument(node, 1 if name in {"slice", "select", "narrow", "unbind"} else 2, "dim") or 0) == 0
    source, index = node.args
    if isinstance(source, Node) and op_name(source) in SPLITS:
        return True
    first, *others = index if isinstance(index, tuple) else (index,)
    return isinstance(first, (int, slice)) and all(other is ... or other == slice(None) for other in others)
