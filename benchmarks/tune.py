"""Writes fp4fx/kernels/triton/tuning.json: tiles measured on the GPU that is here, and assumed ones where none was.

`python -m benchmarks.tune` measures; `--assumed` needs no GPU and writes the rules' tiles anew, leaving measured rows.
A bucket's tile is the one whose times, relative to the best of each shape in it, have the least product.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks import gpu_calls, gpu_timing
from fp4fx.bench import version_of
from fp4fx.kernels.triton import tuning
from fp4fx.kernels.triton.tuning import Tile
from fp4fx.target import target_of

M, N, K = (
    (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    (512, 1024, 2048, 4096, 8192, 16384),
)
"""Upper ends of the buckets that are measured; above the last there is one more without an end."""

LINEAR = ((1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192), (11008, 4096), (4096, 14336))
"""N and K of the linear layers that are measured."""

OPS = ("gemv", "split_k", "gemm", "conv", "quantize")
DECODE = "decode"
ROWS_OF = {
    "gemv": (1, 2, 4),
    "split_k": (2, 4, 8, 16, 32, 64),
    "gemm": (16, 32, 64, 128, 256, 512),
    DECODE: (32, 64, 128, 256, 512),
}
"""Rows of x that each schedule of a linear layer is measured at: more than it is used for, so that crossovers show."""
W4A4 = ("native", "scaled_mm")
"""Two packed sides where the matrix unit reads such, by Triton and by the library: measured where "gemm" is."""
QUANTIZE = ((16, 4096), (512, 4096), (4096, 4096), (3136, 64))
"""Rows and values a row."""

_SMS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170}
_SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""KiB for a program: that of sm_86 and sm_89 for their family."""

Row = dict[str, Any]


# --- assumed ---------------------------------------------------------------------------------------------------------


def assumed() -> list[Row]:
    """First tiles of every family: enough programs to fill it, shared memory that it has."""
    return [
        {"family": family, "op": op, "m": m, "n": n, "k": k, "tile": list(tile), "assumed": True}
        for family in tuning.FAMILIES
        for op, m, n, k, tile in _rules(family)
    ]


