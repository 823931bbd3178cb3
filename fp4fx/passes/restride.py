"""The strides of every value made true again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fp4fx.capture import (
    STANDS_IN,
    OpOverload,
    arguments,
    emit,
    mutated,
    storages,
    value,
)
from fp4fx.dataflow import op_name as name_of
from fp4fx.ops.library import CHANNELS_LAST
from fp4fx.passes.replay import Replay, is_context_switch
from fp4fx.pipeline import Context
from fp4fx.sizes import same_strides

aten = torch.ops.aten


def restride(gm: GraphModule, ctx: Context) -> int:
    """Follow the memory formats that fused ops answer in through the graph, as far as calls do not care for them.

    Views that no longer are views become copies, requests for a format that is there already go away, and the graph
    gives its results in the strides it was captured with. What depends on strides gets those of the capture: custom
    ops, `as_strided`, and views of tensors that are written to later, where a copy would not be the same.

    Before: `y = fp4fx.conv(x, ...)` with x in channels_last, `y.contiguous().view(2, -1)`, and y for a result
    After: `aten.reshape(y, [2, -1])`, and `aten.contiguous(y)` for a result
    """
    return _Restride(gm).run()


class _Restride:
    """One walk over a graph; `captured` has the value before of every node whose strides have changed."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.rewrites = 0
        self.captured: dict[Node, Any] = {}
        self.writes: dict[Node, set[int]] = {}
        for node in gm.graph.nodes:
            if not is_context_switch(node) and (written := mutated(node)):
                self.writes[node] = written
        self.written: set[int] = set().union(*self.writes.values())
        self.pinned = self._pinned()

    def run(self) -> int:
        with Replay(self.gm) as replay:
            for node in list(self.gm.graph.nodes):
                if is_context_switch(node):
                    replay.switch(node)
                elif node.op == "output":
                    self._give_as_captured(node)
                elif node.op not in ("placeholder", "get_attr"):
                    self._visit(node, replay)
        for node, before in self.captured.items():
            for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(value(node)), strict=True):
                if isinstance(old, Tensor) and old.requires_grad and not new.requires_grad:
                    new.requires_grad_()
        return self.rewrites

    def _visit(self, node: Node, replay: Replay) -> None:
        moved = [n for n in node.all_input_nodes if n in self.captured]
        stands_in = node.meta.pop(STANDS_IN, False)
        if moved and _is_sensitive(node):
            self._restore_inputs(node)
            moved = []
        if name_of(node) == "contiguous" and self._is_idle(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            self.gm.graph.erase_node(node)
            self.rewrites += 1
            return
        if not moved and not stands_in:
            return
        before = value(node)
        try:
            after = replay(node)
        except (RuntimeError, ValueError):
            if name_of(node) in _COPYING:
                _let_copy(node)
            else:
                self._restore_inputs(node)
            self.rewrites += 1
            after = replay(node)
        if same_strides(before, after):
            return
        node.meta["example_value"] = after
        self.captured[node] = before
        if storages([before]) & self.pinned:
            self._restore(node, like=node.next, readers=list(node.users))

    def _pinned(self) -> set[int]:
        """Storages that keep their layout: they are written to after they were viewed in a way that may need a copy."""
        pinned: set[int] = set()
        for node in self.gm.graph.nodes:
            if name_of(node) not in _RESHAPES or not isinstance(value(node), Tensor):
                continue
            seen = storages([value(node)])
            shared = seen & storages(map(value, node.all_input_nodes))
            if shared and any(written & shared and node < writer for writer, written in self.writes.items()):
                pinned |= shared
        return pinned

    def _is_idle(self, node: Node) -> bool:
        """Whether a request for a format may go: nothing is written to, and it is met, or was when it was captured."""
        x: Any = node.args[0]
        if storages([self.captured.get(x, value(x)), value(node)]) & self.written:
            return False
        wanted = _format(node)
        if value(x).is_contiguous(memory_format=wanted):
            return True
        return x in self.captured and wanted is torch.contiguous_format and self.captured[x].is_contiguous()

    def _restore_inputs(self, node: Node) -> None:
        for n in node.all_input_nodes:
            if n in self.captured:
                self._restore(n, like=node, readers=[node])

    def _restore(self, node: Node, *, like: Node, readers: list[Node]) -> None:
        """Let the readers have the node in its captured strides, by a copy before `like`."""
        before = self.captured[node]
        if not isinstance(before, Tensor):
            return
        copy = self._copy(node, before, like=like)
        for reader in readers:
            reader.replace_input_with(node, copy)
        self.rewrites += 1

    def _copy(self, node: Node, before: Tensor, *, like: Node) -> Node:
        for wanted in (torch.contiguous_format, CHANNELS_LAST.get(before.dim())):
            if wanted is not None and before.is_contiguous(memory_format=wanted):
                return emit(self.gm, aten.contiguous.default, (node,), {"memory_format": wanted}, like=like)
        order = sorted(range(before.dim()), key=before.stride, reverse=True)
        back = [order.index(d) for d in range(before.dim())]
        copy = emit(self.gm, aten.permute.default, (node, order), like=like)
        copy = emit(self.gm, aten.contiguous.default, (copy,), like=like)
        return emit(self.gm, aten.permute.default, (copy, back), like=like)

    def _give_as_captured(self, output: Node) -> None:
        """Results in the strides of the capture, also where another node has come in the place of the one captured."""
        leaves, spec = pytree.tree_flatten(output.args[0])
        given = pytree.tree_leaves(value(output))
        copies: dict[Node, Node] = {}
        for i, (leaf, before) in enumerate(zip(leaves, given, strict=True)):
            if not isinstance(leaf, Node) or not isinstance(before, Tensor) or same_strides(value(leaf), before):
                continue
            if leaf not in copies:
                copies[leaf] = self._copy(leaf, before, like=output)
                self.rewrites += 1
            leaves[i] = copies[leaf]
        output.args = (pytree.tree_unflatten(leaves, spec),)


_COPYING: Mapping[str, Any] = {
    "view": aten.reshape.default,
    "_unsafe_view": aten.reshape.default,
    "view_as": aten.reshape_as.default,
}
"""Views that demand strides, and what does the same with a copy where it has to."""

_RESHAPES = frozenset({*_COPYING, "reshape", "reshape_as", "flatten", "unflatten", "contiguous"})

_OF_STRIDES = frozenset(
    {"as_strided", "as_strided_", "set_", "view_as_real", "view_as_complex", "stride", "is_contiguous"}
)


def _let_copy(node: Node) -> None:
    name = name_of(node)
    if node.op == "call_method":
        node.target = {"view": "reshape", "view_as": "reshape_as"}[name]
    else:
        node.target = _COPYING[name]


def _is_sensitive(node: Node) -> bool:
    """Whether a call may give something else for other strides: no op of PyTorch that is a function of values."""
    name = name_of(node)
    if name in _OF_STRIDES or (name == "view" and isinstance(arguments(node)[1], torch.dtype)):
        return True
    if node.op == "call_method":
        return False
    if isinstance(node.target, OpOverload):
        return node.target.namespace not in ("aten", "prims", "fp4fx", "mkldnn")
    module = getattr(node.target, "__module__", None) or ""
    is_function = not isinstance(node.target, torch._ops.HigherOrderOperator)
    return not (is_function and module.partition(".")[0] in ("torch", "_operator", "builtins", "math"))


def _format(node: Node) -> torch.memory_format:
    """What a call of `contiguous` asks for."""
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("memory_format", torch.contiguous_format)
    return given  # type: ignore[no-any-return]
