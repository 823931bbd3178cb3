"""What a GPU does with fp4fx: its tests, then linear layers, convolutions and models beside their peers.

Each section runs in a process of its own with a share of the time, and its rows are in the file as soon as they are
measured: one that hangs or dies costs the others nothing, and is a row with the reason. `--dry` runs all of it on the
CPU, kernels interpreted, in sizes of which the times say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fp4fx
from benchmarks import gpu_calls, gpu_models, gpu_timing, nets
from benchmarks.peers.base import reason
from fp4fx.bench import environment
from fp4fx.kernels.triton import tuning

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
PACKAGES = ("pytest", "timm", "torchvision", "torchao", "gemlite")
SHAPES = ((4096, 4096), (8192, 8192), (11008, 4096), (4096, 14336))
"""N and K."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SLOW_PEERS = ("torchao NVFP4", "gemlite INT4 g128", "gemlite MXFP4")
"""They compile or search for each M: measured at a few of one shape."""

SECONDS = {"tests": 90, "linear": 110, "conv": 60, "resnet50": 40, "unet_256": 40, "vit_large": 40, "decoder": 70}
"""What each section may take of 450; what one does not need goes to those after it."""
DRY_SECONDS = 3600.0

Row = dict[str, Any]


class Setting:
    """Where a section runs, and until when."""

    def __init__(self, *, dry: bool, seconds: float) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.end = time.perf_counter() + seconds
        self.rounds = 1 if dry else 15

    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()


# --- the sections ----------------------------------------------------------------------------------------------------


def tests(s: Setting) -> Iterator[Row]:
    """The tests of the Triton kernels, on the device."""
    if importlib.util.find_spec("pytest") is None:
        yield {"test": "all", "reason": "pytest is not installed"}
        return
    which = "tests/kernels/triton" + ("/test_tuning.py" if s.dry else "")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={log}", which]
        command += ["--ignore", "tests/kernels/triton/test_aot.py"]  # needs no GPU
        if importlib.util.find_spec("xdist") is not None and not s.dry:
            command += ["-n", str(min(8, os.cpu_count() or 1))]  # most of the time goes to compiling
        left = max(10.0, s.left() - 5)
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired as stopped:
            said = stopped.stdout or ""  # bytes, whatever was asked for, in some Pythons
            said = (said.decode("utf-8", "replace") if isinstance(said, bytes) else said).strip().splitlines() or [""]
            yield {"test": "all", "reason": f"not done after {left:.0f} s: {said[-1]}"[:200]}
            return
        if not log.exists():
            yield {"test": "all", "reason": (done.stdout + done.stderr).strip().splitlines()[-1][:200]}
            return
        suite = ET.parse(log).getroot().find("testsuite")  # written by the process above
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    yield {"test": which, **counts, "seconds": float(suite.get("time", 0))}
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            if (problem := case.find(kind)) is not None:
                words = (problem.get("message") or "").strip().splitlines() or [kind]
                yield {"test": f"{case.get('classname')}::{case.get('name')}", "reason": words[0][:200]}


def linear(s: Setting) -> Iterator[Row]:
    """Linear layers in bf16 beside cuBLAS and 4-bit peers, and what a copy reaches."""
    yield {"copy_gb_per_s": gpu_timing.copy_rate(s.device)}
    shapes, rows = (((32, 64),), (1, 20)) if s.dry else (SHAPES, ROWS)
    for n, k in shapes:
        for m in rows:
            known = {"n": n, "k": k, "m": m, "packed_bytes": gpu_calls.packed_bytes(n, k) + 2 * m * (n + k)}
            if s.left() < 3:
                yield {**known, "candidate": "all", "reason": "out of time"}
                continue
            ways = gpu_calls.linear_candidates(m, n, k, s.device)
            if (n, k) != shapes[0] or m not in (1, 16, 128):
                ways = {name: way for name, way in ways.items() if name not in SLOW_PEERS}
            measured = gpu_timing.compare(ways, s.device, s.rounds)
            for name, found in measured.items():
                row = {**known, "candidate": name, **found.row()}
                if name == gpu_calls.OURS and found.timing is not None:
                    row["error"] = gpu_calls.linear_error(m, n, k, s.device)
                yield row


def conv(s: Setting) -> Iterator[Row]:
    """Convolutions of resnet50, a UNet and convnext beside cuDNN bf16, batch 1."""
    for case in gpu_calls.TINY_CONVS if s.dry else gpu_calls.CONVS:
        known = {"net": case.net, "case": str(case), "times": case.times}
        if s.left() < 2:
            yield {**known, "candidate": "all", "reason": "out of time"}
            continue
        ways: dict[str, Callable[[], Sequence[gpu_timing.Call]]] = {
            gpu_calls.OURS: functools.partial(gpu_calls.conv, case, s.device),
            gpu_calls.CUDNN: functools.partial(gpu_calls.conv_library, case, s.device),
        }
        for name, found in gpu_timing.compare(ways, s.device, s.rounds).items():
            row = {**known, "candidate": name, **found.row()}
            if name == gpu_calls.OURS and found.timing is not None:
                row["error"] = gpu_calls.conv_error(case, s.device)
            yield row


