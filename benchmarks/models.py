"""Latency and bytes of whole models, batch 1: eager, Inductor and fp4fx, in fp32 and bf16. `make bench` runs it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

import fp4fx
from fp4fx import bench
from fp4fx.models import create, input_shape

RESULTS = Path(__file__).parent / "results"
MODELS = ("timm:resnet50", "timm:mobilenetv3_large_100", "timm:vit_small_patch16_224")


def measure(source: str, rounds: int) -> list[dict[str, object]]:
    """Rows of one model with random weights, which cost what trained ones cost."""
    torch.compiler.reset()  # compiled code of the model before would be asked first at every call
    torch.manual_seed(0)
    model = create(source, pretrained=False)
    shape = input_shape(source, model)
    if shape is None:
        raise fp4fx.Error(f"{source}: expected a timm or torchvision model, whose input shape is known")
    inputs = (torch.randn(shape),)
    packed = fp4fx.quantize(model, example_inputs=inputs)
    rows = bench.compare(bench.candidates(model, packed, inputs), rounds)
    return [{"model": source, "batch": shape[0], **row.to_dict()} for row in rows]


def main() -> None:
    """Measure, print the table, write benchmarks/results/models-<device type>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "models-cpu.json", metavar="FILE")
    args = parser.parse_args()
    where = bench.environment()
    rows = [row for source in tqdm(args.models, unit="model", disable=None) for row in measure(source, args.rounds)]
    columns = ("model", "candidate", "median_ms", "p10_ms", "p90_ms", "first_call_s", "weight_bytes")
    print(f"{bench.headline(where)}\n")
    print(tabulate([[row[c] for c in columns] for row in rows], columns, floatfmt=".1f"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"environment": where, "rows": rows}, indent=2) + "\n", "utf-8")
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
