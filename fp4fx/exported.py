"""The graph of a model on example inputs, by `torch.export`."""

from __future__ import annotations

import functools
import io
import logging
import sys
import warnings
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp4fx.dataflow import op_name

log = logging.getLogger(__name__)

Read = tuple[fx.Graph, dict[fx.Node, Tensor], list[fx.Node]]
"""A graph, the nodes that stand for parameters with the tensors, and the nodes that stand for activations."""


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Read:
    """The pre-dispatch ATen graph of `model(*args, **kwargs)`, regions under `no_grad`, autocast or a branch opened.

    Whatever `torch.export` and the model raise is passed on. Attributes of the model may be left changed.
    """
    if all(parameter.is_meta for parameter in model.parameters()):
        args, kwargs = _to_meta(args), _to_meta(kwargs)
    model.__dict__["forward"] = _with_tensor_outputs(model.forward)
    printed = io.StringIO()  # export prints the whole graph before it raises
    try:
        with warnings.catch_warnings(), redirect_stderr(printed):
            warnings.filterwarnings("ignore", "The tensor attributes .* were assigned during export")  # are put back
            program = torch.export.export(model, args, kwargs, strict=False)
    except BaseException:
        log.debug("torch.export printed:\n%s", printed.getvalue())
        raise
    sys.stderr.write(printed.getvalue())
    _open_regions(program.graph_module)
    named = dict(model.named_parameters(remove_duplicate=False))
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    signature = program.graph_signature
    parameters: dict[fx.Node, Tensor] = {
        placeholders[node]: named[name] for node, name in signature.inputs_to_parameters.items()
    }
    return program.graph, parameters, [placeholders[name] for name in signature.user_inputs if name in placeholders]


def _to_meta(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_to_meta(item) for item in value)
    if isinstance(value, dict):
        return {key: _to_meta(item) for key, item in value.items()}
    return value.to("meta") if isinstance(value, Tensor) else value


def _with_tensor_outputs(forward: Any) -> Any:
    """`forward` with the tensors of its output in a list: export knows no caches and no output classes of models."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> list[Tensor]:
        tensors: dict[int, Tensor] = {}
        seen: dict[int, Any] = {}
        stack = [forward(*args, **kwargs)]
        while stack:
            value = stack.pop()
            if id(value) in seen:
                continue
            seen[id(value)] = value
            if isinstance(value, Tensor):
                tensors[id(value)] = value
            elif isinstance(value, (tuple, list, set)):
                stack.extend(value)
            elif isinstance(value, dict):
                stack.extend(value.values())
            elif not isinstance(value, (nn.Module, type)):
                stack.extend(getattr(value, "__dict__", {}).values())
        return list(tensors.values())

    return wrapped


def _open_regions(module: fx.GraphModule) -> None:
    """Copy the subgraphs of higher-order ops (no_grad and autocast regions, branches, loops) into the graph."""
    graph = module.graph
    for node in list(graph.nodes):
        regions = [(i, r) for i, arg in enumerate(node.args) if (r := _region(module, arg)) is not None]
        if node.op != "call_function" or not regions:
            continue
        operands: list[Any] = []
        for arg in node.args[regions[-1][0] + 1 :]:
            operands.extend(arg if isinstance(arg, (tuple, list)) else (arg,))
        for _, region in regions:
            _open_regions(region)
            inputs = [n for n in region.graph.nodes if n.op == "placeholder"]
            if len(inputs) != len(operands):
                log.debug("%s: %d operands for %d inputs, not opened", op_name(node), len(operands), len(inputs))
                continue
            with graph.inserting_before(node):
                outputs = graph.graph_copy(region.graph, dict(zip(inputs, operands, strict=True)))
            for user in list(node.users):
                if op_name(user) == "getitem" and isinstance(outputs, (tuple, list)):
                    user.replace_all_uses_with(outputs[user.args[1]])


def _region(module: fx.GraphModule, arg: Any) -> fx.GraphModule | None:
    """The subgraph that an argument stands for, or None."""
    target = getattr(module, str(arg.target), None) if isinstance(arg, fx.Node) and arg.op == "get_attr" else None
    return target if isinstance(target, fx.GraphModule) else None
