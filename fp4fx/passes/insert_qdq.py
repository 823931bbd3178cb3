"""Quantization of a model that was never quantized, by a policy."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fp4fx.capture import emit, module_classes, mutated, needs_gradient, parameter_names, storages, value
from fp4fx.graph_sites import find_sites
from fp4fx.nvfp4 import excess_kurtosis
from fp4fx.packed import STOCK
from fp4fx.pipeline import Context, Dialect, verify
from fp4fx.plan import Decision, decide, weight_sqnr
from fp4fx.policy import Policy
from fp4fx.site import Site
from fp4fx.trace import Trace

fake_quantize = torch.ops.fp4fx.fake_quantize.default


def insert_qdq(gm: GraphModule, ctx: Context) -> int:
    """Decide for every site of the graph and put a fake_quantize on the chosen parameters and activations.

    Before: `aten.conv2d(x, parameter, ...)`
    After: `aten.conv2d(fp4fx.fake_quantize(x, None, "channels"), fp4fx.fake_quantize(parameter, None, "conv"), ...)`
    (the activation only where the policy quantizes activations)
    """
    if ctx.policy is None:
        return 0
    verify(gm, ctx, Dialect.ATEN)
    parameters = parameter_names(gm, (node for node, t in ctx.real.items() if isinstance(t, nn.Parameter)))
    by_name = {name: node for node, name in parameters.items()}
    stock = {name for name, cls in module_classes(gm).items() if issubclass(cls, STOCK)}
    inputs = [node for node in gm.graph.find_nodes(op="placeholder") if node not in ctx.real]
    found = find_sites(gm.graph, parameters, inputs=inputs, stock=stock)
    reads = zip(found.nodes, found.activations, strict=True)
    nodes = dict(zip((site.index for site in found.sites), reads, strict=True))

    def measured(site: Site) -> Site:
        if ctx.policy is None or ctx.policy.max_kurtosis is None:
            return site
        return replace(site, kurtosis=excess_kurtosis(ctx.real[by_name[site.parameter]].detach()))

    def sqnr(site: Site, own: Policy) -> float:
        return weight_sqnr(ctx.real[by_name[site.parameter]].detach(), site, own.scale_rule, own.block)

    written = set().union(*map(mutated, gm.graph.nodes))
    sites = [
        replace(measured(site), refusal="the parameter is written to in the graph")
        if written & storages([value(by_name[site.parameter])])
        else measured(site)
        for site in found.sites
    ]
    plan = decide(Trace(tuple(sites), found.notes, ()), ctx.policy, sqnr, fragment=True)
    ctx.notes.extend((ctx.real[by_name[note.name]], note.reason) for note in found.notes)
    packed: set[str] = set()
    for decision in plan.decisions:
        site = decision.site
        parameter = by_name[site.parameter]
        ctx.decisions.append((ctx.real[parameter], decision))
        if decision.spec is None:
            continue
        if decision.spec.activations is not None:
            _quantize_activation(gm, *nodes[site.index], site)
        if site.parameter not in packed:
            packed.add(site.parameter)
            _quantize_parameter(gm, parameter, decision)
    return len(packed)


def _quantize_parameter(gm: GraphModule, parameter: Node, decision: Decision) -> None:
    """One fake_quantize for the readers under gradients and one, to be folded, for all others."""
    assert decision.spec is not None
    site, spec = decision.site, decision.spec
    call = (parameter, None, site.order, site.groups, spec.scale_rule, spec.block[0], spec.compute)
    users = list(parameter.users)
    for readers in ([u for u in users if needs_gradient(u)], [u for u in users if not needs_gradient(u)]):
        if readers:
            quantized = emit(gm, fake_quantize, call, like=min(readers))  # nodes compare by their place in the graph
            for reader in readers:
                reader.replace_input_with(parameter, quantized)


def _quantize_activation(gm: GraphModule, node: Node, x: Node, site: Site) -> None:
    if site.op == "linear":
        quantized = emit(gm, fake_quantize, (x, None, "rows"), like=node)
    elif value(x).dim() == len(site.shape) - 1:  # a convolution without a batch axis
        batch = emit(gm, torch.ops.aten.unsqueeze.default, (x, 0), like=node)
        quantized = emit(gm, fake_quantize, (batch, None, "channels"), like=node)
        quantized = emit(gm, torch.ops.aten.squeeze.dim, (quantized, 0), like=node)
    else:
        quantized = emit(gm, fake_quantize, (x, None, "channels"), like=node)
    node.replace_input_with(x, quantized)
