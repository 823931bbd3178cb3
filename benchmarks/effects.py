"""What each pass gains: the latency of whole models without it, beside that with all passes.

The candidates of one model alternate in blocks within one process. Only passes without which a graph still computes the
same are left out, one at a time. Weights are random.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import fp4fx
from benchmarks import nets, record
from benchmarks.timing import blocks
from fp4fx import bench

RESULT = Path(__file__).parent / "results" / "passes-cpu.json"

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model in one format, and the passes that are left out of it in turn."""

    model: str
    dtype: torch.dtype
    policy: fp4fx.Policy
    passes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Model, dtype and format."""
        bits = "W4A4" if self.policy.activations else "W4A16"
        return f"{self.model}, {str(self.dtype).removeprefix('torch.')}, {bits}"


FP32, BF16 = torch.float32, torch.bfloat16
IMAGES = ("fuse_epilogue", "fold_norms", "channels_last", "fuse_dense", "fold_parameters")
CASES = (
    Case("resnet50", BF16, fp4fx.Policy(), IMAGES),
    Case("mobilenetv3_large_100", BF16, fp4fx.Policy(), IMAGES),
    Case("convnext_tiny", BF16, fp4fx.Policy(), ("fuse_epilogue", "channels_last", "fuse_dense")),
    Case("unet_256", BF16, fp4fx.Policy(), IMAGES),
    Case("resnet50", FP32, fp4fx.Policy(), ("narrow",)),
    Case("vit_base_patch16_224", FP32, fp4fx.Policy(), ("narrow",)),
    Case("vit_base_patch16_224", BF16, fp4fx.Policy(), ("fuse_epilogue", "open_attention")),
    Case("llama_6x2048", BF16, fp4fx.Policy(skip_first=0, skip_last=0), ("fuse_epilogue",)),
    Case("llama_6x2048", BF16, fp4fx.Policy.w4a4(skip_first=0, skip_last=0), ("merge_qdq",)),
    Case("vit_base_patch16_224", BF16, fp4fx.Policy.w4a4(), ("merge_qdq",)),
)


def measure(case: Case, rounds: int) -> list[Row]:
    """Rows of one case: all passes, then without each of them."""
    model = nets.create(case.model).to(case.dtype)
    inputs = tuple(x.to(case.dtype) for x in nets.inputs(case.model, 1))
    calls: dict[str, Callable[[], Any]] = {}
    results: dict[str, Any] = {}
    packed = fp4fx.quantize(model, case.policy, example_inputs=inputs)
    for left_out in ("", *case.passes):
        torch._dynamo.reset()
        options = {"disabled_passes": f"fp4fx_{left_out}"} if left_out else {}
        compiled = torch.compile(copy.deepcopy(packed), backend="fp4fx", dynamic=False, options=options)

        def call(compiled: Callable[..., Any] = compiled) -> Any:
            with torch.no_grad():
                return compiled(*inputs)

        results[left_out] = call().double()
        calls[left_out] = call
    took = blocks(calls, rounds, seconds=0.1)
    expected = results[""]
    return [
        {
            "case": case.name,
            "without": left_out or None,
            "median_ms": timing.median,
            "p10_ms": timing.p10,
            "p90_ms": timing.p90,
            "rounds": timing.rounds,
            "gain": timing.median / took[""].median,
            "difference": float((results[left_out] - expected).norm() / expected.norm()),
        }
        for left_out, timing in took.items()
    ]


def table(rows: list[Row]) -> str:
    """Milliseconds with all passes and without each, and the factor between them."""
    lines = [
        (row["case"], f"without {row['without']}" if row["without"] else "all passes", row["median_ms"],
         f"{row['p10_ms']:.1f} - {row['p90_ms']:.1f}", row["gain"] if row["without"] else None, row["difference"])
        for row in rows
    ]  # fmt: skip
    heads = ("", "", "median ms", "p10 - p90 ms", "pass gains", "difference")
    return str(tabulate(lines, heads, floatfmt=("", "", ".2f", "", ".2f", ".1e")))


def main() -> None:
    """Measure, print the table, write benchmarks/results/passes-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="TEXT", help="cases whose name has one of these in it")
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each candidate")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument("--update", action="store_true", help="keep FILE's rows of other cases")
    args = parser.parse_args()
    chosen = [case for case in CASES if not args.models or any(text in case.name for text in args.models)]
    names, where = [case.name for case in CASES], bench.environment()
    rows = record.earlier(args.out, where) if args.update else []
    for case in tqdm(chosen, unit="case", disable=None):
        rows = record.update(rows, measure(case, args.rounds), ("case",), names, bench.environment()["date"])
        record.write(args.out, where, rows)
    print(f"{bench.headline(where)}\n\n{table(rows)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
