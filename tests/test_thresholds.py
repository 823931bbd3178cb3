"""The benchmark of thresholds, on networks that were hardly trained."""

import json
import sys

import pytest

pytest.importorskip("sklearn", reason="needs the extra `demo`")

from benchmarks import thresholds
from benchmarks.accuracy import nets
from fp4fx import Policy


def test_a_threshold_lies_between_the_values_it_parts():
    values = [3.0, 1.0, 2.0, 5.0, 4.0]
    assert [thresholds.threshold(values, share) for share in (0.1, 0.4, 0.6)] == [1.5, 2.5, 3.5]


def test_rows_and_page(tmp_path, monkeypatch):
    trained = nets.trained
    monkeypatch.setattr(nets, "trained", lambda name, seed: trained(name, seed, steps=2, cache=tmp_path))
    monkeypatch.setattr(thresholds, "SHARES", (0.25,))
    monkeypatch.setattr(thresholds, "CALIBRATION", {"vit": 16})
    out, page = tmp_path / "thresholds.json", tmp_path / "thresholds.md"
    argv = ["--nets", "vit", "--inputs", "20", "--out", str(out), "--docs", str(page)]
    monkeypatch.setattr(sys, "argv", ["thresholds", *argv])
    thresholds.main()
    record = json.loads(out.read_text())
    rows, (study,) = record["rows"], record["studies"]
    assert study["sites"] == 18
    first, *others = rows
    assert (first["rule"], first["kept"]) == ("none", 0)
    assert all(row["kept"] and row["bits"] > first["bits"] for row in others)
    kept = [row["kept"] for row in rows if row["rule"] == "min_sqnr"]
    assert kept == [4]
    for row in rows:
        if "beside" in row:
            (peer,) = (r for r in rows if "beside" not in r and [r["rule"], r["value"]] == row["beside"])
            assert row["bits"] <= peer["bits"]
    text = page.read_text()
    assert "| max_kurtosis=" in text and "the choice by output error is as good or better in" in text


def test_the_verdict_can_be_against_us():
    row = {"net": "n", "seed": 0, "rule": "min_sqnr", "value": 20.0, "sqnr_db": 30.0}
    record = {"rows": [row, {**row, "rule": "for_budget", "beside": ["min_sqnr", 20.0], "sqnr_db": 28.0}]}
    assert any("in 0 of 1 cases, by -2.0 dB" in line for line in thresholds.verdict(record))


def test_shares_are_those_of_the_plan():
    found = thresholds.stored(thresholds.fp4fx.plan(nets.RECIPES["vit"].make().eval(), Policy()))
    assert found["kept"] == 2
    assert 4.5 < found["bits"] < 6
    assert 0.95 < found["share"] < 1
