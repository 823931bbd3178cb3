import json
import sys

import pytest
import torch

from benchmarks import models, ops, peers, record, timing
from benchmarks.peers import aten, base
from fp4fx import bench


def exact(weight):
    return base.Layer(lambda x: lambda: x @ weight.T, weight.nbytes, weight)


def wrong(weight):
    return base.Layer(lambda x: lambda: x @ weight.T * 1.5, weight.nbytes, weight)


def broken(_):
    raise RuntimeError("no kernel\nand a long story")


CANDIDATES = (
    base.Candidate("mine", torch.float32, exact, 4, ours=True),
    base.Candidate("exact", torch.float32, exact, 32),
    base.Candidate("wrong", torch.float32, wrong, 4),
    base.Candidate("broken", torch.float32, broken, 4),
    base.Candidate("slow", torch.float32, exact, 4, max_m=1),
    base.unavailable("absent", "not installed"),
)


@pytest.fixture(scope="module")
def rows():
    return ops.linear(48, 32, (1, 3), CANDIDATES, rounds=2)


@pytest.fixture
def measured(rows):
    return {(r["candidate"], r["m"], r["cache"]): r for r in rows if r["section"] == "linear" and "median_ms" in r}


def test_every_candidate_has_a_row_at_every_m(rows, measured):
    assert set(measured) == {
        *((name, 1, cache) for name in ("mine", "exact", "wrong", "slow") for cache in ("hot", "cold")),
        *((name, 3, "hot") for name in ("mine", "exact", "wrong")),
    }
    assert {row["candidate"]: row["reason"] for row in rows if "reason" in row} == {
        "broken": "RuntimeError: no kernel",
        "absent": "not installed",
        "slow": "not measured above M=1: it takes seconds",
    }
    assert all(0 < row["min_ms"] <= row["median_ms"] and row["rounds"] == 2 for row in measured.values())
    (read,) = (row for row in rows if row["section"] == "read")
    assert read["bytes"] == 48 * 32 * 0.5625 and read["rounds"] == 2
    assert f"adding up 0.5625 B/weight: {read['median_ms']:.3f}" in ops.table(rows)


def test_errors_are_relative_to_fp64(measured):
    assert measured["exact", 3, "hot"]["kernel_error"] < 1e-6
    assert measured["wrong", 3, "hot"]["kernel_error"] == pytest.approx(0.5, rel=1e-4)
    assert measured["wrong", 3, "hot"]["total_error"] == pytest.approx(0.5, rel=1e-4)


def test_the_tables_and_the_plot_are_made_from_json(rows, tmp_path):
    again = json.loads(json.dumps(rows))
    assert again == rows
    text = ops.table(again)
    assert "linear, N=48 K=32, cold" in text
    assert [line.split() for line in text.splitlines() if line.startswith("absent")] == [["absent", "not", "installed"]]
    lines = [line for line in ops.standing(again).splitlines() if line.startswith("48x32")]
    assert len(lines) == 3  # of "mine": M=1 hot and cold, M=3 hot
    plot = pytest.importorskip("benchmarks.plot")
    plot.draw({"environment": bench.environment(), "rows": again}, tmp_path / "ops.png")
    assert (tmp_path / "ops.png").stat().st_size > 1000


def test_the_best_peer_is_the_fastest_and_never_fp4fx():
    def row(candidate, ms, bits, ours=False):
        cell = {"section": "linear", "n": 2, "k": 4, "m": 1, "cache": "hot"}
        return {**cell, "candidate": candidate, "bits": bits, "ours": ours, "median_ms": ms}

    text = ops.standing([row("mine", 2.0, 4, ours=True), row("dense", 3.0, 16), row("four", 5.0, 4)])
    assert text.splitlines()[-1].split() == ["2x4", "1", "hot", "mine", "1.50", "dense", "2.50"]


def test_a_package_that_is_missing_is_a_named_row():
    def candidates():
        raise ModuleNotFoundError("No module named 'nothing'", name="nothing")

    (only,) = base.importable(candidates, "Nothing NVFP4", "nothing")
    assert only.name == "Nothing NVFP4"
    with pytest.raises(peers.UnavailableError, match=r"^not installed \(nothing\): pip install nothing$"):
        only.build(torch.ones(1, 16))


