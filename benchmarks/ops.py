"""Linear layers, quantizing, decoding, gathering: fp4fx beside every peer, alternated in one process.

Hot: the weight is used again and again. Cold: the caches are emptied before every call, and one of the calls adds up as
many bytes as a packed weight has. The rate at which this machine reads memory is measured in the same run. A peer that
cannot be measured is a row with its reason.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from benchmarks import codec, peers, timing
from benchmarks.versions import versions
from fp4fx import bench
from fp4fx.bench import Call, Timing

RESULTS = Path(__file__).parent / "results"
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 1024))
BATCHES = (1, 4, 16, 64, 256)
WAKING = 256
READING = "adding up as many bytes"

Row = dict[str, Any]


def linear(n: int, k: int, batches: tuple[int, ...], candidates: tuple[peers.Candidate, ...], rounds: int) -> list[Row]:
    """Rows of one shape: every candidate at every M, at M=1 also cold."""
    torch.manual_seed(0)
    weight, small = torch.randn(n, k) / k**0.5, torch.randn(WAKING, WAKING)
    layers: dict[str, peers.Layer] = {}
    wakers: dict[str, Call] = {}
    rows: list[Row] = []
    shape = {"section": "linear", "n": n, "k": k}
    for candidate in tqdm(candidates, desc=f"{n}x{k}: weights", disable=None, leave=False):
        try:
            layers[candidate.name] = candidate.build(weight)
            wakers[candidate.name] = candidate.build(small).at(torch.randn(1, WAKING).to(candidate.dtype))
            wakers[candidate.name]()
        except Exception as error:  # noqa: BLE001  (whatever a peer raises is the reason of its row)
            layers.pop(candidate.name, None)
            rows.append({**shape, "candidate": candidate.name, "reason": peers.reason(error)})
    known = {candidate.name: candidate for candidate in candidates}
    for m in batches:
        at = {**shape, "m": m}
        x = torch.randn(m, k)
        calls: dict[str, Call] = {}
        facts: dict[str, Row] = {}
        for name, layer in layers.items():
            candidate = known[name]
            if candidate.max_m is not None and m > candidate.max_m:
                reason = f"not measured above M={candidate.max_m}: it takes seconds"
                rows.append({**at, "candidate": name, "reason": reason})
                continue
            try:
                own = x.to(candidate.dtype)
                call = layer.at(own)
                facts[name] = {**_description(candidate, layer), **_errors(layer, own, weight, call)}
                calls[name] = call
            except Exception as error:  # noqa: BLE001
                rows.append({**at, "candidate": name, "reason": peers.reason(error)})
        measured = {"hot": timing.blocks(calls, rounds)}
        if m == 1:
            packed, few = torch.ones(n * k * 9 // 64), torch.ones(WAKING)  # fp32, in 9 bytes for 16 weights
            wakers[READING], calls[READING] = few.sum, packed.sum
            measured["cold"] = timing.cold(calls, wakers, timing.eviction(), rounds)
            took = measured["cold"].pop(READING)
            rows.append({**shape, "section": "read", "bytes": packed.nbytes, **milliseconds(took)})
        rows += [
            {**at, "cache": cache, **facts[name], **milliseconds(took)}
            for cache, timings in measured.items()
            for name, took in timings.items()
        ]
        del calls
        torch.compiler.reset()
        gc.collect()
    return rows


def milliseconds(took: Timing) -> Row:
    """Flat, the unit in the name."""
    times = asdict(took)
    return {"rounds": times.pop("rounds"), **{f"{name}_ms": value for name, value in times.items()}}


def _description(candidate: peers.Candidate, layer: peers.Layer) -> Row:
    return {
        "candidate": candidate.name,
        "ours": candidate.ours,
        "bits": candidate.bits,
        "x": str(candidate.dtype).removeprefix("torch."),
        "weight_bytes": layer.weight_bytes,
    }


def _errors(layer: peers.Layer, x: Tensor, weight: Tensor, call: Call) -> Row:
    """Relative errors of y against fp64: with the weight that the layer decodes to (None: unknown), and the dense."""
    y = layer.output(call()).double()
    own = None if layer.dense is None else _relative(y, x, layer.dense)
    return {"kernel_error": own, "total_error": _relative(y, x, weight)}


def _relative(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """y [M, N] fp64 against x Wᵀ in fp64, which is decoded a part at a time; at most 16 rows of x are compared."""
    x, y = x[:16].double(), y[:16]
    expected = torch.cat([x @ part.double().T for part in weight.split(1024)], 1)
    return float((y - expected).norm() / expected.norm())


def table(rows: list[Row]) -> str:
    """What was measured for each shape and cache: milliseconds (p10 - p90) by M, and what was not, with the reason."""
    parts = []
    measured = [row for row in rows if row["section"] == "linear" and "median_ms" in row]
    for n, k, cache in dict.fromkeys((row["n"], row["k"], row["cache"]) for row in measured):
        here = [row for row in measured if (row["n"], row["k"], row["cache"]) == (n, k, cache)]
        batches = sorted({row["m"] for row in here})
        lines = []
        for name in dict.fromkeys(row["candidate"] for row in here):
            of = {row["m"]: row for row in here if row["candidate"] == name}
            any_row = next(iter(of.values()))
            times = [_cell(of.get(m)) for m in batches]
            rate = timing.gigabytes_per_second(any_row["weight_bytes"], of[1]["median_ms"]) if 1 in of else None
            kernel = [row["kernel_error"] for row in of.values() if row["kernel_error"] is not None]
            lines.append(
                [
                    name,
                    any_row["weight_bytes"] / (n * k),
                    *times,
                    rate,
                    f"{max(kernel):.1e}" if kernel else "-",
                    f"{max(row['total_error'] for row in of.values()):.1e}",
                ]
            )
        heads = [
            "",
            "B/weight",
            *(f"M={m} ms (p10 - p90)" for m in batches),
            "GB/s, M=1",
            "kernel error",
            "total error",
        ]
        title = f"linear, N={n} K={k}, {cache}"
        for read in (row for row in rows if cache == "cold" and (row["section"], row["n"], row["k"]) == ("read", n, k)):
            rate = timing.gigabytes_per_second(read["bytes"], read["median_ms"])
            title += f"; adding up 0.5625 B/weight: {_cell(read)} ms, {rate:.1f} GB/s"
        parts.append(f"{title}\n\n{tabulate(lines, heads, floatfmt=('', '.3f', *('',) * len(batches), '.1f'))}")
    if codes := [row for row in rows if row["section"] == "codec" and "median_ms" in row]:
        lines = [
            (r["op"], r["candidate"], r["median_ms"], r["p10_ms"], r["p90_ms"], r["values"] / r["median_ms"] / 1e3)
            for r in codes
        ]
        heads = ["op", "", "median ms", "p10 ms", "p90 ms", "M values/s"]
        parts.append(tabulate(lines, heads, floatfmt=("", "", ".3f", ".3f", ".3f", ".0f")))
    if missing := dict.fromkeys((row["candidate"], row["reason"]) for row in rows if "reason" in row):
        parts.append("not measured\n\n" + tabulate(list(missing), ("", "reason")))
    return "\n\n".join(parts)


def _cell(row: Row | None) -> str:
    return "-" if row is None else f"{row['median_ms']:.3f} ({row['p10_ms']:.3f} - {row['p90_ms']:.3f})"


def standing(rows: list[Row]) -> str:
    """fp4fx beside the fastest peer of each cell: how many times faster each of its ways is, 1 is parity."""
    lines = []
    measured = [row for row in rows if row["section"] == "linear" and "median_ms" in row]
    for cell in dict.fromkeys((row["n"], row["k"], row["m"], row["cache"]) for row in measured):
        here = [row for row in measured if (row["n"], row["k"], row["m"], row["cache"]) == cell]
        others = [row for row in here if not row["ours"]]
        ours = [row for row in here if row["ours"]]
        if not others or not ours:
            continue
        best = min(others, key=lambda row: row["median_ms"])
        four_bit = min((row["median_ms"] for row in others if row["bits"] < 8), default=None)
        lines += [
            (
                f"{cell[0]}x{cell[1]}",
                cell[2],
                cell[3],
                row["candidate"],
                best["median_ms"] / row["median_ms"],
                best["candidate"],
                four_bit and four_bit / row["median_ms"],
            )
            for row in ours
        ]
    heads = ("N x K", "M", "cache", "", "times the speed of the best", "which is", "of the best with 4 bits")
    return str(tabulate(lines, heads, floatfmt=".2f"))


def main() -> None:
    """Measure, print the tables, write benchmarks/results/ops-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", metavar="NxK", default=[f"{n}x{k}" for n, k in SHAPES])
    parser.add_argument("--batches", nargs="*", type=int, metavar="M", default=BATCHES)
    parser.add_argument("--only", metavar="TEXT", nargs="*", help="candidates whose name has one of these in it")
    parser.add_argument("--tiers", action="store_true", help="fp4fx by every lower instruction set too")
    parser.add_argument("--no-codec", action="store_true", help="linear layers alone")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="one shape, M=1, 16, 256, five rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "ops-cpu.json", metavar="FILE")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.batches, args.rounds = ["4096x4096"], (1, 16, 256), 5
    where = {**bench.environment(), "versions": versions()}
    candidates = peers.linear_candidates(tiers=args.tiers)
    chosen = tuple(c for c in candidates if not args.only or any(text in c.name for text in args.only))
    rates = [_read_rate()]
    rows: list[Row] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:  # after every shape: all of them take long
        record = {"environment": where, "read_gb_per_s": rates, "rows": rows}
        args.out.write_text(json.dumps(record, indent=2) + "\n", "utf-8")

    for shape in tqdm(args.shapes, unit="shape", disable=None):
        n, k = map(int, shape.split("x"))
        rows += linear(n, k, tuple(args.batches), chosen, args.rounds)
        write()
    if not args.no_codec:
        rows += codec.measure(4096 if not args.quick else 2048, args.rounds)
    rates.append(_read_rate())
    write()
    print(f"{bench.headline(where)}\nmemory read rate {rates[0]:.1f} GB/s before, {rates[1]:.1f} GB/s after\n")
    print(f"{table(rows)}\n\n{standing(rows)}\n\nwritten to {args.out}")


def _read_rate() -> float:
    return timing.gigabytes_per_second(2**30, timing.read_rate().median)


if __name__ == "__main__":
    main()
