"""Timing to believe: candidates alternate in one process, round by round, and a row says where it was measured."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from fp4fx import __version__
from fp4fx.capture import configured
from fp4fx.target import target_of

EAGER, INDUCTOR, INDUCTOR_BF16 = "eager fp32", "Inductor fp32", "Inductor bf16"
FP4FX, FP4FX_BF16 = "fp4fx fp32", "fp4fx bf16"

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate over all rounds."""

    median: float
    min: float
    p10: float
    p90: float
    rounds: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """Of the times of the rounds; percentiles are interpolated, a single round is its own spread."""
        deciles = list(milliseconds)
        if len(deciles) > 1:
            deciles = statistics.quantiles(deciles, n=10, method="inclusive")
        return cls(statistics.median(milliseconds), min(milliseconds), deciles[0], deciles[-1], len(milliseconds))


def alternate(candidates: Mapping[str, Call], rounds: int = 20, warmup: int = 3) -> dict[str, Timing]:
    """Time every candidate once per round, in one process; every second round runs in reverse order.

    What disturbs a round (another process, a hot chip) disturbs all candidates, and none always follows the same one.

    Args:
        candidates: what to call, by name; a call returns when its work is done.
        rounds: measured rounds, 1 or more.
        warmup: rounds before them that are not measured.
    """
    order = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in order}
    for number in tqdm(range(-warmup, rounds), desc="timing", unit="round", disable=None, leave=False):
        for name in order if number % 2 == 0 else reversed(order):
            start = perf_counter()
            candidates[name]()
            elapsed = perf_counter() - start
            if number >= 0:
                times[name].append(elapsed * 1e3)
    return {name: Timing.of(measured) for name, measured in times.items()}


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where and when a row is measured on that device: its name, instruction sets, threads, versions, date."""
    cpu, measured = target_of(torch.device("cpu")), target_of(torch.device(device))
    return {
        "device": measured.name,
        "cpu": cpu.name,
        "isa": sorted(cpu.features),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "fp4fx": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def headline(where: Mapping[str, Any]) -> str:
    """An `environment` in one line."""
    versions = f"torch {where['torch']}, fp4fx {where['fp4fx']}"
    threads = "1 thread" if where["threads"] == 1 else f"{where['threads']} threads"
    return f"{where['device']}, {threads}, {versions}, {where['date']}"


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Candidate:
    """One way to run a model."""

    module: nn.Module
    """What holds the weights."""
    call: Call
    """Runs it on the example inputs and returns when the work is done; the first call compiles."""


def candidates(model: nn.Module, packed: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Candidate]:
    """The ways to run a model that are compared: peers at their best settings, and the packed model compiled by fp4fx.

    Args:
        model: the dense model in fp32.
        packed: what `fp4fx.quantize` made of it.
        inputs: example inputs of both, on their device.
    """
    fp32 = copy.deepcopy(model).to(memory_format=torch.channels_last)
    bf16 = copy.deepcopy(fp32).to(torch.bfloat16)
    packed_bf16 = copy.deepcopy(packed).to(torch.bfloat16)
    images = [_channels_last(x) for x in inputs]
    halves = [x.to(torch.bfloat16) if x.is_floating_point() else x for x in images]
    return {
        EAGER: Candidate(model, _call(model, inputs)),
        INDUCTOR: Candidate(fp32, frozen(_call(torch.compile(fp32), images))),
        INDUCTOR_BF16: Candidate(bf16, frozen(_call(torch.compile(bf16), halves))),
        FP4FX: Candidate(packed, _call(torch.compile(packed, backend="fp4fx"), images)),
        FP4FX_BF16: Candidate(packed_bf16, _call(torch.compile(packed_bf16, backend="fp4fx"), halves)),
    }


def frozen(call: Call) -> Call:
    """The call, its first run (which compiles) under Inductor's freezing: constants repacked, its best for inference.

    As an option of torch.compile it comes too late: Dynamo has made inputs of the parameters by then (torch 2.15).
    """
    compiled = False

    def run() -> Any:
        nonlocal compiled
        if compiled:
            return call()
        compiled = True
        with configured({"freezing": True}):
            return call()

    return run


def _channels_last(x: Tensor) -> Tensor:
    """Images in the order that Inductor's convolutions are fastest on; anything else as it is."""
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def _call(module: Callable[..., Any], inputs: Sequence[Tensor]) -> Call:
    def call() -> Any:
        with torch.no_grad():
            result = module(*inputs)
        if any(x.is_cuda for x in inputs):
            torch.cuda.synchronize()
        return result

    return call


@dataclass(frozen=True)
class Row:
    """One way to run one model."""

    candidate: str
    timing: Timing
    first_call: float
    """Seconds of the first call, compilation included; less where Inductor has the graph in its cache on disk."""
    weights: int
    """Bytes of the parameters and buffers of the module."""

    def to_dict(self) -> dict[str, Any]:
        """Flat, JSON-ready, the unit in the name."""
        times = {f"{name}_ms": value for name, value in asdict(self.timing).items() if name != "rounds"}
        counts = {"rounds": self.timing.rounds, "first_call_s": self.first_call, "weight_bytes": self.weights}
        return {"candidate": self.candidate, **times, **counts}


def compare(ways: Mapping[str, Candidate], rounds: int = 20, warmup: int = 3) -> tuple[Row, ...]:
    """Latency and bytes of a model in every one of these ways."""
    first: dict[str, float] = {}
    with tqdm(ways.items(), desc="compiling", unit="model", disable=None, leave=False) as bar:
        for name, way in bar:
            bar.set_postfix_str(name)
            start = perf_counter()
            way.call()
            first[name] = perf_counter() - start
    timings = alternate({name: way.call for name, way in ways.items()}, rounds, warmup)
    return tuple(Row(name, timings[name], first[name], _bytes(way.module)) for name, way in ways.items())


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    lines = [
        (r.candidate, t.median, t.min, f"{t.p10:.1f} - {t.p90:.1f}", r.first_call, r.weights / 1e6)
        for r in rows
        for t in [r.timing]
    ]
    headers = ("candidate", "median ms", "min ms", "p10 - p90 ms", "first call s", "weights MB")
    return str(tabulate(lines, headers, floatfmt=("", ".1f", ".1f", "", ".1f", ".1f")))


def verdict(rows: Sequence[Row]) -> str:
    """How fast each way of fp4fx is beside each of the others, in words; a difference within the spread is none."""
    ours = [row for row in rows if row.candidate in (FP4FX, FP4FX_BF16)]
    others = [row for row in rows if row not in ours]
    lines = [f"{row.candidate} is {', '.join(_against(row.timing, other) for other in others)}." for row in ours]
    fastest = min(rows, key=lambda row: row.timing.median).candidate
    return "\n".join([*lines, f"Fastest here: {fastest}."])


def _against(ours: Timing, other: Row) -> str:
    theirs, ratio = other.timing, ours.median / other.timing.median
    if ours.p10 <= theirs.p90 and theirs.p10 <= ours.p90:
        return f"as fast as {other.candidate} within the spread ({ratio:.2f} times its time)"
    if ratio > 1:
        return f"{ratio:.1f} times slower than {other.candidate}"
    return f"{1 / ratio:.1f} times faster than {other.candidate}"