def test_the_peers_are_there_or_say_why(monkeypatch):
    for absent in ("openvino", "ggml", "bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, absent, None)
        monkeypatch.delitem(sys.modules, f"benchmarks.peers.{absent}", raising=False)
    found = peers.linear_candidates()
    names = [candidate.name for candidate in found]
    assert len(set(names)) == len(names)
    for start in (
        "fp4fx",
        "torch fp32",
        "torch int4pack",
        "onnxruntime",
        "OpenVINO",
        "torchao",
        "bitsandbytes",
        "ggml",
    ):
        assert any(name.startswith(start) for name in names), start
    (openvino,) = (candidate for candidate in found if candidate.name.startswith("OpenVINO"))
    with pytest.raises(peers.UnavailableError, match=r"not installed .*pip install openvino nncf"):
        openvino.build(torch.ones(16, 16))


@pytest.mark.parametrize("name", [aten.FP32, aten.BF16, aten.INT4])
def test_torch_multiplies_by_the_weight_it_claims(name):
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    (candidate,) = (c for c in aten.candidates() if c.name == name)
    layer = candidate.build(weight)
    x = torch.randn(5, 128).to(candidate.dtype)
    y, expected = layer.output(layer.at(x)()).double(), x.double() @ layer.dense.double().T
    assert (y - expected).norm() < 5e-3 * expected.norm()
    assert (layer.dense - weight).norm() < (0.12 if name == aten.INT4 else 4e-3) * weight.norm()


def test_a_cold_call_follows_an_eviction_and_a_waking_call():
    done = []
    calls, wake = ({n: lambda n=n, w=w: done.append(w + n) for n in "ab"} for w in ("", "wake "))
    timing.cold(calls, wake, lambda: done.append("evict"), rounds=2)
    parts = [["evict", f"wake {n}", f"wake {n}", n] for n in "abba"]
    assert done == [step for part in parts for step in part]


def test_a_block_is_the_median_of_its_calls_and_the_order_turns_around():
    order = []
    timings = timing.blocks({n: lambda n=n: order.append(n) for n in "ab"}, rounds=2, seconds=0)
    assert "".join(dict.fromkeys(order[: len(order) // 2])) == "ab"
    assert order[-1] == "a"
    assert timings["a"].rounds == 2


def test_a_model_whose_process_dies_is_a_row():
    (row,) = models.apart("no_such_model", 1, 1, None)
    assert row["candidate"] == "all"
    assert "no_such_model" in row["reason"]
    assert row["reason"] in models.table([row])


def test_an_update_keeps_what_is_not_measured_anew_unless_the_machine_is_another(tmp_path):
    rows = [{"model": "vit", "batch": 1, "date": "before"}, *({"model": "resnet50", "batch": b} for b in (1, 8))]
    where = {"device": "one", "torch": "2.15", "date": "yesterday", "versions": {"timm": "1"}}
    file = tmp_path / "models.json"
    assert record.earlier(file, where) == []
    record.write(file, where, rows)
    found = record.earlier(file, {**where, "date": "today", "versions": {"timm": "1", "nncf": "3"}})
    assert [row["date"] for row in found] == ["before", "yesterday", "yesterday"]
    new = [{"model": "resnet50", "batch": 8, "reason": "no"}, {"model": "unheard", "batch": 1}]
    found = record.update(found, new, ("model", "batch"), ("resnet50", "vit"), "today")
    assert [(row["model"], row["batch"], row["date"]) for row in found] == [
        ("resnet50", 1, "yesterday"), ("resnet50", 8, "today"), ("vit", 1, "before"), ("unheard", 1, "today"),
    ]  # fmt: skip
    for other in ({**where, "torch": "2.16"}, {**where, "versions": {"timm": "2"}}):
        with pytest.raises(SystemExit, match=r"found another (torch|timm); measure all of it anew"):
            record.earlier(file, other)
