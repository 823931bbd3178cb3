"""What compiling costs: the first call under fp4fx and under Inductor, with empty caches and with full ones.

Every model runs in a process of its own, where the backends alternate; the first of the rounds is not measured, since
imports happen in it. Weights are random, in bf16.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from tqdm import tqdm

import fp4fx
from benchmarks import nets, record
from fp4fx import bench

RESULT = Path(__file__).parent / "results" / "compile-cpu.json"
MODELS = (*nets.VISION, "llama_6x2048")

Row = dict[str, Any]


class Seconds(logging.Handler):
    """Within a `with`, adds up what the backend's log says its passes took."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.total = 0.0
        self.logger = logging.getLogger("fp4fx.backend")

    def emit(self, record: logging.LogRecord) -> None:
        """The last argument of the message is the time."""
        assert isinstance(record.args, tuple)
        self.total += float(str(record.args[-1]))

    def __enter__(self) -> None:
        self.before = self.logger.level
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.before)


def measure(name: str, rounds: int) -> list[Row]:
    """Rows of one model: seconds of the first call, and of it those of the passes."""
    model = nets.create(name).to(torch.bfloat16)
    inputs = tuple(x.to(torch.bfloat16) for x in nets.inputs(name, 1))
    ways: dict[str, tuple[nn.Module, str]] = {
        "Inductor": (copy.deepcopy(model), "inductor"),
        "fp4fx": (fp4fx.quantize(model, example_inputs=inputs), "fp4fx"),
    }
    taken: dict[tuple[str, str], list[Row]] = {}
    for number in range(-1, rounds):
        for way, (module, backend) in ways.items():
            with fresh_cache():
                for caches in ("empty", "full"):
                    row = _first_call(module, backend, inputs)
                    if number >= 0:
                        taken.setdefault((way, caches), []).append(row)
    return [
        {
            "model": name,
            "backend": way,
            "caches": caches,
            "seconds": statistics.median(row["seconds"] for row in rows),
            "least": min(row["seconds"] for row in rows),
            "passes": statistics.median(row["passes"] for row in rows),
            "cache_hits": rows[-1]["cache_hits"],
            "graphs": rows[-1]["graphs"],
            "rounds": len(rows),
        }
        for (way, caches), rows in taken.items()
    ]


def _first_call(module: nn.Module, backend: str, inputs: tuple[torch.Tensor, ...]) -> Row:
    torch._dynamo.reset()
    counters.clear()
    log = Seconds()
    compiled: Callable[..., Any] = torch.compile(module, backend=backend)
    with torch.no_grad(), log:
        start = perf_counter()
        compiled(*inputs)
        seconds = perf_counter() - start
    return {
        "seconds": seconds,
        "passes": log.total,
        "cache_hits": counters["inductor"]["fxgraph_cache_hit"],
        "graphs": counters["stats"]["unique_graphs"],
    }


def table(rows: list[Row]) -> str:
    """Seconds of each model, and fp4fx's beside Inductor's."""
    found = {(row["model"], row["backend"], row["caches"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        cold, theirs = found[name, "fp4fx", "empty"], found[name, "Inductor", "empty"]
        warm, also = found[name, "fp4fx", "full"], found[name, "Inductor", "full"]
        ratio = cold["seconds"] / theirs["seconds"]
        hits = f"{warm['cache_hits']} of {warm['graphs']}"
        lines.append(
            (name, theirs["seconds"], cold["seconds"], ratio, cold["passes"], also["seconds"], warm["seconds"], hits)
        )
    heads = ("model", "Inductor", "fp4fx", "ratio", "its passes", "Inductor, full", "fp4fx, full", "graphs found")
    return str(tabulate(lines, heads, floatfmt=".2f"))


def main() -> None:
    """Measure, print the table, write benchmarks/results/compile-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="measure MODEL in this process and print its rows")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument("--update", action="store_true", help="keep FILE's rows of other models")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.models[0], args.rounds)))
        return
    chosen, where = args.models or MODELS, bench.environment()
    rows = record.earlier(args.out, where) if args.update else []
    for name in tqdm(chosen, unit="model", disable=None):
        command = [sys.executable, "-m", "benchmarks.compiling", name, "--here", "--rounds", str(args.rounds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        new = json.loads(done.stdout.splitlines()[-1])
        rows = record.update(rows, new, ("model",), MODELS, bench.environment()["date"])
        record.write(args.out, where, rows)
    print(f"{bench.headline(where)}\n\nseconds of the first call\n\n{table(rows)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
