"""Latency, bytes and error of whole models: torch eager, Inductor, fp4fx, OpenVINO.

Every model runs in a process of its own, where the candidates alternate in blocks of some calls; weights are random,
which cost what trained ones cost. A candidate that cannot be measured is a row with its reason.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fp4fx
from benchmarks import nets, record
from benchmarks.peers import reason
from benchmarks.timing import blocks
from benchmarks.versions import versions
from fp4fx import bench
from fp4fx.bench import Call
from fp4fx.policy import Compute

RESULTS = Path(__file__).parent / "results"
MODELS = (*nets.VISION, "llama_6x2048")
QUICK = ("resnet50", "llama_6x2048")

Row = dict[str, Any]
Way = tuple[Call, int]
"""What to call, and the bytes of its parameters and buffers."""


class Ways:
    """The candidates of one model: each method makes one."""

    def __init__(self, name: str, batch: int) -> None:
        self.name = name
        self.model = nets.create(name)
        self.inputs = nets.inputs(name, batch)
        whole = name in nets.OWN and name not in nets.VISION  # without embedding and head there is no first and last
        self.policy = fp4fx.Policy(skip_first=0, skip_last=0) if whole else fp4fx.Policy()
        self.exact: dict[str, Call] = {}
        """What the quantized model of a candidate gives when it is computed in fp64, to be called once."""

    def all(self) -> dict[str, Callable[[], Way]]:
        """By name; the first is the reference of the errors."""
        fp32, bf16 = torch.float32, torch.bfloat16
        return {
            "torch fp32": lambda: self._torch(self.model, fp32, freezing=False, compiled=False),
            "Inductor fp32": lambda: self._torch(copy.deepcopy(self.model), fp32, freezing=True),
            "Inductor bf16": lambda: self._torch(copy.deepcopy(self.model), bf16, freezing=True),
            **{
                name: functools.partial(self._fp4fx, name, dtype, freezing="freezing" in name, compute=compute)
                for name, dtype, compute in (
                    ("fp4fx fp32", fp32, "bf16"),
                    ("fp4fx fp32, between fp32", fp32, "bf16_operands"),
                    ("fp4fx bf16", bf16, "bf16"),
                    ("fp4fx bf16, freezing", bf16, "bf16"),
                    ("fp4fx bf16, int8 compute", bf16, "int8"),
                )
            },
            "OpenVINO bf16": lambda: self._openvino(int8=False),
            "OpenVINO INT8": lambda: self._openvino(int8=True),
        }

    def _torch(self, model: nn.Module, dtype: torch.dtype, *, compiled: bool = True, freezing: bool) -> Way:
        """Compiled ones are in channels_last, which Inductor is fastest on."""
        model = model.to(dtype)
        if not compiled:
            return _call(model, self.inputs), _bytes(model)
        model = model.to(memory_format=torch.channels_last)
        call = _call(torch.compile(model, dynamic=False), self._images(dtype))
        return bench.frozen(call) if freezing else call, _bytes(model)

    def _fp4fx(self, name: str, dtype: torch.dtype, *, freezing: bool, compute: Compute) -> Way:
        inputs = self._images(dtype)
        policy = replace(self.policy, compute=compute)
        packed = fp4fx.quantize(copy.deepcopy(self.model).to(dtype), policy, example_inputs=inputs)
        self.exact[name] = lambda: copy.deepcopy(packed).double()(*(x.double() for x in inputs))
        call = _call(torch.compile(packed, backend="fp4fx", dynamic=False), inputs)
        return bench.frozen(call) if freezing else call, _bytes(packed)

    def _openvino(self, *, int8: bool) -> Way:
        import nncf  # noqa: PLC0415  (a package that is missing is a row)
        import openvino  # noqa: PLC0415

        from benchmarks.peers.openvino import CORE, settings  # noqa: PLC0415

        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):  # tables and bars
            model = openvino.convert_model(copy.deepcopy(self.model), example_input=self.inputs)
            model.reshape({port: list(x.shape) for port, x in zip(model.inputs, self.inputs, strict=True)})
            if int8:  # calibrated on the input that is measured, so its error is at its best
                images = nncf.Dataset([self.inputs], lambda given: [x.numpy() for x in given])
                kind = nncf.ModelType.TRANSFORMER if self.name.startswith(("vit", "llama", "convnext")) else None
                model = nncf.quantize(model, images, subset_size=1, model_type=kind)
        request = CORE.compile_model(model, "CPU", settings()).create_infer_request()
        for index, x in enumerate(self.inputs):
            request.set_input_tensor(index, openvino.Tensor(x.numpy(), shared_memory=True))
        constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
        stored = sum(op.get_byte_size() // (2 if op.get_element_type() == openvino.Type.f32 else 1) for op in constants)

        def call() -> Tensor:
            request.infer()
            return torch.from_numpy(request.get_output_tensor(0).data)

        return call, stored

    def _images(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        last = torch.channels_last
        return tuple(x.to(dtype).to(memory_format=last) if x.dim() == 4 else x.to(dtype) for x in self.inputs)


def _call(module: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return module(*inputs)

    return call


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def measure(name: str, batch: int, rounds: int, only: list[str] | None) -> list[Row]:
    """Rows of one model at one batch size, all candidates in this process."""
    ways = Ways(name, batch)
    known = {"model": name, "batch": batch}
    rows: list[Row] = []
    calls: dict[str, Call] = {}
    facts: dict[str, Row] = {}
    with torch.no_grad():
        expected = ways.model(*ways.inputs).double()
    for candidate, make in tqdm(ways.all().items(), desc=f"{name} b{batch}", disable=None, leave=False):
        if only and not any(text in candidate for text in only):
            continue
        start = perf_counter()
        try:
            call, weights = make()
            y = call()
            first = perf_counter() - start
            errors = {"error": _error(y, expected)}
            if candidate in ways.exact and batch == 1:  # fp64 takes its time
                with torch.no_grad():
                    errors["kernel_error"] = _error(y, ways.exact.pop(candidate)())
        except Exception as error:  # noqa: BLE001  (whatever a peer raises is the reason of its row)
            rows.append({**known, "candidate": candidate, "reason": reason(error)})
            continue
        calls[candidate] = call
        facts[candidate] = {"candidate": candidate, "first_call_s": first, "weight_bytes": weights, **errors}
    for candidate, took in blocks(calls, rounds, seconds=0.1).items():
        times = asdict(took)
        count = times.pop("rounds")
        rows.append({**known, **facts[candidate], "rounds": count, **{f"{k}_ms": v for k, v in times.items()}})
    return rows


def apart(name: str, batch: int, rounds: int, only: list[str] | None) -> list[Row]:
    """`measure` in a process of its own; one that dies is a row with its last words."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.models", name, "--here", str(batch), "--rounds", str(rounds)]
        command += ["--out", str(out), *(["--only", *only] if only else [])]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            return list(json.loads(out.read_text("utf-8")))
        words = done.stderr.strip().splitlines()[-1:] or [""]
        why = f"its process ended with {done.returncode}: {words[0]}"[:200]
        return [{"model": name, "batch": batch, "candidate": "all", "reason": why}]


