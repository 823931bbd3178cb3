"""Quantization of a model that was never quantized, by a policy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fp4fx.capture import (
    emit,
    module_classes,
    mutated,
    needs_gradient,
    parameter_names,
    storages,
    value,
)
from fp4fx.folding import computed
from fp4fx.graph_sites import COMPUTE_OPS, comes_with_call, find_sites
from fp4fx.nvfp4 import excess_kurtosis
from fp4fx.packed import STOCK
from fp4fx.passes.expose_qdq import feeds_gradient
from fp4fx.passes.fold_parameters import program_of
from fp4fx.pipeline import Context, Dialect, verify
from fp4fx.plan import Decision, decide, weight_sqnr
from fp4fx.policy import Policy, ScaleRule
from fp4fx.site import Site
from fp4fx.trace import Trace

fake_quantize = torch.ops.fp4fx.fake_quantize.default

SETTLED = "fp4fx_settled"
"""Key of the metadata of what quantizes a weight that is computed from parameters and buffers."""


def insert_qdq(gm: GraphModule, ctx: Context) -> int:
    """Decide for every site of the graph and put a fake_quantize on the chosen parameters and activations.

    Before: `aten.conv2d(x, parameter, ...)`
    After: `aten.conv2d(fp4fx.fake_quantize(x, None, "channels", ...), fp4fx.fake_quantize(parameter, ...), ...)`
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
    reads = zip(found.nodes, found.weights, found.activations, strict=True)
    nodes = dict(zip((site.index for site in found.sites), reads, strict=True))

    def measured(site: Site) -> Site:
        if ctx.policy is None or ctx.policy.max_kurtosis is None:
            return site
        return replace(site, kurtosis=excess_kurtosis(ctx.real[by_name[site.parameter]].detach()))

    def sqnr(site: Site, own: Policy) -> float:
        return weight_sqnr(ctx.real[by_name[site.parameter]].detach(), site, own.weight_rule, own.block)

    written = set().union(*map(mutated, gm.graph.nodes))
    sites = [
        replace(measured(site), refusal="the parameter is written to in the graph")
        if written & storages([value(by_name[site.parameter])])
        else measured(site)
        for site in found.sites
    ]
    uses = Counter(site.parameter for site in sites)
    for i, site in enumerate(sites):
        node, weight, x = nodes[site.index]
        if uses[site.parameter] == 1 and _settles(gm, ctx, site, weight):
            own = site.called_in in stock and isinstance(x, Node) and comes_with_call(x, node)
            sites[i] = replace(site, settled=True, order=COMPUTE_OPS[node.target].order, own_input=own)
    plan = decide(Trace(tuple(sites), found.notes, ()), ctx.policy, sqnr, fragment=True)
    ctx.notes.extend((ctx.real[by_name[note.name]], note.reason) for note in found.notes)
    packed: set[str] = set()
    for decision in plan.decisions:
        site = decision.site
        parameter = by_name[site.parameter]
        node, weight, x = nodes[site.index]
        ctx.decisions.append((ctx.real[parameter], decision))
        if decision.spec is None:
            continue
        if decision.spec.activations is not None:
            _quantize_activation(gm, node, x, site, decision.spec.activation_scale_rule)
        if site.parameter not in packed:
            packed.add(site.parameter)
            dense, readers = (weight, [node]) if site.settled else (parameter, list(parameter.users))
            _quantize_weight(gm, dense, readers, decision)
    return len(packed)


def _settles(gm: GraphModule, ctx: Context, site: Site, weight: Node) -> bool:
    """Whether a weight is one that `fp4fx.quantize` would pack as it comes out of its computation."""
    named = f".{site.parameter}".rpartition(".parametrizations.")[1] or site.attribute.endswith(("_v", "_orig"))
    if site.transform is None or site.refusal or not named or needs_gradient(weight):
        return False
    program = program_of(gm, ctx, weight) if value(weight).shape == site.shape else None
    if program is None:
        return False
    compute, leaves = program
    first, second = (computed(compute, [leaf.tensor for leaf in leaves]) for _ in range(2))
    return torch.equal(first[0], second[0])


def _quantize_weight(gm: GraphModule, dense: Node, users: list[Node], decision: Decision) -> None:
    """One fake_quantize for the readers under gradients and one, to be folded, for all others."""
    assert decision.spec is not None
    site, spec = decision.site, decision.spec
    call = (dense, None, site.order, site.groups, spec.scale_rule, spec.block[0], spec.compute)
    for readers in ([u for u in users if feeds_gradient(u)], [u for u in users if not feeds_gradient(u)]):
        if readers:
            quantized = emit(gm, fake_quantize, call, like=min(readers))  # nodes compare by their place in the graph
            quantized.meta.update({SETTLED: True} if site.settled else {})
            for reader in readers:
                reader.replace_input_with(dense, quantized)


def _quantize_activation(gm: GraphModule, node: Node, x: Node, site: Site, rule: ScaleRule) -> None:
    how = (None, "rows" if site.op == "linear" else "channels", 1, rule)
    if site.op != "linear" and value(x).dim() == len(site.shape) - 1:  # a convolution without a batch axis
        batch = emit(gm, torch.ops.aten.unsqueeze.default, (x, 0), like=node)
        quantized = emit(gm, fake_quantize, (batch, *how), like=node)
        quantized = emit(gm, torch.ops.aten.squeeze.dim, (quantized, 0), like=node)
    else:
        quantized = emit(gm, fake_quantize, (x, *how), like=node)
    node.replace_input_with(x, quantized)