def image_model(name: str, s: Setting) -> Iterator[Row]:
    """A model of images at batch 1, beside Inductor bf16."""
    names = {"vit_large": "vit_large_patch16_224"}
    side = 256 if name == "unet_256" else 224
    make: Callable[[], torch.nn.Module] = functools.partial(nets.create, names.get(name, name))
    if s.dry:
        side, make = 8, functools.partial(nets.double_conv, 3, 16)
    modes = {"Inductor bf16": None, "Inductor bf16, max-autotune": "max-autotune-no-cudagraphs"}
    if s.dry:
        modes = {"Inductor": None}
    torch.manual_seed(1)
    x = torch.randn(1, 3, side, side, device=s.device).to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
    policy = fp4fx.Policy(skip_first=0, skip_last=0) if s.dry else fp4fx.Policy()
    rounds = 5 if s.dry else 50
    for row in gpu_models.images(make, x, s.device, policy=policy, modes=modes, rounds=rounds, end=s.end - 15):
        yield {"model": name, **row}


def decoder(s: Setting) -> Iterator[Row]:
    """Tokens a second at batch 1."""
    shape = gpu_models.Shape(32, 64, 1, 4, 2, 48, 8) if s.dry else gpu_models.Shape()
    for row in gpu_models.tokens(shape, s.device, count=2 if s.dry else 64, end=s.end - 15):
        yield {"model": "decoder", **row}


SECTIONS: Mapping[str, Callable[[Setting], Iterator[Row]]] = {
    "tests": tests,
    "linear": linear,
    "conv": conv,
    "resnet50": functools.partial(image_model, "resnet50"),
    "unet_256": functools.partial(image_model, "unet_256"),
    "vit_large": functools.partial(image_model, "vit_large"),
    "decoder": decoder,
}


# --- each in its process ---------------------------------------------------------------------------------------------


def here(name: str, setting: Setting, out: Path) -> None:
    """Run a section in this process and append its rows to a file, one JSON a line."""
    with out.open("a", encoding="utf-8") as file:
        for row in _rows(name, setting):
            file.write(json.dumps(row) + "\n")
            file.flush()


def _rows(name: str, setting: Setting) -> Iterator[Row]:
    try:
        yield from SECTIONS[name](setting)
    except Exception as error:  # noqa: BLE001  (whatever ends a section is a row of it)
        yield {"section": name, "reason": reason(error)}


def apart(name: str, seconds: float, *, dry: bool) -> list[Row]:
    """The rows of a section that runs in a process of its own; one that is killed keeps what it has written."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--section", name, "--seconds", str(seconds)]
        command += ["--out", str(out), *(["--dry"] if dry else [])]
        why = None
        with log.open("w", encoding="utf-8") as words:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=_environ(dry), stdout=words, stderr=words, timeout=seconds + 5, check=False
                ).returncode
                if code:
                    why = f"its process ended with {code}: {_last_line(log)}"
            except subprocess.TimeoutExpired:
                why = f"killed after {seconds + 5:.0f} s"
        lines = out.read_text("utf-8").splitlines() if out.exists() else []
        rows: list[Row] = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the last one, if it was cut off
                rows.append(json.loads(line))
        return rows + ([{"section": name, "reason": why}] if why else [])


def _environ(dry: bool) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else environ


def _last_line(log: Path) -> str:
    return (log.read_text("utf-8", errors="replace").strip().splitlines() or [""])[-1][:200]


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(name: str, rows: Sequence[Row]) -> str:
    """A section's rows for a terminal, what was not measured below them."""
    measured = [row for row in rows if "median_ms" in row]
    if name == "linear":
        text = _linear_table(rows)
    elif name == "conv":
        text = _conv_table(measured)
    elif name == "tests":
        text = str(tabulate([row for row in rows if "tests" in row], headers="keys"))
    else:
        columns = (
            "candidate",
            "median_ms",
            "graph_ms",
            "tokens_per_s",
            "error",
            "first_call_s",
            "weight_bytes",
            "call_bytes",
        )
        shown = [c for c in columns if any(c in row for row in measured)]
        text = str(tabulate([[row.get(c) for c in shown] for row in measured], shown, floatfmt=".4g"))
    missing = [
        (" ".join(str(v) for k, v in row.items() if k not in ("reason", "packed_bytes", "times")), row["reason"])
        for row in rows
        if "reason" in row
    ]
    if missing:
        text += "\n\nnot there\n\n" + str(tabulate(missing, ("", "reason")))
    return text


