"""What a variant of a network is worth: its score, how far its outputs are from fp32's, what it takes to store."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import nets
from benchmarks.peers import UnavailableError, reason

BATCH = 100
CALIBRATION = 256
"""Inputs of the training part that methods may look at; their targets stay hidden."""

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Task:
    """A trained network and what it is tested on."""

    net: str
    seed: int
    model: nn.Module
    """fp32, in evaluation mode."""
    test: Iterable[tuple[Tensor, Tensor]]
    """Batches of inputs and of classes [B, ...]; read anew for every variant."""
    calibration: Sequence[Tensor]
    """Batches of inputs."""
    metric: str
    """"accuracy" or "mIoU", in percent."""


@dataclass(frozen=True, eq=False)
class Made:
    """A variant of a task's network."""

    run: Callable[[Tensor], Tensor]
    """Inputs [B, ...] fp32 or int64 -> scores [B, classes, ...]."""
    weights: Mapping[str, Tensor]
    """The weights that it holds in fewer bits, decoded, by the name of the parameter."""
    bits: float
    """Mean bits of those, scales included."""
    nbytes: int
    """Of all parameters and buffers."""


@dataclass(frozen=True)
class Variant:
    """One way to store and compute a network."""

    name: str
    kind: str
    """"reference", "W4A16", "W4A4" or "peer"."""
    make: Callable[[Task], Made]


def trained_task(net: str, seed: int, *, steps: int | None = None, inputs: int | None = None) -> Task:
    """A network of `nets.RECIPES`, trained if it is not yet.

    Args:
        net: its name.
        seed: of its training.
        steps: of the training, fewer than usual to try something out.
        inputs: to test on, fewer than there are.
    """
    recipe = nets.RECIPES[net]
    model = nets.trained(net, seed, steps=steps)
    test, train = recipe.data("test")[:inputs], recipe.data("train")[:CALIBRATION]
    batches = list(zip(test.inputs.split(BATCH), test.targets.split(BATCH), strict=True))
    return Task(net, seed, model, batches, train.batches(32), recipe.metric)


@torch.no_grad()
def outputs(run: Callable[[Tensor], Tensor], task: Task) -> tuple[Tensor, Tensor]:
    """Scores fp32 [N, classes, ...] and classes [N, ...] of all test inputs."""
    pairs = [(run(inputs).float(), targets) for inputs, targets in task.test]
    scores, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return scores, targets


def score(scores: Tensor, targets: Tensor, metric: str) -> float:
    """Percent: of the positions whose largest score is the right class's, or the mean over classes of the IoU.

    The IoU of a class is intersection over union of where it is and where it is said to be, over all inputs.
    """
    seen = scores.argmax(1)
    if metric == "accuracy":
        return 100 * (seen == targets).double().mean().item()
    shares = []
    for index in targets.unique():
        here, said = targets == index, seen == index
        shares.append(((here & said).sum() / (here | said).sum()).item())
    return 100 * sum(shares) / len(shares)


def weight_mse(weights: Mapping[str, Tensor], model: nn.Module) -> float:
    """Mean of ‖w − w₀‖² / ‖w₀‖² over the tensors, each counting by its number of values; 0 of none."""
    total = numel = 0.0
    for name, weight in weights.items():
        dense = model.get_parameter(name).double()
        total += weight.numel() * ((weight.double() - dense).square().sum() / dense.square().sum()).item()
        numel += weight.numel()
    return total / max(numel, 1)


def row_of(task: Task, variant: Variant, reference: Tensor) -> Row:
    """The row of a variant.

    Args:
        task: network and data.
        variant: how to make it.
        reference: the scores of the fp32 network.

    Returns:
        What was measured; or a "reason" why there is nothing, and "failed" where that is no property of the network.
    """
    row: Row = {"net": task.net, "seed": task.seed, "variant": variant.name, "kind": variant.kind}
    gc.collect()
    start = perf_counter()
    try:
        made = variant.make(task)
        seconds = perf_counter() - start
        scores, targets = outputs(made.run, task)
        if not scores.isfinite().all():
            raise FloatingPointError("its outputs are not finite")  # noqa: TRY301
    except UnavailableError as error:
        return {**row, "reason": str(error)}
    except Exception as error:  # noqa: BLE001  (a method or a peer that breaks is a row, and the run goes on)
        return {**row, "reason": reason(error), "failed": True}
    difference = (scores - reference).double()
    error = (difference.square().sum() / reference.double().square().sum()).sqrt().item()
    return {
        **row,
        "metric": task.metric,
        "score": score(scores, targets, task.metric),
        "drop": score(reference, targets, task.metric) - score(scores, targets, task.metric),
        "loss_bits": F.cross_entropy(scores, targets).item() / math.log(2),
        "error": error,
        "sqnr_db": -20 * math.log10(error) if error else None,
        "changed": 100 * (scores.argmax(1) != reference.argmax(1)).double().mean().item(),
        "weight_mse": weight_mse(made.weights, task.model),
        "share": sum(weight.numel() for weight in made.weights.values())
        / sum(p.numel() for p in task.model.parameters()),
        "bits": made.bits,
        "bytes": made.nbytes,
        "inputs": len(targets),
        "seconds": seconds,
    }
