"""AdaRound (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020), for E2M1.

Each weight lies between two values of E2M1, times its scale, whose distance depends on where it lies: .5 below 2, 1
below 4, 2 above. Which of them it takes is learned by gradient descent on the output's error, with a term that drives
every choice to one side in the end. The scales stand before that, by search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from fp4fx import nvfp4
from fp4fx.calibration.data import Batches, Enough, forward, several
from fp4fx.calibration.hessians import HELD_OUT, each_site, round_site
from fp4fx.calibration.job import Job
from fp4fx.effective import sharing_copy
from fp4fx.errors import CalibrationError
from fp4fx.packed import Packed, quantized_input
from fp4fx.site import Site

STRETCH = 0.1
"""A sigmoid that reaches this far beyond 0 and 1 is cut there, so that a choice can be final."""
FREE = 0.2
"""The part of the steps without the term that makes choices final."""


@dataclass(frozen=True, kw_only=True)
class AdaRound:
    """Site by site from second moments of its input, or block by block against the original block's output.

    What is learned is kept where it is better on data that it was not learned from.
    """

    name: ClassVar[str] = "adaround"
    needs_reference: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True
    blocks: tuple[str, ...] = ()
    """Names of modules whose weights are learned together, from the inputs that the quantized model gives them and the
    outputs that the original has. All other sites are learned one by one."""
    steps: int = 300
    learning_rate: float = 0.1
    finality: float = 20.0
    """Weight of the term that makes choices final, in units of the error of rounding to nearest."""
    samples: int = 65536
    """At most so many inputs (tokens, pixels) of a layer are taken, evenly spaced over all batches."""
    memory: int | None = None
    """Bytes for second moments of sites, or for inputs and outputs of a block; if None a quarter of the dense model for
    the former, a third for the latter. What does not fit of a block's data is not used, but for two batches."""

    def passes(self, batches: Batches | None) -> int:
        """Several."""
        return several(self.name, batches)

    def run(self, job: Job) -> None:
        """The blocks in execution order, then the sites that are in none."""
        sites = job.in_order(job.pending(self))
        inside = {s.parameter: b for b in self.blocks for s in sites if not b or s.parameter.startswith(f"{b}.")}
        for block in tqdm(dict.fromkeys(inside.values()), desc=f"{self.name}, blocks", disable=None, leave=False):
            self._block(job, block, [s for s in sites if inside.get(s.parameter) == block])
        for site, statistics in each_site(
            job, self, self.samples, self.memory, [s for s in sites if s.parameter not in inside]
        ):
            round_site(job, self, site, statistics, self._solve)

    def _solve(self, weight: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
        """As `hessians.Solve`: descends ‖(w - weight) · x‖² over all x, whose gradient in w is 2 (w - weight) · H."""
        choice = Choice(weight, scale)
        signal = ((weight @ hessian) * weight).sum()
        error = choice.nearest() - weight
        power = ((error @ hessian) * error).sum() / signal
        optimizer = torch.optim.Adam([choice.logit], lr=self.learning_rate)
        for step in range(self.steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                soft = choice()
                torch.autograd.backward(soft, 2 * ((soft.detach() - weight) @ hessian) / signal)
                self._finality(choice, step, power)
            optimizer.step()
        return choice.codes()

    def _finality(self, choice: Choice, step: int, power: Tensor | float) -> None:
        """The gradient of 1 - |2h - 1|^β, β falling from 20 to 2."""
        late = (step / self.steps - FREE) / (1 - FREE)
        if late >= 0:
            beta = 2 + 9 * (1 + math.cos(late * math.pi))
            term = 1 - (2 * choice.upward() - 1).abs().pow(beta)
            torch.autograd.backward(self.finality * power * term.mean())

    def _block(self, job: Job, path: str, sites: list[Site]) -> None:
        """Learn the weights of a module together."""
        fit = []
        for site in sites:
            reason = job.unfit(site)
            if reason is None and site.settled:
                reason = "kept: the original computes it from other parameters; leave it out of a block"
            if reason is None:
                fit.append(site)
            else:
                job.record(self, site, reason)
        data = self._data(job, path) if fit else []
        held = max(len(data) // HELD_OUT, 1)
        if len(data) < 2:
            for site in fit:
                found = f"{len(data)} batches that reach {path}"
                job.record(self, site, f"kept: found {found}, expected two or more, to learn from and to measure with")
            return
        block = Block(job, path, fit)
        encoded = {s.parameter: job.encoded(s, job.weight(s)) for s in fit}
        choices = {}
        for s in fit:
            q = encoded[s.parameter]
            scale = nvfp4.decode_e4m3(q.scale).reshape(s.rows[0], -1) * q.global_scale
            choices[s.parameter] = Choice(job.weight(s), scale)
        power = block.error({name: c.nearest() for name, c in choices.items()}, data[:1])
        optimizer = torch.optim.Adam([c.logit for c in choices.values()], lr=self.learning_rate)
        order = torch.Generator().manual_seed(0)
        for step in range(self.steps):
            batch = data[int(torch.randint(len(data) - held, (), generator=order))]
            optimizer.zero_grad()
            with torch.enable_grad():
                torch.autograd.backward(block.loss({name: c() for name, c in choices.items()}, batch))
                for choice in choices.values():
                    self._finality(choice, step, power)
            optimizer.step()
        before = block.error({s.parameter: job.decoded(s) for s in fit}, data[-held:])
        after = block.error({name: c.final() for name, c in choices.items()}, data[-held:])
        for s in fit:
            if after < before:
                codes = nvfp4.unpack(encoded[s.parameter].packed).reshape(s.rows[0], -1)
                codes[:, : s.rows[1]] = choices[s.parameter].codes()
                job.write(s, nvfp4.pack(codes), encoded[s.parameter].scale, encoded[s.parameter].global_scale)
                job.record(self, s, f"learned with {path or 'the model'}", before, after, changed=True)
            else:
                job.record(
                    self, s, f"kept: {path or 'the model'} has an error of {after:.2e} with what is learned", before
                )

    def _data(self, job: Job, path: str) -> list[tuple[Any, Any, Tensor]]:
        """Arguments of the quantized block and output of the original one, batch by batch, as far as memory allows."""
        room = sum(p.nbytes for p in job.reference.parameters()) // 3 if self.memory is None else self.memory
        data: list[tuple[Any, Any, Tensor]] = []
        given: list[tuple[Any, Any]] = []
        wanted: list[Tensor] = []

        def take(module: nn.Module, args: Any, kwargs: Any) -> None:
            given.append((args, kwargs))
            raise Enough

        def compare(module: nn.Module, args: Any, output: Any) -> None:
            wanted.append(first_tensor(output).clone())
            raise Enough

        hooks = [
            job.model.get_submodule(path).register_forward_pre_hook(take, with_kwargs=True),
            job.reference.get_submodule(path).register_forward_hook(compare),
        ]
        try:
            for number, batch in enumerate(job.batches):
                given.clear()
                wanted.clear()
                forward(job.model, batch, f"batch {number}")
                forward(job.reference, batch, f"batch {number}, reference")
                if given and wanted:
                    args, kwargs = given[0]
                    data.append((args, kwargs, wanted[0]))
                    room -= sum(t.nbytes for t in (*args, *kwargs.values(), wanted[0]) if isinstance(t, Tensor))
                if room < 0 and len(data) >= 2:
                    break
        finally:
            for hook in hooks:
                hook.remove()
        return data


class Choice:
    """Between the two neighbours of every weight: rows fp32 [..., K] with scales fp32 [..., ceil(K/16)], s · g."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        grid = nvfp4.decode_e2m1(torch.arange(8, dtype=torch.uint8, device=weight.device))
        step = scale.repeat_interleave(nvfp4.BLOCK, -1)[..., : weight.shape[-1]]
        magnitude = (weight.abs() / step).contiguous()
        self.lower = (torch.bucketize(magnitude, grid, right=True) - 1).clamp(max=6)
        signed = torch.where(weight < 0, -step, step)
        self.negative = weight < 0
        self.base = grid[self.lower] * signed
        self.span = grid[self.lower + 1] * signed - self.base
        self.fraction = ((weight - self.base) / self.span).clamp(0, 1)
        self.logit = torch.logit((self.fraction + STRETCH) / (1 + 2 * STRETCH)).requires_grad_()

    def upward(self) -> Tensor:
        """How far each weight is to go to its greater neighbour, 0 to 1."""
        return (self.logit.sigmoid() * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)

    def __call__(self) -> Tensor:
        """The weight in between."""
        return self.base + self.span * self.upward()

    def nearest(self) -> Tensor:
        """The weight rounded to nearest."""
        return self.base + self.span * (self.fraction > 0.5)

    @torch.no_grad()
    def final(self) -> Tensor:
        """The weight as it is chosen."""
        return self.base + self.span * (self.logit > 0)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes u8 [..., K] of `final`."""
        return (self.lower + (self.logit > 0) + 8 * self.negative).to(torch.uint8)


class Block:
    """A module of the original with the quantized one's other tensors, to be run with any weights."""

    def __init__(self, job: Job, path: str, sites: list[Site]) -> None:
        self.path, self.sites = path, {s.parameter: s for s in sites}
        quantized = job.model.get_submodule(path)
        self.module = sharing_copy(job.reference.get_submodule(path))
        own = {n for n, _ in (*self.module.named_parameters(), *self.module.named_buffers())}
        tensors = (*quantized.named_parameters(), *quantized.named_buffers())
        self.tensors = {name: t.detach() for name, t in tensors if name in own}
        self.dtypes = {s.parameter: job.spec(s).dtype for s in sites}
        for name, module in quantized.named_modules():
            if isinstance(module, Packed):
                for attribute in module.nvfp4:  # of a site that is not learned here
                    self.tensors[f"{name}.{attribute}".lstrip(".")] = getattr(module, attribute)
                if module.nvfp4_activations is not None:
                    inner = self.module.get_submodule(name)
                    inner.register_forward_pre_hook(lambda _, args, m=module: (quantized_input(m, args[0]), *args[1:]))

    def loss(self, weights: dict[str, Tensor], data: tuple[Any, Any, Tensor]) -> Tensor:
        """Weights fp32 [N, K] by parameter -> ‖output - wanted‖² / ‖wanted‖²."""
        args, kwargs, wanted = data
        tensors = dict(self.tensors)
        for name, rows in weights.items():
            site = self.sites[name]
            stored = rows.reshape(*site.shape[:-2], -1, rows.shape[-1]) if site.order == "columns" else rows
            dense = nvfp4.from_rows(stored, site.shape, site.order, site.groups).to(self.dtypes[name])
            tensors[name.removeprefix(f"{self.path}.")] = dense
        output = first_tensor(functional_call(self.module, tensors, args, kwargs))
        return (output - wanted).float().square().sum() / wanted.float().square().sum().clamp(min=1e-30)

    @torch.no_grad()
    def error(self, weights: dict[str, Tensor], data: list[tuple[Any, Any, Tensor]]) -> float:
        """The mean of `loss`."""
        return sum(self.loss(weights, batch).item() for batch in data) / len(data)


def first_tensor(output: Any) -> Tensor:
    """Of what a module returns the first tensor.

    Raises:
        CalibrationError: there is none.
    """
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else (output,)
    found = next((value for value in values if isinstance(value, Tensor)), None)
    if found is None:
        raise CalibrationError(f"adaround: found a block that returns {type(output).__name__}, expected a tensor in it")
    return found