def table(rows: list[Row]) -> str:
    """Milliseconds for each model and batch size, and what was not measured, with the reason."""
    lines = []
    for row in rows:
        if "median_ms" not in row:
            continue
        here = [r for r in rows if (r["model"], r["batch"]) == (row["model"], row["batch"])]
        bf16 = next((r["median_ms"] for r in here if r["candidate"] == "Inductor bf16" and "median_ms" in r), None)
        spread = f"{row['p10_ms']:.1f} - {row['p90_ms']:.1f}"
        faster = bf16 and bf16 / row["median_ms"]
        lines.append(
            (
                row["model"],
                row["batch"],
                row["candidate"],
                row["median_ms"],
                spread,
                faster,
                row["weight_bytes"] / 1e6,
                row["error"],
                row.get("kernel_error"),
                row["first_call_s"],
            )
        )
    heads = (
        "model",
        "batch",
        "",
        "median ms",
        "p10 - p90 ms",
        "x Inductor bf16",
        "weights MB",
        "error",
        "kernel's own",
        "first call s",
    )
    text = str(tabulate(lines, heads, floatfmt=("", "", "", ".2f", "", ".2f", ".1f", ".4f", ".4f", ".1f")))
    missing = [(row["model"], row["batch"], row["candidate"], row["reason"]) for row in rows if "reason" in row]
    if missing:
        text += "\n\nnot measured\n\n" + str(tabulate(missing, ("model", "batch", "", "reason")))
    return text


def main() -> None:
    """Measure, print the table, write benchmarks/results/models-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--batches", nargs="*", type=int, metavar="B", help="default: 1 8, the decoder 1")
    parser.add_argument("--only", metavar="TEXT", nargs="*", help="candidates whose name has one of these in it")
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each candidate")
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK)}, batch 1, three rounds")
    parser.add_argument("--here", type=int, metavar="B", help="measure MODEL at this batch size in this process")
    parser.add_argument("--out", type=Path, default=RESULTS / "models-cpu.json", metavar="FILE")
    parser.add_argument("--update", action="store_true", help="keep FILE's rows of other models and batch sizes")
    args = parser.parse_args()
    if args.here is not None:
        rows = measure(args.models[0], args.here, args.rounds, args.only)
        args.out.write_text(json.dumps(rows), "utf-8")
        return
    if args.quick:
        args.models, args.batches, args.rounds = args.models or QUICK, args.batches or [1], 3
    where = {**bench.environment(), "versions": versions()}
    work = [(name, batch) for name in args.models or MODELS for batch in args.batches or nets.batches(name)]
    rows = record.earlier(args.out, where) if args.update else []
    for name, batch in tqdm(work, unit="model", disable=None):
        new = apart(name, batch, args.rounds, args.only)
        rows = record.update(rows, new, ("model", "batch"), MODELS, bench.environment()["date"])
        record.write(args.out, where, rows)
    print(f"{bench.headline(where)}\n\n{table(rows)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
