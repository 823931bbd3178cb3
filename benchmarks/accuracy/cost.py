"""What quantizing a model takes: seconds and peak memory, in a process of its own."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import fp4fx
from benchmarks.accuracy import data
from benchmarks.accuracy.measure import Row
from fp4fx import Policy

MODEL = "vit_base_patch16_224"
IMAGES = 128
JOBS = {"search": 6.0, "gptq": 600.0}
"""What is done, and the seconds that it may take on two cores."""


def costs(model: str = MODEL, images: int = IMAGES) -> list[Row]:
    """A row for every job, each measured in a fresh process."""
    return [_apart(job, model, images) for job in JOBS]


def _apart(job: str, model: str, images: int) -> Row:
    what = {"search": "quantizing with search", "gptq": f"GPTQ on {images} images"}[job]
    row: Row = {"job": job, "what": what, "model": model, "limit_s": JOBS[job], "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "benchmarks.accuracy.cost", job, "--model", model, "--images", str(images)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {**row, "reason": (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1][:200]}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


def measure(job: str, name: str, images: int) -> Row:
    """Seconds of a job, and the most memory on top of what the process had before the model was made.

    That includes the model itself and the images that it is calibrated on, not what those were cut out of.
    """
    torch.manual_seed(0)
    small = timm.create_model("test_vit").eval()
    _run(job, small, _photographs(8, small.pretrained_cfg["input_size"][-1]))  # imports and first calls
    side = timm.get_pretrained_cfg(name).input_size[-1]
    batches = _photographs(images, side) if job == "gptq" else []
    before = _resident() - sum(batch.nbytes for batch in batches)
    model = timm.create_model(name).eval().requires_grad_(False)
    start = perf_counter()
    _run(job, model, batches)
    seconds = perf_counter() - start
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return {"seconds": seconds, "peak": taken / size, "peak_bytes": taken, "model_bytes": size}


def _run(job: str, model: nn.Module, batches: list[Tensor]) -> None:
    packed = fp4fx.quantize(model, Policy.weight_only(scale_rule="search"))
    if job == "gptq":
        fp4fx.calibrate(packed, batches, reference=model, methods=["gptq"])


def _photographs(count: int, side: int) -> list[Tensor]:
    """Batches of 8 composites, fp32 [8, 3, side, side]."""
    small = data.scenes("test").inputs[:count]
    return [interpolate(part, (side, side), mode="bilinear") for part in small.split(8)]


def _resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Measure one job, print its row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=list(JOBS))
    parser.add_argument("--model", default=MODEL, metavar="NAME", help="a vision model of timm")
    parser.add_argument("--images", type=int, default=IMAGES)
    args = parser.parse_args()
    print(json.dumps(measure(args.job, args.model, args.images)))


if __name__ == "__main__":
    main()