def _rules(family: str) -> Iterator[tuple[str, int | None, int | None, int | None, Tile]]:
    """Op, bounds on m, n and k, tile. A bucket is judged by its lower end, where there is least to do."""
    yield "gemv", 2, None, None, Tile(1, 8, 4096, num_stages=1)
    yield "gemv", None, None, None, Tile(1, 4, 4096, num_stages=1)
    for m in (16, 32, None):
        for low, n in ((512, 1024), (1024, 2048), (2048, 4096), (4096, 8192), (8192, 16384), (16384, None)):
            for low_k, k in ((512, 1024), (1024, 2048), (2048, 4096), (4096, None)):
                tile = Tile(m or 64, 64, 128)
                most = max(1, low_k // (2 * tile.block_k))
                split = next(
                    (s for s in (1, 2, 4, 8) if _programs(low + 1, tile.block_n) * s >= 0.9 * _SMS[family]), 16
                )
                tile = _fitting(tile._replace(split_k=min(split, most)), family)
                yield "split_k", m, n, k, _whole("split_k", tile, family)
    for m in (16, 32, 64):
        yield "gemm", m, None, None, _whole("gemm", _fitting(Tile(m, 64, 128), family), family)
    for low, m in ((65, 128), (129, 256), (257, 512), (513, 2048), (2049, None)):
        for low_n, n in ((512, 2048), (2048, 4096), (4096, 8192), (8192, None)):
            yield "gemm", m, n, None, _whole("gemm", _fitting(_filling(low, low_n + 1, family), family), family)
    for m, n, block_m, block_n in (
        *((16, None, 16, 64), (32, None, 32, 64), (4096, None, 64, 64), (16384, None, 128, 64)),
        *((None, 64, 128, 64), (None, None, 128, 128)),
    ):  # of the parts a convolution takes as many as fill the device
        tile = Tile(block_m, block_n, 64, 16, 8 if block_m * block_n == 128 * 128 else 4)
        if family in ("sm_80", "sm_120") and block_m >= 64:  # mma.sync has x in registers
            tile = tile._replace(block_n=64, num_warps=8)
        yield "conv", m, n, None, _whole("conv", _fitting(tile, family), family)
    for op in ("quantize", "dequantize"):
        yield op, None, None, None, Tile(8, 1, 512)


def _programs(size: int, block: int) -> int:
    return math.ceil(size / block)


def _filling(m: int, n: int, family: str) -> Tile:
    """The largest tile of which there are about as many as multiprocessors: a smaller one decodes W oftener."""
    candidates = (Tile(128, 128, 64, 1, 8), Tile(128, 64, 64), Tile(64, 64, 128))
    full = (t for t in candidates if _programs(m, t.block_m) * _programs(n, t.block_n) >= 0.9 * _SMS[family])
    return next(full, candidates[-1])


def _fitting(tile: Tile, family: str) -> Tile:
    """With as many stages, and then values of K, as shared memory has room for: x in 16 bits, W in codes and scales."""
    for block_k, stages in ((tile.block_k, 4), (tile.block_k, 3), (64, 3), (64, 2)):
        if _bytes(tile, block_k) * stages <= _SHARED[family] << 10:
            return tile._replace(block_k=block_k, num_stages=stages)
    raise AssertionError(f"no room for {tile} on {family}")


def _whole(op: str, tile: Tile, family: str) -> Tile:
    """A tile of which nothing spills, by Triton 3.6 and 3.9, with the longest epilogue too."""
    shape = (family, op, *tile[:3])
    if shape == ("sm_80", "split_k", 32, 64, 128):
        return tile._replace(block_k=64)
    if shape == ("sm_80", "gemm", 128, 128, 64):
        return tile._replace(block_n=64)
    if shape in (("sm_100", "gemm", 32, 64, 128), ("sm_100", "gemm", 64, 64, 128)):
        return tile._replace(num_warps=8)
    return tile._replace(block_m=64) if shape == ("sm_120", "conv", 128, 64, 64) else tile


def _bytes(tile: Tile, block_k: int) -> int:
    return block_k * (2 * tile.block_m) + block_k * 9 // 16 * tile.block_n


def limits_assumed() -> dict[str, Row]:
    """Up to which M each schedule is assumed to be the one: the crossovers of other 4-bit kernels on an H100."""
    return {f: {"limits": {"gemv": 4, "split_k": 64, "gemm": 128}, "assumed": True} for f in tuning.FAMILIES}


# --- measured --------------------------------------------------------------------------------------------------------


def candidates(op: str, m: int, n: int, k: int, family: str) -> list[Tile]:
    """Tiles worth a try for a product [m, k] x [n, k]."""
    if op in (DECODE, *W4A4):
        return [Tile(0, 0, 0)]
    if op == "gemv":
        found = [Tile(1, bn, bk, 1, w) for bn in (2, 4, 8, 16) for bk in (256, 512, 1024, 2048) for w in (2, 4, 8)]
        return [
            t
            for t in found
            if 256 <= t.block_n * t.block_k // 8 // t.num_warps * 4 <= 2048 and t.block_k < max(512, 2 * k)
        ]
    if op == "quantize":
        return [Tile(bm, 1, bk, 1, w) for bm in (1, 2, 4, 8, 16) for bk in (128, 256, 512, 1024) for w in (2, 4, 8)]
    rows = [size for size in (16, 32, 64, 128) if size < 2 * m or size == 16][-2:]
    shapes = [(bm, bn, w) for bm in rows for bn, w in ((64, 4), (128, 4), (128, 8)) if bn < 2 * n or bn == 64]
    found = [Tile(bm, bn, bk, 1, w, s) for bm, bn, w in shapes for bk in (64, 128) for s in (3, 4)]
    found = [t for t in found if _bytes(t, t.block_k) * t.num_stages <= _SHARED[family] << 10]
    if op == "gemm":
        return found
    parts = [s for s in (1, 2, 4, 8, 16) if s * 2 * 128 <= max(k, 256)]
    return [t._replace(split_k=s) for t in found if t.num_stages == 4 for s in parts]


Cells = Mapping[tuple[str, int, int, int], Mapping[Tile, float]]
"""Milliseconds of every tile by op, m, n and k."""


def rows_of(cells: Cells, family: str, facts: Row) -> list[Row]:
    """One row per op and bucket with the tile that is best over all shapes in it."""
    buckets: dict[tuple[str, int | None, int | None, int | None], list[Mapping[Tile, float]]] = {}
    for (op, m, n, k), times in cells.items():
        if times and op not in (DECODE, *W4A4):
            ends = (_end(M, m), None if op == "quantize" else _end(N, n), _end(K, k))
            buckets.setdefault((op, *ends), []).append(times)
    rows = []
    for (op, m, n, k), measured in buckets.items():
        common = set.intersection(*(set(times) for times in measured)) or set(measured[0])
        score = {
            tile: sum(math.log(times[tile] / min(times.values())) for times in measured if tile in times)
            for tile in common
        }
        tile = min(score, key=lambda t: (score[t], t))
        took = [round(times[tile] * 1e3, 2) for times in measured if tile in times]
        rows.append({"family": family, "op": op, "m": m, "n": n, "k": k, "tile": list(tile), "us": took, **facts})
    return rows


def _end(ends: Sequence[int], size: int) -> int | None:
    return next((end for end in ends if size <= end), None)


def limits_of(cells: Cells) -> dict[str, int]:
    """Up to which M each schedule is the fastest, over all shapes that every schedule measured at that M has."""
    best = {(op, m, n, k): min(times.values()) for (op, m, n, k), times in cells.items() if op in ROWS_OF and times}
    limits = dict.fromkeys((op for op in ROWS_OF if op != DECODE), 0)
    for m in sorted({m for _, m, _, _ in best}):
        shapes = {op: {key[2:] for key in best if key[:2] == (op, m)} for op in ROWS_OF}
        present = [op for op in ROWS_OF if shapes[op]]
        common = set.intersection(*(shapes[op] for op in present))
        score = {op: sum(math.log(best[op, m, n, k]) for n, k in common) for op in present}
        winner = min(present, key=score.__getitem__) if common else DECODE
        if winner != DECODE:
            limits[winner] = m
    reached = 0
    for op in limits:  # each takes over where the one before it ends
        limits[op] = reached = max(reached, limits[op])
    return limits


def native_rows_of(cells: Cells) -> int:
    """Up to which M Triton's product of two packed sides is as fast as the library's, over all shapes of that M."""
    logs: dict[int, float] = {}
    for (op, m, n, k), times in cells.items():
        other = cells.get((W4A4[1], m, n, k))
        if op == W4A4[0] and times and other:
            logs[m] = logs.get(m, 0.0) + math.log(min(times.values()) / min(other.values()))
    slower = [m for m, log in logs.items() if log > 0]
    return max((m for m in logs if m < min(slower, default=math.inf)), default=0)


class Tuner:
    """Measures tiles on one device until the time is up."""

    def __init__(self, device: torch.device, seconds: float, rounds: int = 5) -> None:
        self.device, self.rounds = device, rounds
        self.end = time.perf_counter() + seconds
        self.family = tuning.family_of(device)
        self.cells: dict[tuple[str, int, int, int], dict[Tile, float]] = {}
        self.lost: list[tuple[str, str]] = []
        """What was not measured, with the reason."""

    def run(self, ops: Iterable[str], shapes: Sequence[tuple[int, int]] = LINEAR) -> None:
        """Every cell of these ops; the crossovers where there are linear layers among them."""
        todo = list(self._cells(list(ops), shapes))
        for (op, m, n, k), make in tqdm(todo, desc="tuning", unit="cell", disable=None, leave=False):
            times = self.cells.setdefault((op, m, n, k), {})
            for tile in candidates(op, m, n, k, self.family):
                name = f"{op} M={m} N={n} K={k} {tuple(tile)}"
                if time.perf_counter() > self.end:
                    self.lost.append((name, "out of time"))
                    break
                with tuning.forced(**{op: tile}):
                    measured = gpu_timing.compare({name: make}, self.device, self.rounds)[name]
                if measured.timing is None:
                    self.lost.append((name, str(measured.reason)))
                else:
                    times[tile] = measured.timing.median

    def _cells(
        self, ops: Sequence[str], shapes: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[tuple[str, int, int, int], Callable[[], Sequence[gpu_timing.Call]]]]:
        linear = [op for op in ("gemv", "split_k", "gemm") if op in ops]
        for n, k in shapes:
            for op in (*linear, DECODE) if linear else ():
                for m in ROWS_OF[op]:
                    yield (op, m, n, k), functools.partial(gpu_calls.linear, m, n, k, self.device, schedule=op)
            for way in W4A4 if "gemm" in ops and self.family in tuning.NATIVE else ():
                for m in ROWS_OF["gemm"]:
                    yield (way, m, n, k), functools.partial(gpu_calls.linear_w4a4, m, n, k, self.device, way)
        for case in gpu_calls.CONVS if "conv" in ops else ():
            yield ("conv", *case.product()), functools.partial(gpu_calls.conv, case, self.device)
        for m, k in QUANTIZE if "quantize" in ops else ():
            yield ("quantize", m, 1, k), functools.partial(gpu_calls.quantize, m, k, self.device)


# --- the file --------------------------------------------------------------------------------------------------------


def merged(
    before: Mapping[str, Any], family: str, rows: Sequence[Row], limits: Row | None, native: Row | None = None
) -> dict[str, Any]:
    """The table with new rows: they replace what was measured or assumed for the same op and bucket."""
    new = {_key(row): row for row in assumed()}
    new |= {_key(row): row for row in before["rows"] if not row.get("assumed")}
    new |= {_key(row): row for row in rows}
    ordered = sorted(
        new.values(),
        key=lambda row: (row["family"], OPS.index(row["op"]) if row["op"] in OPS else 9, tuning.bounds_of(row)),
    )
    largest = limits_assumed() | {f: entry for f, entry in before["largest_m"].items() if not entry.get("assumed")}
    own = {f: {"m": 64, "assumed": True} for f in tuning.NATIVE} | before.get("native_rows", {})
    return {
        "largest_m": largest | ({family: limits} if limits else {}),
        "native_rows": own | ({family: native} if native else {}),
        "rows": ordered,
    }


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("family", "op", "m", "n", "k"))


