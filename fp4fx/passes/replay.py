"""Fake values computed anew, as the graph runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fp4fx.capture import fake_mode, value


def is_context_switch(node: Node) -> bool:
    """Whether a call enters or leaves a mode (autocast, no_grad) that holds for the calls behind it."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name.startswith(("_enter_", "_exit_", "_set_grad", "set_grad"))


class Replay:
    """Computes fake values anew, node by node in the order of the graph, under the autocast that holds for each."""

    def __init__(self, gm: GraphModule) -> None:
        self._mode = fake_mode(gm)
        self._autocasts: dict[Node, Any] = {}

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        for autocast in reversed(self._autocasts.values()):
            autocast.__exit__(None, None, None)

    def switch(self, node: Node) -> None:
        """Follow a context switch, where it is one of autocast: gradients are not asked for here."""
        name = getattr(node.target, "__name__", "")
        if name == "_enter_autocast":
            self._autocasts[node] = node.target(*node.args, **node.kwargs)  # type: ignore[operator]
        elif name == "_exit_autocast":
            self._autocasts.pop(node.all_input_nodes[0]).__exit__(None, None, None)

    def __call__(self, node: Node) -> Any:
        """What a call gives for the present values of its arguments."""
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), value)
        with self._mode, torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
