"""A model, with or without example inputs -> its sites. The only reader of models; it leaves them as they were."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp4fx.errors import TraceError
from fp4fx.exported import exported
from fp4fx.graph_sites import NO_RECURRENT, GraphSites, find_sites
from fp4fx.nvfp4 import excess_kurtosis
from fp4fx.site import Note, Site
from fp4fx.symbolic import LAYERS, UNTRACEABLE, SymbolicTrace, one_line


@dataclass(frozen=True)
class Trace:
    """What a model does with its parameters."""

    sites: tuple[Site, ...]
    """One per use of a parameter by a compute op, in execution order."""
    unreached: tuple[Note, ...] = ()
    """The parameters of rank >= 2 that no site eats, with what became of them."""
    opaque: tuple[Note, ...] = ()
    """The modules that the tracer could not look into, with the reason; "" is the model itself."""


def trace(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Trace:
    """Find the sites of a model by following its parameters to the ops that use them.

    With example inputs the model is read as `torch.export` (non-strict) sees it. Without, or where export fails
    (`opaque` then says why), it is traced symbolically: a module whose Python depends on data is named in `opaque` and
    its layers are found one by one. The model, its training flag and the random number generators are left as they
    were; nothing is computed with its weights but their kurtosis, so that a model on the meta device will do. Not
    thread-safe: the model is in use meanwhile.

    Args:
        model: Is traced in the mode (training or evaluation) that it is in.
        example_inputs: The positional arguments of its forward, or the only one.
        example_kwargs: The keyword arguments of its forward.

    Raises:
        TraceError: `model` is no module, is scripted or compiled, or has lazy parameters that have no shape yet, or
            `example_inputs` is neither a tensor nor a sequence.
    """
    _check(model, example_inputs)
    opaque: list[Note] = []
    read = None
    if example_inputs is not None or example_kwargs is not None:
        args = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs or ())
        try:
            with _untouched(model):
                read = exported(model, args, dict(example_kwargs or {}))
        except UNTRACEABLE as error:
            opaque.append(Note("", f"torch.export failed, so the example inputs were not used: {one_line(error)}"))
    if read is None:
        with _untouched(model):
            symbolic = SymbolicTrace(model)
        opaque += symbolic.opaque
        inputs = [node for node in symbolic.graph.nodes if node.op == "placeholder"]
        read = symbolic.graph, symbolic.parameters, inputs
    graph, parameters, inputs = read
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    found = find_sites(
        graph,
        {node: names[id(parameter)][0] for node, parameter in parameters.items() if id(parameter) in names},
        inputs=inputs,
        stock={name for name, module in modules.items() if isinstance(module, LAYERS)},
        tied={first: tuple(others) for first, *others in names.values()},
    )
    first = {id(module): name for name, module in model.named_modules()}
    called_in = {name: first[id(module)] for name, module in modules.items()}
    kurtosis = _kurtosis(model, found.sites)
    sites = tuple(
        replace(site, called_in=called_in.get(site.called_in, site.called_in), kurtosis=kurtosis[site.parameter])
        for site in found.sites
    )
    return Trace(sites, _unreached(model, sites, found.notes, opaque), tuple(opaque))


def symbolic_graph(model: nn.Module) -> tuple[fx.Graph, GraphSites]:
    """The graph of a model without example inputs, for its data flow only, and the sites in it.

    Parameters and buffers are `get_attr` nodes with their names as targets and their tensors in `meta["val"]`.
    """
    with _untouched(model):
        symbolic = SymbolicTrace(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inputs = [node for node in symbolic.graph.nodes if node.op == "placeholder"]
    parameters = {node: names[id(p)] for node, p in symbolic.parameters.items() if id(p) in names}
    return symbolic.graph, find_sites(symbolic.graph, parameters, inputs=inputs)


def _check(model: Any, example_inputs: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TraceError(f"expected a torch.nn.Module, found {type(model).__name__}; pass the model itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("the model is a ScriptModule, whose Python is gone; pass the module that it was made from")
    if hasattr(model, "_orig_mod"):
        raise TraceError("the model is compiled; pass the model that torch.compile was given, and compile afterwards")
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise TraceError(f"{name}: a lazy parameter has no shape yet; run the model once on an example input first")
    if example_inputs is not None and not isinstance(example_inputs, (Tensor, tuple, list)):
        raise TraceError(
            f"example_inputs: expected a tensor or a tuple of the model's positional arguments, found "
            f"{type(example_inputs).__name__}; keyword arguments go into example_kwargs"
        )


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put back every attribute of every module, and the random number generators, at the end.

    Attention's fused inference path is closed meanwhile: it would hide the projections in one op. The user's hooks
    are silent.
    """
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    kinds = (dict, OrderedDict, defaultdict, list, set)
    contents = [(value, value.copy()) for _, values in attributes for value in values.values() if type(value) in kinds]
    for module, values in attributes:
        module.__dict__.update((name, value.clone()) for name, value in values.items() if type(value) is Tensor)
        _silence(module)
    state, fast = random.getstate(), torch.backends.mha.get_fastpath_enabled()
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(sorted(devices, key=str)):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            random.setstate(state)
            for module, values in attributes:
                module.__dict__.clear()
                module.__dict__.update(values)
            for container, content in contents:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)


def _silence(module: nn.Module) -> None:
    """Take a module's hooks away but for those of torch.nn.utils, which compute its weight."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils")]:
            del hooks[key]


def _kurtosis(model: nn.Module, sites: Sequence[Site]) -> dict[str, float | None]:
    """Excess kurtosis of every parameter that has a site; None where there are no values, or NaN or Inf among them."""
    parameters = dict(model.named_parameters())
    kurtosis: dict[str, float | None] = {}
    for name in {site.parameter: None for site in sites}:
        value = None if parameters[name].is_meta else excess_kurtosis(parameters[name].detach())
        kurtosis[name] = value if value is not None and isfinite(value) else None
    return kurtosis


def _unreached(
    model: nn.Module, sites: Sequence[Site], notes: Sequence[Note], opaque: Sequence[Note]
) -> tuple[Note, ...]:
    """A reason for each parameter of rank >= 2 that no site eats."""
    eaten, reasons = {site.parameter for site in sites}, {note.name: note.reason for note in notes}
    unreached = []
    for name, parameter in model.named_parameters():
        if name in eaten or parameter.dim() < 2:
            continue
        module, _, _ = name.rpartition(".")
        reason = reasons.get(name, "never called in the trace")
        if isinstance(model.get_submodule(module), (nn.RNNBase, nn.RNNCellBase)):
            reason = NO_RECURRENT
        elif name not in reasons and any(note.name == module for note in opaque):
            reason = f"not used before {module or 'the model'} could not be traced any further"
        unreached.append(Note(name, reason))
    return tuple(unreached)
