"""What depends on parameters and buffers alone, computed outside the graph: once, and anew when one of them changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fp4fx.capture import CompiledGraph


@dataclass(frozen=True)
class Leaf:
    """A parameter or buffer that something is computed from."""

    position: int | None
    """Which input of the graph it is, since another call may bring another; None if it is an attribute."""
    tensor: Tensor
    """The one that the graph was captured with."""


@dataclass(frozen=True)
class Folded:
    """What is computed outside the graph: its parts are new inputs of the graph, the last ones, in this order."""

    leaves: tuple[Leaf, ...]
    compute: Callable[..., tuple[Tensor, ...]]
    """The parts, from the tensors of the leaves."""
    parts: tuple[Tensor, ...]
    """As of now."""


def computed(compute: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parts for these leaves: plain tensors without a gradient, in whatever mode the graph is called."""
    with torch.inference_mode(False), torch.no_grad():
        return tuple(compute(*tensors))


def with_parts(compiled: CompiledGraph, folded: Sequence[Folded], read: Sequence[int]) -> CompiledGraph:
    """Pass the parts to a graph that takes them behind the inputs at the positions `read`.

    They are computed where there are none, or old ones.

    The graph may be called with other parameters than it was captured with (a second model, an assignment), and one
    may have been written to since (optimizer step, load_state_dict). Only a `.data.mul_()` of a parameter and the like
    leave no trace. A norm in training leaves none on its statistics: buffers are compared by their values.
    """
    if not folded:
        return compiled
    leaves = {(leaf.position, id(leaf.tensor)): leaf for f in folded for leaf in f.leaves}
    place = {key: i for i, key in enumerate(leaves)}
    single: list[tuple[_Memory, list[int]]] = []
    for f in folded:
        memory = _Memory(f.compute, f.leaves)
        memory.remember([leaf.tensor for leaf in f.leaves], f.parts)
        single.append((memory, [place[leaf.position, id(leaf.tensor)] for leaf in f.leaves]))

    def gather(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for memory, where in single for part in memory.parts([tensors[i] for i in where]))

    together = _Memory(gather, list(leaves.values()))
    attributes = tuple(leaf.tensor for leaf in leaves.values() if leaf.position is None)
    behind = iter(range(-len(attributes), 0))
    where = [next(behind) if position is None else position for position, _ in leaves]
    del leaves, f, place  # what is kept must not keep a parameter

    def call(*args: Any) -> Any:
        given = (*args, *attributes) if attributes else args
        return compiled(*[args[i] for i in read], *together.parts([given[i] for i in where]))

    return call


class _Memory:
    """What was computed from every choice of leaves that was seen, for as long as they live."""

    def __init__(self, compute: Callable[..., tuple[Tensor, ...]], leaves: Sequence[Leaf]) -> None:
        self._compute = compute
        self._parameters = [i for i, leaf in enumerate(leaves) if isinstance(leaf.tensor, nn.Parameter)]
        buffers: dict[Any, list[int]] = {}
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf.tensor, nn.Parameter):
                kind = leaf.tensor.dim() == 1, leaf.tensor.dtype, leaf.tensor.device
                buffers.setdefault(kind, []).append(i)
        self._buffers = [(flat, which) for (flat, _, _), which in buffers.items()]
        self._seen: dict[tuple[int, ...], _Entry] = {}

    def parts(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of these leaves as they are now."""
        marks, values = self._state(tensors)
        entry = self._seen.get(tuple(map(id, tensors)))
        if entry is not None and entry.marks == marks and all(map(torch.equal, entry.values, values)):
            return entry.parts
        parts = computed(self._compute, tensors)
        self._keep(tensors, marks, values, parts)
        return parts

    def remember(self, tensors: Sequence[Tensor], parts: tuple[Tensor, ...]) -> None:
        """Take parts that were computed from these leaves as they are now."""
        self._keep(tensors, *self._state(tensors), parts)

    def _state(self, tensors: Sequence[Tensor]) -> tuple[tuple[int, ...] | None, list[Tensor]]:
        """What changes when a parameter is written to, None where that cannot be told, and the values of buffers."""
        parameters = [tensors[i] for i in self._parameters]
        values = []
        for flat, which in self._buffers:
            group = [tensors[i] for i in which]
            values.append(torch.cat(group if flat else [t.reshape(-1) for t in group]))
        try:
            return (*map(_version, parameters), *map(Tensor.data_ptr, parameters)), values
        except RuntimeError:  # an inference tensor has no version
            return None, values

    def _keep(
        self,
        tensors: Sequence[Tensor],
        marks: tuple[int, ...] | None,
        values: list[Tensor],
        parts: tuple[Tensor, ...],
    ) -> None:
        """Until one of the leaves is gone, so that no other tensor can come by its identity."""
        if marks is not None:
            key, seen = tuple(map(id, tensors)), self._seen
            seen[key] = _Entry(marks, values, parts, [weakref.ref(t, lambda _: seen.pop(key, None)) for t in tensors])


@dataclass(frozen=True, slots=True)
class _Entry:
    marks: tuple[int, ...]
    values: list[Tensor]
    parts: tuple[Tensor, ...]
    refs: list[weakref.ref[Tensor]]
    """They forget the entry when their tensor goes."""


_version = attrgetter("_version")
