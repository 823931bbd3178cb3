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
from torch.fx import Node
from tqdm import tqdm

from fp4fx.calibration.data import Batches, forward
from fp4fx.calibration.job import INPUTS, Job
from fp4fx.calibration.moments import Moments, moments
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
        _, graph = symbolic_graph(job.reference)
        for site in sites:
            place, known = _place(job, site, None, graph), _input_moments(site, graph)
            if isinstance(place, str) or isinstance(known, str):
                job.record(self, site, known if isinstance(known, str) else str(place))
                continue
            dense, factors = job.weight(site), job.smoothing(site)
            rounding = dense - job.decoded(site)
            if factors is not None:
                dense, rounding = dense / factors, rounding / factors
            shift = _products(rounding, known.mean, site)
            power = _products(dense, known.mean, site).square() + _products(dense.square(), known.variance, site)
            place.add(shift)
            before = float(shift.square().sum() / power.sum()) if power.any() else 0.0
            job.record(self, site, "mean output, from BatchNorm statistics", before, changed=True)

    @torch.no_grad()
    def _by_data(self, job: Job, sites: list[Site]) -> None:
        """Both models on each batch, the reference first; the error is measured against its outputs."""
        _, graph = symbolic_graph(job.reference)
        found: dict[str, _Difference] = {}
        wanted: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

        def seen_wanted(call: Call) -> None:
            y = _channels_last(call)
            wanted[call.site.parameter].append((y.mean(0), _places(y)))

        def seen(call: Call) -> Tensor | None:
            site, name = call.site, call.site.parameter
            if name not in found:
                found[name] = _Difference(_place(job, site, call.arguments["bias"], graph))
            if not wanted[name] or isinstance(found[name].place, str):
                return None
            mean, places = wanted[name].pop(0)
            y = _channels_last(call)
            if places.shape != _places(y).shape:
                found[name].place = "kept: the models do not run it on inputs of one shape"
                return None
            found[name].add(mean - y.mean(0), places, y)
            shift = (mean - y.mean(0)).to(call.output.dtype)
            return call.output + (shift if site.op == "linear" else shift.view(-1, *[1] * (call.output.dim() - 2)))

        bar = tqdm(job.batches, desc=self.name, unit="batch", disable=None, leave=False)
        for number, batch in enumerate(bar):
            wanted.clear()
            with observe(job.reference, sites, seen_wanted):
                forward(job.reference, batch, f"batch {number}, reference")
            with observe(job.model, sites, seen):
                forward(job.model, batch, f"batch {number}")
        for site in sites:
            difference = found.get(site.parameter)
            if difference is None:
                job.record(self, site, "kept: never reached by the data")
                continue
            place, reason = difference.place, difference.unusable()
            if isinstance(place, str) or reason is not None:
                job.record(self, site, reason or str(place))
                continue
            shift, before, after = difference.result()
            if after >= before:
                job.record(self, site, "kept: its mean differs by no more than it varies", before)
                continue
            place.add(shift)
            job.record(self, site, "mean output", before, after, changed=True)


@dataclass
class _Difference:
    """Reference minus quantized output of one site, over all calls."""

    place: _Place | str
    """Where to correct it, or why not."""
    shifts: list[Tensor] = field(default_factory=list)
    """fp32 [N] of each call."""
    counts: list[int] = field(default_factory=list)
    total: Tensor | None = None
    """fp32 [3, N]: sums over the places that are compared of the difference, its square, and the reference's square."""
    places: int = 0

    def add(self, shift: Tensor, places: Tensor, y: Tensor) -> None:
        """Take in a call: what its mean lacks fp32 [N], the reference's outputs at some places, and its own at all."""
        self.shifts.append(shift)
        self.counts.append(len(y))
        d = places - _places(y)
        sums = torch.stack([d.sum(0), d.square().sum(0), places.square().sum(0)])
        self.total = sums if self.total is None else self.total + sums
        self.places += len(d)

    def unusable(self) -> str | None:
        """Why there is nothing to correct by, or None."""
        if isinstance(self.place, str):
            return self.place
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


def _input_moments(site: Site, graph: GraphSites) -> Moments | str:
    """Mean and variance of each channel of a site's input, or why they are not known."""
    uses = [a for s, a in zip(graph.sites, graph.activations, strict=True) if s.parameter == site.parameter]
    if len(uses) != 1:
        return "kept: it is used several times, or the trace does not reach it"
    if site.op.startswith("conv_transpose"):  # a place is reached by one tap of each stride
        return "kept: the mean output of a transposed convolution differs from place to place"
    known = moments(uses[0])
    channels = site.channels * (site.groups if site.op.startswith("conv") else 1)
    if isinstance(known, Moments) and len(known.mean) != channels:
        return f"kept: its input has {channels} channels, the BatchNorm ahead of it {len(known.mean)}"
    return known if isinstance(known, Moments) else f"kept: {known}"


def _products(rows: Tensor, x: Tensor, site: Site) -> Tensor:
    """Rows fp32 [N, K], a value fp32 [C] for each channel of the input -> fp32 [N]: all taps read the same."""
    groups = len(x) // site.channels
    taps = torch.unflatten(torch.unflatten(rows, -1, (-1, site.channels)).sum(-2), 0, (groups, -1))  # [G, N/G, C/G]
    product: Tensor = taps @ x.to(rows.device).view(groups, -1, 1)
    return product.flatten()


@dataclass
class _Place:
    """Where what is to be added to a layer's output can go: a bias, or running means behind it."""

    tensors: list[tuple[nn.Module, str]]
    sign: int

    def add(self, shift: Tensor) -> None:
        """Add fp32 [N] to the output; the tensors are replaced, as the original may hold them too."""
        for module, name in self.tensors:
            old: Tensor = getattr(module, name)
            new = (old.detach().float() + self.sign * shift).to(old.dtype)
            setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _place(job: Job, site: Site, used: Tensor | None, graph: GraphSites) -> _Place | str:
    """Where a correction of the site's output goes, given the bias that its op used; or why there is no place."""
    module = job.model.get_submodule(site.called_in)
    names = dict(job.model.named_parameters(remove_duplicate=False))
    attention = isinstance(module, nn.MultiheadAttention) and site.attribute == "in_proj_weight"
    name = f"{site.called_in}.{'in_proj_bias' if attention else 'bias'}".lstrip(".")
    if not (site.own_input or attention) or name not in names:
        name = next((n for n, p in names.items() if used is not None and p.data_ptr() == used.data_ptr()), "")
    if name:
        path, _, attribute = name.rpartition(".")
        if sum(p is names[name] for p in names.values()) > 1:
            return f"kept: its bias {name} is another layer's too"
        if tuple(names[name].shape) != (site.rows[0],):
            return f"kept: {name} has shape {tuple(names[name].shape)}, its outputs have {site.rows[0]} channels"
        return _Place([(job.model.get_submodule(path), attribute)], 1)
    nodes = [node for s, node in zip(graph.sites, graph.nodes, strict=True) if s.parameter == site.parameter]
    norms = [user for node in nodes for user in node.users if op_name(user) == "batch_norm"]
    means = [str(norm.args[3].target) for norm in norms if isinstance(norm.args[3], Node) and not norm.args[5]]
    if len(nodes) != 1 or not means or len(means) < len(norms):
        return "kept: it has no bias, and no BatchNorm in evaluation behind it"
    split = (mean.rpartition(".") for mean in means)
    return _Place([(job.model.get_submodule(path), attribute) for path, _, attribute in split], -1)
