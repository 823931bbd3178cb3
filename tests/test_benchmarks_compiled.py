"""The benchmarks of compiling and of the passes, on a network small enough to try them."""

import json

import pytest
import torch
from torch import nn

import fp4fx
from benchmarks import compiling, effects, nets


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    def create(_):
        torch.manual_seed(0)
        layers = [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1)).eval()

    monkeypatch.setattr(nets, "create", create)
    monkeypatch.setattr(nets, "inputs", lambda _, batch: (torch.randn(batch, 16, 8, 8),))


def test_the_first_call_is_measured_with_empty_and_with_full_caches(monkeypatch, capsys, tmp_path):
    rows = compiling.measure("tiny", rounds=1)
    assert [(row["backend"], row["caches"]) for row in rows] == [
        (backend, caches) for backend in ("Inductor", "fp4fx") for caches in ("empty", "full")
    ]
    assert [(row["graphs"], row["cache_hits"]) for row in rows] == [(1, 0), (1, 1)] * 2
    assert all((0 < row["passes"] < row["seconds"]) == (row["backend"] == "fp4fx") for row in rows)
    line = compiling.table(rows).splitlines()[2].split()
    assert line[0] == "tiny" and line[-3:] == ["1", "of", "1"]
    assert float(line[3]) == pytest.approx(rows[2]["seconds"] / rows[0]["seconds"], abs=0.01)


def test_a_pass_left_out_is_seen(monkeypatch, capsys, tmp_path):
    case = effects.Case("tiny", torch.float32, fp4fx.Policy(skip_first=0, compute="fp32"), ("fuse_epilogue",))
    monkeypatch.setattr(effects, "CASES", (case,))
    monkeypatch.setattr("sys.argv", ["effects", "--rounds", "2", "--out", str(tmp_path / "rows.json")])
    effects.main()
    rows = json.loads((tmp_path / "rows.json").read_text("utf-8"))["rows"]
    assert [row["without"] for row in rows] == [None, "fuse_epilogue"]
    assert rows[0]["gain"] == 1 and rows[0]["difference"] == 0 and 0 < rows[1]["difference"] < 1e-5
    assert rows[1]["gain"] == pytest.approx(rows[1]["median_ms"] / rows[0]["median_ms"])
    assert "without fuse_epilogue" in capsys.readouterr().out


def test_passes_of_the_cases_exist():
    from fp4fx import passes

    assert all(hasattr(passes, name) for case in effects.CASES for name in case.passes)
