"""Timing of short calls: blocks that alternate in one process, cold calls, and what the memory can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from tqdm import tqdm

from fp4fx.bench import Call, Timing

WAITED = 0.04
"""Share of a block's time that the threads of this process may wait for a processor; a block above it is repeated."""
RETRIES = 3


def blocks(candidates: Mapping[str, Call], rounds: int = 9, seconds: float = 0.008) -> dict[str, Timing]:
    """Time every candidate in one short block a round; a block is one number, the median of its calls.

    Within a block the weight is in the caches. Before it everything pauses, so that the threads of the candidate before
    have gone to sleep, and one call is not measured. Every second round runs in reverse order.

    Args:
        candidates: what to call, by name; called at least once before.
        rounds: blocks of each candidate.
        seconds: of a block, which has three calls or more.
    """
    order = list(candidates)
    medians: dict[str, list[float]] = {name: [] for name in order}
    for number in tqdm(range(rounds), desc="hot", unit="round", disable=None, leave=False):
        for name in order if number % 2 == 0 else reversed(order):
            medians[name].append(_block(candidates[name], seconds))
    return {name: Timing.of(times) for name, times in medians.items()}


def _block(call: Call, seconds: float) -> float:
    """Milliseconds of one call: the median of a block, of the least disturbed of some attempts."""
    attempts = []
    for _ in range(RETRIES):
        time.sleep(seconds)
        call()
        times, waited, start = [], _waited(), perf_counter()
        while len(times) < 3 or perf_counter() - start < seconds:
            before = perf_counter()
            call()
            times.append(perf_counter() - before)
        share = (_waited() - waited) / (perf_counter() - start)
        attempts.append((share, statistics.median(times) * 1e3))
        if share < WAITED:
            break
    return min(attempts)[1]


def _waited() -> float:
    """Seconds that the threads of this process were runnable without running; 0 where Linux does not say."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text("ascii").split()[1])
        except (OSError, IndexError):
            continue  # the thread has ended
    return total / 1e9


def cold(
    candidates: Mapping[str, Call], wake: Mapping[str, Call], evict: Callable[[], object], rounds: int = 9
) -> dict[str, Timing]:
    """Time single calls whose weight comes from memory.

    Args:
        candidates: what to call, by name.
        wake: a small call of each, made just before, so that its threads are awake and its code is in the caches.
        evict: empties the caches.
        rounds: calls of each candidate.
    """
    order = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in order}
    for number in tqdm(range(rounds), desc="cold", unit="round", disable=None, leave=False):
        for name in order if number % 2 == 0 else reversed(order):
            evict()
            wake[name]()
            wake[name]()
            start = perf_counter()
            candidates[name]()
            times[name].append((perf_counter() - start) * 1e3)
    return {name: Timing.of(measured) for name, measured in times.items()}


def last_level_cache() -> int:
    """Bytes of the largest cache that this process's first processor sees; 32 MiB where Linux does not say."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text("ascii").strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes)


def eviction() -> Callable[[], object]:
    """A call that reads four times the largest cache, with all threads."""
    big = torch.ones(last_level_cache(), dtype=torch.float32)
    return big.sum


def read_rate(gib: float = 1, rounds: int = 9) -> Timing:
    """Milliseconds to add up an array of `gib` GiB in fp32 with all threads; see `gigabytes_per_second`."""
    array: Tensor = torch.ones(int(gib * 2**28))
    times = []
    for _ in range(rounds + 1):
        start = perf_counter()
        array.sum()
        times.append((perf_counter() - start) * 1e3)
    return Timing.of(times[1:])


def gigabytes_per_second(n_bytes: float, milliseconds: float) -> float:
    """Bytes in that time -> 1e9 bytes a second."""
    return n_bytes / milliseconds / 1e6
