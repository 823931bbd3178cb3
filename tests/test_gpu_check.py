"""The script for machines with a GPU, on one without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_calls, gpu_check, gpu_timing

SECTIONS = ["tests", "linear", "conv", "resnet50", "decoder"]
SCRIPT = Path(gpu_check.__file__).with_suffix(".sh")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """What a dry run printed and wrote; the models of images are one in it, so it is run once."""
    out = tmp_path_factory.mktemp("dry") / "gpu.json"
    environ = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(SCRIPT), *SECTIONS, "--dry", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, cwd="/")
    assert out.exists(), done.stderr
    return done, json.loads(out.read_text("utf-8"))


def test_a_dry_run_goes_through_every_section(dry):
    done, result = dry
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["dry"] is True
    assert list(result["sections"]) == SECTIONS
    assert set(gpu_check.SECTIONS) - set(SECTIONS) == {"unet_256", "vit_large"}
    for name, section in result["sections"].items():
        assert section["rows"], name
        assert f"== {name}" in done.stdout
        assert not [row for row in section["rows"] if "section" in row], name  # none died


def test_what_a_dry_run_measures(dry):
    _, result = dry
    rows = {name: section["rows"] for name, section in result["sections"].items()}
    (summary,) = rows["tests"]
    assert summary["tests"] > 20
    assert summary["failures"] == summary["errors"] == 0
    linear = {row["candidate"]: row for row in rows["linear"] if "candidate" in row}
    assert {gpu_calls.OURS, gpu_calls.CUBLAS, "torch int4pack g128", "gemlite MXFP4", "torchao NVFP4"} <= set(linear)
    assert linear[gpu_calls.CUBLAS]["median_ms"] > 0
    assert "needs CUDA" in linear["torch int4pack g128"]["reason"]
    for row in (linear[gpu_calls.OURS], *(r for r in rows["conv"] if r["candidate"] == gpu_calls.OURS)):
        assert row["error"] < 1e-5
    assert {row["candidate"] for row in rows["resnet50"] if row["error"] < 0.5} == {"fp4fx", "Inductor"}
    assert sum(next(row for row in rows["resnet50"] if row["candidate"] == "fp4fx")["kernels"].values()) == 2
    assert all(row["tokens_per_s"] > 0 for row in rows["decoder"])
    ours = [row for row in rows["decoder"] if row["candidate"].startswith("fp4fx")]
    assert all(row["weight_bytes"] < 30000 and sum(row["kernels"].values()) == 8 for row in ours)


def test_every_missing_package_is_a_row(monkeypatch):
    monkeypatch.setattr(gpu_check, "PACKAGES", ("torch", "no_such_package"))
    assert gpu_check.missing_packages() == [{"package": "no_such_package", "reason": "not installed"}]


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--dry" in capsys.readouterr().out


def test_what_an_interpreter_lacks_is_said_before_anything_runs(tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{Path(sys.base_prefix) / "bin/python3"}" -S -I "$@"\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT)], capture_output=True, text=True, check=False, env={"PYTHON": str(tmp_path / "python")}
    )
    assert done.returncode == 1
    assert "not installed: torch, triton" in done.stderr


def test_a_section_that_dies_or_hangs_keeps_its_rows_and_says_why(monkeypatch, tmp_path):
    def run(command, **given):
        out = Path(command[command.index("--out") + 1])
        out.write_text('{"a": 1}\n{"b": 2}\n{"cut o')
        given["stdout"].write("Traceback\nRuntimeError: an illegal memory access\n")
        given["stdout"].flush()
        if fate == "hangs":
            raise subprocess.TimeoutExpired(command, given["timeout"])
        return subprocess.CompletedProcess(command, -11)

    monkeypatch.setattr(subprocess, "run", run)
    fate = "dies"
    why = "its process ended with -11: RuntimeError: an illegal memory access"
    assert gpu_check.apart("linear", 1, dry=True) == [{"a": 1}, {"b": 2}, {"section": "linear", "reason": why}]
    fate = "hangs"
    assert gpu_check.apart("linear", 1, dry=True)[-1]["reason"] == "killed after 6 s"


def test_a_section_that_raises_keeps_its_rows(monkeypatch, tmp_path):
    def section(_):
        yield {"a": 1}
        raise RuntimeError("no\nmore")

    monkeypatch.setattr(gpu_check, "SECTIONS", {"one": section})
    gpu_check.here("one", gpu_check.Setting(dry=True, seconds=1), tmp_path / "rows")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text("utf-8").splitlines()]
    assert rows == [{"a": 1}, {"section": "one", "reason": "RuntimeError: no"}]


def test_the_tables_say_how_much_faster_and_what_is_missing():
    cell = {"n": 2, "k": 4, "m": 1, "packed_bytes": 5_000_000}
    rows = [
        {"copy_gb_per_s": 1000.0},
        {**cell, "candidate": gpu_calls.OURS, "median_ms": 0.01, "error": 0.002},
        {**cell, "candidate": gpu_calls.CUBLAS, "median_ms": 0.025},
        {**cell, "candidate": "gone", "reason": "not installed"},
    ]
    text = gpu_check.tables("linear", rows)
    assert ["2x4", "1", "10", "25", "2.5", "50", "0.002"] in [line.split() for line in text.splitlines()]
    assert "2 4 1 gone" in text
    known = {"net": "n", "case": "c", "times": 3}
    convs = [
        {**known, "candidate": gpu_calls.OURS, "median_ms": 1.0},
        {**known, "candidate": gpu_calls.CUDNN, "median_ms": 2.0},
    ]
    assert ["n", "all", "of", "them", "3e+03", "6e+03", "2"] in [
        line.split() for line in gpu_check.tables("conv", convs).splitlines()
    ]


def test_a_candidate_that_raises_is_a_reason_and_the_others_alternate():
    order = []

    def wrong():
        raise ValueError("no kernel")

    ways = {"a": lambda: [lambda: order.append("a")], "b": wrong, "c": lambda: [lambda: order.append("c")] * 2}
    found = gpu_timing.compare(ways, torch.device("cpu"), rounds=3)
    assert list(found) == ["a", "b", "c"]
    assert found["b"].row() == {"reason": "ValueError: no kernel"}
    assert found["a"].row()["rounds"] == 3
    assert "".join(order) == "acc" + "cca" + "acc" + "cca"  # once to be ready, then the rounds


def test_the_convolutions_are_those_of_the_networks():
    timm = pytest.importorskip("timm")

    def shapes(model, image):
        seen = []
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                module.register_forward_hook(lambda m, x, y: seen.append((m, x[0].shape[-1], y.shape[-1])))
        model(torch.empty(1, 3, image, image, device="meta"))
        return sorted(
            (
                m.in_channels,
                m.out_channels,
                size,
                out,
                m.kernel_size[0],
                m.stride[0],
                isinstance(m, torch.nn.ConvTranspose2d),
            )
            for m, size, out in seen
            if m.groups == 1 and m.in_channels > 3 and m.out_channels > 2
        )

    from benchmarks.nets import UNet

    with torch.device("meta"):
        nets = {"resnet50": (timm.create_model("resnet50"), 224), "unet": (UNet(), 256)}
    for name, (model, image) in nets.items():
        listed = sorted(
            (c.channels, c.n, c.size, c.out, c.kernel, c.stride, c.transposed)
            for c in gpu_calls.CONVS
            if c.net == name
            for _ in range(c.times)
        )
        assert listed == shapes(model, image)
