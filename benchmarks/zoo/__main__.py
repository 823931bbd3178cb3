"""Trace, quantize and run every model of timm and torchvision and small ones of transformers; compile one per family.

Each model runs in a process of its own, with a limit of time and memory. The result is a JSON of all rows and a table,
`docs/zoo.md`; a run goes on where that, or an interrupted run in `build/zoo`, has no row yet. `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from time import strftime
from typing import Any

from tqdm import tqdm

from benchmarks.zoo.catalog import Entry, entries

ROOT = Path(__file__).resolve().parents[2]
DONE = ROOT / "build" / "zoo" / "rows.jsonl"
SECONDS = {"quantize": 300, "compile": 1200}
PRELOAD = ["torch", "torchvision", "timm", "fp4fx", "benchmarks.zoo.check", "benchmarks.zoo.language"]

Row = dict[str, Any]


def apart(step: str, entry: Entry, args: argparse.Namespace) -> Row:
    """The row of one step of one model."""
    from benchmarks.zoo.check import work  # noqa: PLC0415  (after --help)

    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(step, entry, args.gigabytes, args.largest, sender))
    process.start()
    sender.close()
    seconds = args.seconds or SECONDS[step]
    known = {"source": entry.source, "family": entry.family, "step": step}
    try:
        if not receiver.poll(seconds):
            return {**known, "error": f"not done after {seconds} s"}
        return dict(receiver.recv())
    except EOFError:
        process.join()
        return {**known, "error": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def all_rows(step: str, wanted: list[Entry], args: argparse.Namespace) -> Iterable[Row]:
    """Rows as they come, `--jobs` at a time."""
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(apart, step, entry, args) for entry in wanted]
        try:
            for done in tqdm(as_completed(waiting), total=len(waiting), desc=step, unit="model", disable=None):
                yield done.result()
        finally:
            for future in waiting:
                future.cancel()


def representatives(chosen: list[Entry], rows: dict[tuple[str, str], Row]) -> list[Entry]:
    """Of each family the model that was compiled, or else the smallest among those that ran."""
    smallest: dict[str, tuple[int, Entry]] = {}
    for entry in chosen:
        if ("compile", entry.source) in rows:
            smallest[entry.family] = -1, entry
        row = rows.get(("quantize", entry.source), {})
        size = row.get("parameters", 1 << 62) if row.get("eager") == "ran" else 1 << 62
        if entry.family not in smallest or size < smallest[entry.family][0]:
            smallest[entry.family] = size, entry
    return [entry for _, entry in smallest.values()]


def places(known: list[Entry]) -> dict[Entry, int]:
    """The place of every model within its family: in this order an interrupted run has seen all families first."""
    seen = Counter[str]()
    return {entry: seen.update([entry.family]) or seen[entry.family] for entry in known}


def earlier(result: Path) -> list[Row]:
    """The rows of a result, and over them those of an interrupted run."""
    rows = json.loads(result.read_text("utf-8"))["rows"] if result.exists() else []
    lines = DONE.read_text("utf-8").splitlines() if DONE.exists() else []
    return [*rows, *map(json.loads, lines)]


def sampled(found: list[Entry], count: int | None) -> list[Entry]:
    """Every n-th model, the first and the last among them; all if no count is given."""
    if count is None or count >= len(found):
        return found
    return [found[round(index * (len(found) - 1) / max(count - 1, 1))] for index in range(count)]


def main() -> None:
    """Do what is not done yet, write the result."""
    from benchmarks.zoo import table  # noqa: PLC0415
    from fp4fx import bench  # noqa: PLC0415

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="*", choices=("quantize", "compile"), default=("quantize", "compile"))
    parser.add_argument(
        "--only", nargs="*", metavar="TEXT", help="models whose source or family has one of these in it"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="N models, spread over the list")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time, one thread each")
    parser.add_argument("--seconds", type=int, help=f"limit for one model; by default {SECONDS}")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="limit of memory for one model")
    parser.add_argument(
        "--largest", type=int, default=300_000_000, help="parameters above which a model is only planned"
    )
    parser.add_argument("--again", action="store_true", help="do again what failed")
    parser.add_argument("--fresh", action="store_true", help="forget what was done")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "zoo.json", metavar="FILE")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "zoo.md", metavar="FILE")
    args = parser.parse_args()
    multiprocessing.set_forkserver_preload(PRELOAD)
    known = entries()
    chosen = [e for e in known if not args.only or any(t in e.source or t in e.family for t in args.only)]
    chosen = sampled(chosen, args.sample)
    DONE.parent.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        DONE.unlink(missing_ok=True)
    rows = {} if args.fresh else {(row["step"], row["source"]): row for row in earlier(args.out)}
    for step in args.steps:
        wanted = chosen if step == "quantize" else representatives(chosen, rows)
        todo = [
            e for e in wanted if (row := rows.get((step, e.source))) is None or (args.again and table.failures(row))
        ]
        todo.sort(key=places(known).__getitem__)
        with DONE.open("a", encoding="utf-8") as file:
            for row in all_rows(step, todo, args):
                row["date"] = strftime("%Y-%m-%d")
                rows[row["step"], row["source"]] = row
                file.write(json.dumps(row) + "\n")
                file.flush()
                for why in table.failures(row):
                    tqdm.write(f"{row['source']}: {why}")
    order = {entry.source: place for place, entry in enumerate(known)}
    kept = sorted((r for r in rows.values() if r["source"] in order), key=lambda r: (r["step"], order[r["source"]]))
    where = {**bench.environment(), "threads": 1}
    record = {"environment": where, "packages": table.packages(), "date": strftime("%Y-%m-%d")}
    lines = ",\n".join(json.dumps(row, sort_keys=False) for row in kept)
    head = json.dumps(record, indent=1)[:-2]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(f'{head},\n "models": {len(known)},\n "rows": [\n{lines}\n]}}\n', "utf-8")
    args.table.parent.mkdir(parents=True, exist_ok=True)
    args.table.write_text(table.page(json.loads(args.out.read_text("utf-8"))), "utf-8")
    print(table.summary(kept, len(known)))
    print(f"written to {args.out} and {args.table}")


if __name__ == "__main__":
    main()
