"""Timing on a GPU: calls in CUDA graphs whose inputs come from memory, candidates that alternate, medians.

On the CPU the same code runs with a clock in place of events and without graphs, so that every line can be exercised
where there is no GPU; such times say nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.peers.base import reason
from fp4fx.bench import Call, Timing

T = TypeVar("T")
L2 = 50 << 20
"""Bytes of cache that inputs have to exceed at the least."""
MOST = 32
"""Copies of the inputs of one call."""


@dataclass(frozen=True)
class Measured:
    """What came of one candidate."""

    timing: Timing | None = None
    reason: str | None = None
    """Why there is no timing."""
    graph: bool = False
    """Whether it ran in a CUDA graph; otherwise its time includes the launches from Python."""

    def row(self) -> dict[str, Any]:
        """Flat, JSON-ready, the unit in the name."""
        if self.timing is None:
            return {"reason": self.reason}
        t = self.timing
        return {"median_ms": t.median, "p10_ms": t.p10, "p90_ms": t.p90, "rounds": t.rounds, "graph": self.graph}


def cache_bytes(device: torch.device) -> int:
    """The L2 cache."""
    return max(L2, torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 1 << 10


def copies(n_bytes: int, device: torch.device) -> int:
    """How many copies of inputs of `n_bytes` take turns, so that none is in the cache when its turn comes."""
    return min(MOST, max(1, math.ceil(2.5 * cache_bytes(device) / max(1, n_bytes)))) if device.type == "cuda" else 2


def rotate(make: Callable[[int], T], n_bytes: int, device: torch.device) -> list[T]:
    """`make(index)` for as many copies as it takes."""
    return [make(index) for index in range(copies(n_bytes, device))]


def compare(
    candidates: Mapping[str, Callable[[], Sequence[Call]]], device: torch.device, rounds: int = 15
) -> dict[str, Measured]:
    """Time each candidate once a round, in alternating order.

    Args:
        candidates: by name, what makes its calls, one per copy of its inputs; whatever it raises is its reason.
        device: where they run.
        rounds: measured rounds, each of all copies.
    """
    found: dict[str, Measured] = {}
    runs: dict[str, tuple[Call, int, bool]] = {}
    for name, make in candidates.items():
        try:
            runs[name] = _ready(make(), device)
        except Exception as error:  # noqa: BLE001  (whatever a candidate raises is the reason of its row)
            found[name] = Measured(reason=reason(error))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-1 if device.type == "cuda" else 0, rounds):  # one round more, to warm up
        for name in runs if number % 2 else reversed(runs):
            call, calls, _ = runs[name]
            milliseconds = once(call, device) / calls
            if number >= 0:
                times[name].append(milliseconds)
    found |= {name: Measured(Timing.of(took), graph=runs[name][2]) for name, took in times.items()}
    return {name: found[name] for name in candidates}


def once(call: Call, device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _ready(calls: Sequence[Call], device: torch.device) -> tuple[Call, int, bool]:
    """Compiled and warm: all calls as one, how many they are, and whether they are a CUDA graph."""
    for call in calls:
        call()
    repeat = 1
    if device.type == "cuda":
        torch.cuda.synchronize()
        run = captured(calls)
        if run is not None:
            repeat = max(1, math.ceil(0.2 / max(1e-3, once(run, device))))  # a replay costs some µs
            run = captured(calls, repeat) if repeat > 1 else run
        if run is not None:
            run()
            torch.cuda.synchronize()
            return run, len(calls) * repeat, True

    def every() -> None:
        for call in calls:
            call()

    return every, len(calls), False


def captured(calls: Sequence[Call], repeat: int = 1) -> Call | None:
    """The calls as one CUDA graph; None where they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.no_grad(), torch.cuda.graph(graph):
            for _ in range(repeat):
                for call in calls:
                    call()
    except RuntimeError:  # a launch that synchronizes, say
        torch.cuda.synchronize()
        return None
    return graph.replay


def copy_rate(device: torch.device, n_bytes: int = 1 << 30, rounds: int = 11) -> float:
    """1e9 bytes a second that a copy within the device's memory reads and writes."""
    source = torch.empty(n_bytes if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    times = [once(lambda: target.copy_(source), device) for _ in range(rounds + 2)][2:]
    return 2 * source.nbytes / Timing.of(times).median / 1e6
