"""Scales per channel between a norm and the layers that read it (SmoothQuant, Xiao et al. 2022; AWQ, Lin et al. 2023).

The norm's output is divided by a vector s, the columns of the weights behind it are multiplied by it: in exact
arithmetic nothing changes, in NVFP4 columns with large inputs are rounded more finely. s is the mean magnitude of each
channel to a power that is searched for; the norm's own weight and bias absorb the division.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node
from tqdm import tqdm

from fp4fx import nvfp4
from fp4fx.calibration.data import Batches, forward
from fp4fx.calibration.inputs import input_rows
from fp4fx.calibration.job import Job
from fp4fx.dataflow import CASTS, DROPOUTS, IDENTITIES, op_name
from fp4fx.errors import CalibrationError
from fp4fx.graph_sites import GraphSites
from fp4fx.observe import Call, observe
from fp4fx.site import Site
from fp4fx.trace import symbolic_graph

HOMOGENEOUS = CASTS | IDENTITIES | DROPOUTS | {"relu", "relu_", "leaky_relu", "leaky_relu_", "max_pool1d", "max_pool2d"}
"""What a positive factor per channel may be put ahead of or behind."""
AFFINE = {"batch_norm": (1, 2), "layer_norm": (2, 3), "group_norm": (2, 3), "rms_norm": (2,)}
"""The places of the weight and the bias among a norm's arguments."""
ROWS = 256
"""Inputs of a layer that the error is measured on."""


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """A group is all layers that read one norm; it is left alone where no power gives a lower error."""

    name: ClassVar[str] = "smoothing"
    needs_reference: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True
    powers: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    gain: float = 0.05
    """The part of the error that is to go, if a group is to be changed."""

    def passes(self, batches: Batches | None) -> int:
        """One, of the reference."""
        if batches is None:
            raise CalibrationError("smoothing: found no batches, expected inputs to measure on")
        return 1

    def run(self, job: Job) -> None:
        """All groups from one forward of the reference on each batch."""
        groups: dict[Node, list[Site]] = defaultdict(list)
        _, graph = symbolic_graph(job.reference) if (pending := job.pending(self)) else (None, None)
        for site in pending:
            assert graph is not None
            norm = job.unfit(site) or _norm_of(job, site, graph)
            if isinstance(norm, str):
                job.record(self, site, norm)
            else:
                groups[norm].append(site)
        sites = [site for group in groups.values() for site in group]
        found = {site.parameter: _Inputs() for site in sites}
        share = -(-ROWS // job.batches.count) if sites else 0

        def seen(call: Call) -> None:
            found[call.site.parameter].add(input_rows(call, 16 * share), share)

        bar = tqdm(job.batches if sites else (), desc=self.name, unit="batch", disable=None, leave=False)
        with observe(job.reference, sites, seen):
            for number, batch in enumerate(bar):
                forward(job.reference, batch, f"batch {number}, reference")
        for norm, group in groups.items():
            self._group(job, norm, group, [found[site.parameter] for site in group])

    @torch.no_grad()
    def _group(self, job: Job, norm: Node, group: list[Site], inputs: list[_Inputs]) -> None:
        """Search the power for the layers behind one norm, and change them and the norm if it helps."""
        names = [str(norm.args[i].target) for i in AFFINE[op_name(norm)] if isinstance(norm.args[i], Node)]  # type: ignore[union-attr]
        reached = [x for x in inputs if x.count]
        magnitude = (
            sum(x.magnitude(site) for x, site in zip(inputs, group, strict=True) if x.count) if reached else None
        )
        if not isinstance(magnitude, Tensor) or len(reached) < len(group) or not magnitude.isfinite().all():
            for site in group:
                job.record(
                    self, site, "kept: never reached by the data, or by what is not finite, or its siblings are so"
                )
            return
        before = [self._error(job, s, x, None) for s, x in zip(group, inputs, strict=True)]
        tried = {}
        for power in self.powers:
            scale = magnitude.clamp(min=float(magnitude.max()) * 1e-4).pow(power)
            scale = scale / (scale.max() * scale.min()).sqrt()
            tried[power] = scale, [self._error(job, s, x, scale) for s, x in zip(group, inputs, strict=True)]
        power = min(tried, key=lambda p: sum(tried[p][1]))
        scale, after = tried[power]
        if sum(after) > (1 - self.gain) * sum(before):
            for site, error, best in zip(group, before, after, strict=True):
                job.record(self, site, f"kept: the best power {power:g} has an error of {best:.2e}", error)
            return
        vectors = {site.parameter: _columns(scale, site) for site in group}
        for name in names:
            path, _, attribute = name.rpartition(".")
            module, old = job.model.get_submodule(path), job.model.get_parameter(name)
            new = (old.detach().float() / scale).to(old.dtype)
            setattr(module, attribute, nn.Parameter(new, old.requires_grad))
        job.smooth(vectors)
        for site, error, best in zip(group, before, after, strict=True):
            job.encode(site)
            reason = f"channels to the power {power:g}, absorbed by {names[0].rpartition('.')[0]}"
            job.record(self, site, reason, error, best, changed=True)

    def _error(self, job: Job, site: Site, inputs: _Inputs, scale: Tensor | None) -> float:
        """‖quantized - wanted‖² / ‖wanted‖² of the output on the rows that were kept, the input quantized if it is."""
        dense, x = job.weight(site), torch.cat(inputs.rows, 1)
        columns = torch.ones_like(dense[0]) if scale is None else _columns(scale, site)
        grouped = columns if columns.dim() > 1 else columns.expand(dense.shape)
        q = job.encoded(site, dense * grouped)
        rounded = nvfp4.dequantize_rows(q.packed, q.scale, q.global_scale, dense.shape[1], torch.float32)
        weight, rounded = (torch.unflatten(w.reshape(dense.shape), 0, (len(x), -1)) for w in (dense, rounded))
        wanted = x @ weight.mT
        given = x / torch.unflatten(grouped, 0, (len(x), -1))[:, :1]
        if job.quantizes_input(site):
            given = nvfp4.dequantize_rows(*nvfp4.quantize_rows(given), given.shape[-1], torch.float32)
        power = float(wanted.square().sum()) or 1.0
        return float((given @ rounded.mT - wanted).square().sum()) / power


@dataclass
class _Inputs:
    """What one layer reads: sums of magnitudes, and some rows."""

    rows: list[Tensor] = field(default_factory=list)
    """fp32 [G, P, K] each."""
    total: Any = 0.0
    count: int = 0

    def add(self, x: Tensor, share: int) -> None:
        """Take in rows fp32 [G, P, K]."""
        self.total = self.total + x.abs().sum(1)
        self.count += x.shape[1]
        self.rows.append(x[:, :: -(-x.shape[1] // share)].clone())

    def magnitude(self, site: Site) -> Tensor:
        """The mean of every channel of the input, fp32 [C]."""
        mean: Tensor = self.total / self.count
        return torch.unflatten(mean, -1, (-1, site.channels)).mean(-2).flatten()


def _columns(scale: Tensor, site: Site) -> Tensor:
    """Per channel of the input, fp32 [C] -> per value of the weight's rows, fp32 [N, K] (or [K] if all are alike)."""
    n, k = site.rows
    groups = len(scale) // site.channels
    one = scale.view(groups, 1, site.channels).expand(groups, k // site.channels, site.channels).reshape(groups, k)
    return one[0] if groups == 1 else one.repeat_interleave(n // groups, 0)


def _norm_of(job: Job, site: Site, graph: GraphSites) -> Node | str:
    """The norm that alone makes the input of a site, all of whose readers can be scaled; or why there is none."""
    uses = [i for i, s in enumerate(graph.sites) if s.parameter == site.parameter]
    if len(uses) != 1 or site.tied or site.transform or site.order not in ("rows", "conv", "conv_transpose"):
        return "kept: it is used several times, or behind other ops, or the trace does not reach it"
    node = graph.activations[uses[0]]
    while isinstance(node, Node) and op_name(node) in HOMOGENEOUS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if not isinstance(node, Node) or op_name(node) not in AFFINE:
        made = op_name(node) if isinstance(node, Node) else "a constant"
        return f"kept: its input comes from {made}, not from a norm with a weight of its own"
    parameters = dict(job.model.named_parameters(remove_duplicate=False))
    for place in AFFINE[op_name(node)]:
        value = node.args[place] if place < len(node.args) else None
        name = str(value.target) if isinstance(value, Node) else None
        if name is None and place == AFFINE[op_name(node)][0]:
            return "kept: the norm ahead of it has no weight"
        if name is None:
            continue
        channels = site.channels * (site.groups if site.op.startswith("conv") else 1)
        shared = name not in parameters or sum(p is parameters[name] for p in parameters.values()) > 1
        if shared or len(value.users) > 1 or tuple(parameters[name].shape) != (channels,):  # type: ignore[union-attr]
            return f"kept: {name} is not of the channels of its input, packed, or used elsewhere"
    pending = {s.parameter for s in job.sites}
    readers = _readers(node)
    owners = {n: s.parameter for n, s in zip(graph.nodes, graph.sites, strict=True)}
    other = next((n for n in readers if owners.get(n) not in pending), None)
    return node if other is None else f"kept: {op_name(other)} reads the norm too, which cannot be scaled"


def _readers(node: Node) -> Sequence[Node]:
    """What reads a value, through functions that a positive factor passes."""
    found: list[Node] = []
    for user in node.users:
        found.extend(_readers(user) if op_name(user) in HOMOGENEOUS else [user])
    return found
