"""Bias correction: what quantization adds to the mean of every output channel is taken off again.

By data (Banner et al., "Post training 4-bit quantization of convolutional networks for rapid-deployment", 2019): the
outputs of both models are compared on the same batches. Without data (Nagel et al., "Data-Free Quantization Through
Weight Equalization and Bias Correction", 2019): the difference of the weights times the mean of the input, which the
BatchNorms ahead tell.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fp4fx.calibration.data import Batches, forward
from fp4fx.calibration.job import INPUTS, Job
from fp4fx.calibration.moments import moments
from fp4fx.dataflow import op_name
from fp4fx.graph_sites import GraphSites
from fp4fx.observe import Call, observe
from fp4fx.site import Site
from fp4fx.trace import symbolic_graph

LEAST = 32
"""The mean of fewer outputs is not worth correcting."""
PLACES = 64
"""So many outputs of a call, evenly spaced, are compared value by value."""


@dataclass(frozen=True, kw_only=True)
class BiasCorrection:
    """Adds to the bias of a layer or, if it has none, takes off the running mean of the BatchNorm behind it."""

    name: ClassVar[str] = "bias_correction"
    needs_reference: ClassVar[bool] = True
    rewrites: ClassVar[bool] = False

    def passes(self, batches: Batches | None) -> int:
        """One, or none."""
        return 1 if batches is not None else 0

    def run(self, job: Job) -> None:
        """All sites at once: while a batch runs, each layer's output is corrected for those behind it."""
        sites = []
        for site in job.pending(self):
            if site.op.startswith(INPUTS):
                sites.append(site)
            else:
                job.record(self, site, f"kept: {site.op} has no bias")
        if sites and job.data is None:
            self._without_data(job, sites)
        elif sites:
            self._by_data(job, sites)

    @torch.no_grad()
    def _without_data(self, job: Job, sites: list[Site]) -> None:
        _, found = symbolic_graph(job.reference)
        for site in sites:
            uses = [a for s, a in zip(found.sites, found.activations, strict=True) if s.parameter == site.parameter]
            known = moments(uses[0]) if len(uses) == 1 else "it is used several times, or the trace does not reach it"
            channels = site.channels * (site.groups if site.op.startswith("conv") else 1)
            if isinstance(known, str) or len(known.mean) != channels:
                reason = (
                    known if isinstance(known, str) else f"{channels} channels of its input are not {len(known.mean)}"
                )
                job.record(self, site, f"kept: {reason}")
                continue
            dense, groups = job.weight(site), channels // site.channels

            def sums(rows: Tensor, x: Tensor, g: int = groups) -> Tensor:
                """Rows fp32 [N, K], values fp32 [C] of the input's channels -> fp32 [N]."""
                taps = torch.unflatten(torch.unflatten(rows, 0, (g, -1)), -1, (-1, len(x) // g)).sum(
                    -2
                )  # [G, N/G, C/G]
                return (taps @ x.to(rows.device).view(g, -1, 1)).flatten()

            smoothed = job.smoothing(site)
            factors = torch.ones_like(dense) if smoothed is None else smoothed
            dense, rounding = dense / factors, (dense - job.decoded(site)) / factors
            shift = sums(rounding, known.mean)
            power = sums(dense, known.mean).square() + sums(dense.square(), known.variance)
            if site.op.startswith("conv_transpose"):  # a place is reached by one tap of each stride
                job.record(self, site, "kept: the mean output of a transposed convolution differs from place to place")
                continue
            kept = _correct(job, site, shift, None, found)
            before = float(shift.square().sum() / power.sum()) if power.any() else 0.0
            reason = kept or "its mean without data, from BatchNorm statistics"
            job.record(self, site, reason, before, changed=kept is None)

    @torch.no_grad()
    def _by_data(self, job: Job, sites: list[Site]) -> None:
        """Both models on each batch, the reference first; the error is measured against its outputs."""
        found = {site.parameter: _Difference() for site in sites}
        wanted: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

        def seen_wanted(call: Call) -> None:
            y = _channels_last(call)
            wanted[call.site.parameter].append((y.mean(0), _places(y)))

        def seen(call: Call) -> Tensor | None:
            name = call.site.parameter
            if not wanted[name]:
                return None
            mean, places = wanted[name].pop(0)
            y = _channels_last(call)
            if places.shape != _places(y).shape:
                found[name].reason = "kept: the models do not run it on inputs of one shape"
                return None
            shift = found[name].add(call, mean - y.mean(0), places, y)
            return call.output + (shift if call.site.op == "linear" else shift.view(-1, *[1] * (call.output.dim() - 2)))

        bar = tqdm(job.batches, desc=self.name, unit="batch", total=job.batches.count, disable=None, leave=False)
        for number, batch in enumerate(bar):
            wanted.clear()
            with observe(job.reference, sites, seen_wanted):
                forward(job.reference, batch, f"batch {number}, reference")
            with observe(job.model, sites, seen):
                forward(job.model, batch, f"batch {number}")
        graph: GraphSites | None = None
        for site in sites:
            difference = found[site.parameter]
            reason = difference.unusable()
            if reason is not None:
                job.record(self, site, reason)
                continue
            if difference.bias is None and graph is None:
                _, graph = symbolic_graph(job.reference)
            shift, before, after = difference.result()
            if after >= before:
                job.record(self, site, "kept: its mean differs by no more than it varies", before)
                continue
            kept = _correct(job, site, shift, difference.bias, graph)
            job.record(self, site, kept or "mean output", before, after if kept is None else None, changed=kept is None)


@dataclass
class _Difference:
    """Reference minus quantized output of one site, over all calls."""

    shifts: list[Tensor] = field(default_factory=list)
    """fp32 [N] of each call."""
    counts: list[int] = field(default_factory=list)
    total: Tensor | None = None
    """fp32 [3, N]: sums over the places that are compared of the difference, its square, and the reference's square."""
    places: int = 0
    bias: Tensor | None = None
    """What the op was given."""
    reason: str | None = None

    def add(self, call: Call, shift: Tensor, places: Tensor, y: Tensor) -> Tensor:
        """Take in a call; returns its shift in the dtype of the output."""
        self.bias = call.arguments["bias"]
        self.shifts.append(shift)
        self.counts.append(len(y))
        d = places - _places(y)
        sums = torch.stack([d.sum(0), d.square().sum(0), places.square().sum(0)])
        self.total = sums if self.total is None else self.total + sums
        self.places += len(d)
        return shift.to(call.output.dtype)

    def unusable(self) -> str | None:
        """Why there is nothing to correct by, or None."""
        if self.reason is not None:
            return self.reason
        if not self.shifts:
            return "kept: never reached by the data"
        if sum(self.counts) < LEAST:
            return f"kept: found {sum(self.counts)} outputs, expected {LEAST} or more; give more data"
        if not torch.stack(self.shifts).isfinite().all():
            return "kept: its outputs are not finite"
        return None

    def result(self) -> tuple[Tensor, float, float]:
        """The mean difference fp32 [N], less its sampling error, and the squared error without and with it added."""
        weights = torch.tensor(self.counts, dtype=torch.float32, device=self.shifts[0].device)
        shift = (torch.stack(self.shifts) * (weights / weights.sum())[:, None]).sum(0)
        assert self.total is not None
        first, second, power = self.total
        error = (second / self.places - (first / self.places).square()) / self.places  # of the mean, squared
        shift = shift * (1 - error / shift.square().clamp(min=torch.finfo().tiny)).clamp(0, 1)
        signal = float(power.sum()) or 1.0
        after = second - 2 * shift * first + self.places * shift.square()
        return shift, float(second.sum()) / signal, max(float(after.sum()), 0.0) / signal


def _channels_last(call: Call) -> Tensor:
    """The output fp32 [places, N]."""
    y = call.output.float()
    return y.flatten(0, -2) if call.site.op == "linear" else y.movedim(1, -1).flatten(0, -2)


def _places(y: Tensor) -> Tensor:
    """Some rows of [P, N]."""
    return y[:: -(-len(y) // PLACES)].clone()


def _correct(job: Job, site: Site, shift: Tensor, used: Tensor | None, graph: GraphSites | None) -> str | None:
    """Add fp32 [N] to what the layer adds to its output; None, or why there is nothing to add it to."""
    module = job.model.get_submodule(site.called_in)
    names = dict(job.model.named_parameters(remove_duplicate=False))
    attention = isinstance(module, nn.MultiheadAttention) and site.attribute == "in_proj_weight"
    name = f"{site.called_in}.{'in_proj_bias' if attention else 'bias'}".lstrip(".")
    if not (site.own_input or attention) or name not in names:
        name = next((n for n, p in names.items() if used is not None and p.data_ptr() == used.data_ptr()), "")
    if name:
        path, _, attribute = name.rpartition(".")
        module, old = job.model.get_submodule(path), names[name]
        if sum(p is old for p in names.values()) > 1:
            return f"kept: its bias {name} is another layer's too"
        if old.shape != shift.shape:
            return f"kept: {name} has shape {tuple(old.shape)}, its outputs have {len(shift)} channels"
        setattr(module, attribute, nn.Parameter((old.detach().float() + shift).to(old.dtype), old.requires_grad))
        return None
    uses = () if graph is None else zip(graph.sites, graph.nodes, strict=True)
    nodes = [node for s, node in uses if s.parameter == site.parameter]
    norms = [user for node in nodes for user in node.users if op_name(user) == "batch_norm"]
    if not norms or len(nodes) > 1 or any(norm.args[5] for norm in norms):
        return "kept: it has no bias, and no BatchNorm in evaluation behind it"
    for norm in norms:
        path, _, attribute = str(norm.args[3].target).rpartition(".")  # type: ignore[union-attr]
        module = job.model.get_submodule(path)
        mean = module.get_buffer(attribute)
        setattr(module, attribute, (mean.float() - shift).to(mean.dtype))
    return None