def _linear_table(rows: Sequence[Row]) -> str:
    """Microseconds by candidate; how much faster than cuBLAS; the packed bytes a second as a share of a copy's."""
    rate = next((row["copy_gb_per_s"] for row in rows if "copy_gb_per_s" in row), 0.0)
    names = list(dict.fromkeys(row["candidate"] for row in rows if "median_ms" in row))
    lines = []
    for n, k, m in dict.fromkeys((row["n"], row["k"], row["m"]) for row in rows if "median_ms" in row):
        cells = {row["candidate"]: row for row in rows if (row.get("n"), row.get("k"), row.get("m")) == (n, k, m)}
        times = {name: cells.get(name, {}).get("median_ms") for name in names}
        ours, dense = times.get(gpu_calls.OURS), times.get(gpu_calls.CUBLAS)
        share = ours and rate and 100 * cells[gpu_calls.OURS]["packed_bytes"] / ours / 1e6 / rate
        error = cells.get(gpu_calls.OURS, {}).get("error")
        lines.append(
            [f"{n}x{k}", m, *(t and t * 1e3 for t in times.values()), ours and dense and dense / ours, share, error]
        )
    heads = ("N x K", "M", *(f"{name} µs" for name in names), "x cuBLAS", "% of copy", "error")
    text = str(tabulate(lines, heads, floatfmt=".3g"))
    return f"{text}\n\na copy reads and writes {rate:.0f} GB/s"


def _conv_table(rows: Sequence[Row]) -> str:
    """Microseconds, and the sums over a network with every convolution as often as it is there."""
    times = {(row["net"], row["case"], row["candidate"]): row for row in rows}
    lines, sums = [], {}
    for net, case in dict.fromkeys((row["net"], row["case"]) for row in rows):
        ours, dense = (times.get((net, case, name)) for name in (gpu_calls.OURS, gpu_calls.CUDNN))
        if ours is None or dense is None:
            continue
        total = sums.setdefault(net, [0.0, 0.0])
        for i, row in enumerate((ours, dense)):
            total[i] += row["times"] * row["median_ms"]
        ratio = dense["median_ms"] / ours["median_ms"]
        lines.append(
            (net, case, ours["times"], ours["median_ms"] * 1e3, dense["median_ms"] * 1e3, ratio, ours.get("error"))
        )
    for net, (ours_ms, dense_ms) in sums.items():
        lines.append((net, "all of them", None, ours_ms * 1e3, dense_ms * 1e3, dense_ms / ours_ms, None))
    return str(tabulate(lines, ("net", "", "times", "fp4fx µs", "cuDNN µs", "x cuDNN", "error"), floatfmt=".3g"))


# --- the command -----------------------------------------------------------------------------------------------------


def missing_packages() -> list[Row]:
    """One row per package that is not installed."""
    return [{"package": name, "reason": "not installed"} for name in PACKAGES if importlib.util.find_spec(name) is None]


def facts(device: torch.device) -> Row:
    """Where and when."""
    found: Row = {**environment(device), "note": tuning.note(device)}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {"sms": p.multi_processor_count, "l2_bytes": p.L2_cache_size, "memory_bytes": p.total_memory}
        found |= {"capability": f"sm_{p.major}{p.minor}", "cuda": torch.version.cuda}
    return found


def write(path: Path, result: Mapping[str, Any]) -> None:
    """At once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print their tables, write the file after each; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"default: {' '.join(SECTIONS)}")
    parser.add_argument(
        "--seconds", type=float, help=f"for all of it; default: {sum(SECONDS.values())}, dry as it takes"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_<device>_<date>.json")
    parser.add_argument("--dry", action="store_true", help="on the CPU, in toy sizes")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.section:
        here(given.section, Setting(dry=given.dry, seconds=given.seconds), given.out)
        return 0
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    if not given.dry and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device; --dry runs everything on the CPU in toy sizes")
        return 2
    start = time.perf_counter()
    total = given.seconds or (DRY_SECONDS if given.dry else float(sum(SECONDS.values())))
    where = facts(torch.device("cpu" if given.dry else "cuda"))
    name = re.sub(r"[^A-Za-z0-9]+", "-", where["device"]).strip("-").lower()
    out = given.out or RESULTS / f"gpu_{name}_{where['date'][:10]}.json"
    result: dict[str, Any] = {"environment": where, "dry": given.dry, "missing": missing_packages(), "sections": {}}
    todo = given.sections or list(SECTIONS)
    for number, section in enumerate(todo):
        left = total - (time.perf_counter() - start)
        later = sum(SECONDS[name] for name in todo[number + 1 :]) * total / sum(SECONDS[name] for name in todo)
        seconds = left - later
        began = time.perf_counter()
        rows = (
            apart(section, seconds, dry=given.dry) if seconds > 10 else [{"section": section, "reason": "out of time"}]
        )
        result["sections"][section] = {"seconds": time.perf_counter() - began, "rows": rows}
        write(out, result)
        print(f"\n== {section}, {time.perf_counter() - began:.0f} s\n\n{tables(section, rows)}", flush=True)
    if result["missing"]:
        print("\n" + str(tabulate(result["missing"], headers="keys")))
    failed = [row for row in result["sections"].get("tests", {"rows": []})["rows"] if "reason" in row]
    print(f"\n{where['device']}, {time.perf_counter() - start:.0f} s: {out}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