def write(path: Path, table: Mapping[str, Any]) -> None:
    """One row a line."""
    lines = ",\n  ".join(json.dumps(row) for row in table["rows"])
    text = "{\n"
    for name in ("largest_m", "native_rows"):
        entries = ",\n  ".join(f'"{family}": {json.dumps(entry)}' for family, entry in table[name].items())
        text += f' "{name}": {{\n  {entries}\n }},\n'
    path.write_text(f'{text} "rows": [\n  {lines}\n ]\n}}\n', "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print what was chosen, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: {' '.join(OPS)}")
    parser.add_argument("--seconds", type=float, default=420, help="after which what is left is not measured")
    parser.add_argument("--out", type=Path, default=tuning.PATH)
    parser.add_argument("--assumed", action="store_true", help="measure nothing: write the rules' tiles anew")
    given = parser.parse_args(arguments)
    if unknown := set(given.ops) - set(OPS):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(OPS)}")
    before = json.loads(tuning.PATH.read_text("utf-8")) if tuning.PATH.exists() else {"rows": [], "largest_m": {}}
    if given.assumed:
        write(given.out, merged(before, "", (), None))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.tune: no CUDA device; tiles are measured on a GPU (--assumed writes the rules' tiles)")
        return 2
    device = torch.device("cuda")
    tuner = Tuner(device, given.seconds)
    tuner.run(given.ops or OPS)
    versions = {name: version_of(name) for name in ("torch", "triton")}
    facts = {"device": target_of(device).name, **versions, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    rows = rows_of(tuner.cells, tuner.family, facts)
    whole = all(any(op == done and times for (done, *_), times in tuner.cells.items()) for op in ROWS_OF)
    limits = {"limits": limits_of(tuner.cells), **facts} if whole else None
    both = all(any(op == done and times for (done, *_), times in tuner.cells.items()) for op in W4A4)
    native = {"m": native_rows_of(tuner.cells), **facts} if both else None
    write(given.out, merged(before, tuner.family, rows, limits, native))
    shown = [(row["op"], row["m"], row["n"], row["k"], Tile(*row["tile"]), row["us"]) for row in rows]
    print(tabulate(shown, ("op", "M <=", "N <=", "K <=", "tile", "µs"), missingval="any"))
    print(f"\nschedules up to M: {limits}\nTriton's W4A4 up to M: {native}\n{given.out}")
    if tuner.lost:
        print("\nnot measured\n\n" + str(tabulate(tuner.lost, ("cell", "reason"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
