import json

import pytest
import torch

from benchmarks import gpu_calls, tune
from fp4fx.kernels.triton import tuning
from fp4fx.kernels.triton.tuning import Tile

A, B, C = Tile(16, 64, 64), Tile(16, 64, 128), Tile(32, 64, 128)
FACTS = {"device": "a card", "torch": "1", "triton": "2", "date": "2026-01-01"}


def test_the_file_is_what_the_rules_and_the_measurements_make():
    data = json.loads(tuning.PATH.read_text("utf-8"))
    again = tune.merged(data, "", (), None)
    assert again == data


def test_a_file_that_was_written_reads_back(tmp_path):
    table = tune.merged({"rows": [], "largest_m": {}}, "", (), None)
    tune.write(tmp_path / "t.json", table)
    text = (tmp_path / "t.json").read_text("utf-8")
    assert json.loads(text) == table
    assert len(text.splitlines()) == len(table["rows"]) + len(tuning.FAMILIES) + 2 + 8  # one a line


def test_a_measured_row_takes_the_place_of_an_assumed_one_and_stays():
    old = {"rows": [], "largest_m": {}}
    first = next(row for row in tune.assumed() if (row["family"], row["op"]) == ("sm_90", "gemm"))
    key = {name: first[name] for name in ("family", "op", "m", "n", "k")}
    measured = {**key, "tile": list(A), "us": [1.0], **FACTS}
    limits = {"limits": {"gemv": 2, "split_k": 32, "gemm": 256}, **FACTS}
    table = tune.merged(old, "sm_90", [measured], limits)
    for again in (table, tune.merged(table, "sm_90", [], None)):
        assert [row for row in again["rows"] if {name: row[name] for name in key} == key] == [measured]
        assert again["largest_m"]["sm_90"] == limits
        assert again["largest_m"]["sm_80"]["assumed"] is True
        assert len(again["rows"]) == len(tune.assumed())


def test_the_tile_of_a_bucket_is_the_best_over_its_shapes():
    cells = {
        ("gemm", 64, 4000, 4096): {A: 1.0, B: 1.1, C: 3.0},
        ("gemm", 60, 4096, 4096): {A: 5.0, B: 1.1, C: 1.0},
        ("gemm", 65, 4096, 4096): {C: 1.0},
        ("gemv", 1, 20000, 100): {A: 2.0},
        ("conv", 1, 1, 1): {},
    }
    rows = tune.rows_of(cells, "sm_90", FACTS)
    assert [(r["op"], r["m"], r["n"], r["k"], Tile(*r["tile"])) for r in rows] == [
        ("gemm", 64, 4096, 4096, B),
        ("gemm", 128, 4096, 4096, C),
        ("gemv", 1, None, 512, A),
    ]
    assert rows[0]["us"] == [1100.0, 1100.0]
    assert all(row["device"] == "a card" for row in rows)


def test_tritons_w4a4_ends_where_the_library_is_faster_over_all_shapes():
    def cells(**times):
        return {(op, m, n, 64): {A: ms} for op, found in times.items() for (m, n), ms in found.items()}

    native = {(16, 1): 1, (16, 2): 4, (32, 1): 3, (64, 1): 9, (128, 1): 1, (256, 1): 1}
    library = {(16, 1): 2, (16, 2): 3, (32, 1): 3, (64, 1): 8, (128, 1): 2}
    found = cells(native=native, scaled_mm=library)
    assert tune.native_rows_of(found) == 32  # not 128, which is past the first at which it is slower
    assert tune.native_rows_of(cells(native=native)) == 0
    assert tune.rows_of(found, "sm_100", FACTS) == []
    entry = {"m": 32, **FACTS}
    table = tune.merged({"rows": [], "largest_m": {}}, "sm_100", [], None, entry)
    assert table["native_rows"] == {"sm_100": entry, "sm_120": {"m": 64, "assumed": True}}
    assert tune.merged(table, "sm_120", [], None)["native_rows"] == table["native_rows"]


def test_schedules_end_where_another_is_faster_over_the_shapes_that_all_have():
    def cell(op, m, ms, n=4096):
        return {(op, m, n, 4096): {A: ms, B: 2 * ms}}

    cells = {}
    for op, m, ms in (
        ("gemv", 1, 1),
        ("gemv", 2, 3),
        ("split_k", 2, 2),
        ("split_k", 16, 2),
        ("gemm", 16, 3),
        ("gemm", 128, 3),
        ("decode", 128, 4),
        ("gemm", 256, 9),
        ("decode", 256, 5),
    ):
        cells |= cell(op, m, ms)
    cells |= cell("decode", 128, 0.1, n=64)  # which gemm was not measured at
    assert tune.limits_of(cells) == {"gemv": 1, "split_k": 16, "gemm": 128}
    assert tune.limits_of(cell("gemv", 4, 1)) == {"gemv": 4, "split_k": 4, "gemm": 4}


@pytest.mark.parametrize("family", tuning.FAMILIES)
@pytest.mark.parametrize("op", tune.OPS)
def test_candidates_are_powers_of_two_that_fit(op, family):
    for m, n, k in ((1, 4096, 4096), (512, 14336, 4096), (20, 64, 64)):
        found = tune.candidates(op, m, n, k, family)
        assert 2 <= len(found) <= 150
        assert len(set(found)) == len(found)
        for tile in found:
            assert all(size & (size - 1) == 0 for size in tile[:5])
            if op not in ("gemv", "quantize"):
                assert tune._bytes(tile, tile.block_k) * tile.num_stages <= tune._SHARED[family] << 10


def test_the_tuner_measures_each_tile_and_names_what_fails(monkeypatch):
    seen = []

    def linear(m, n, k, device, schedule):
        tile = tuning.tile(schedule, "sm_90", m, n, k)
        if tile == C:
            raise RuntimeError("out of resources")
        return [lambda: seen.append((schedule, m, tile))]

    monkeypatch.setattr(gpu_calls, "linear", linear)
    monkeypatch.setattr(tune, "candidates", lambda op, *_: [Tile(0, 0, 0)] if op == tune.DECODE else [A, B, C])
    monkeypatch.setattr(tune, "ROWS_OF", {"gemv": (1,), "split_k": (16,), "gemm": (16, 64), "decode": (64,)})
    tuner = tune.Tuner(torch.device("cpu"), seconds=60, rounds=2)
    tuner.run(["gemv", "split_k", "gemm"], [(32, 32)])
    assert {key: set(times) for key, times in tuner.cells.items()} == {
        ("gemv", 1, 32, 32): {A, B},
        ("split_k", 16, 32, 32): {A, B},
        ("gemm", 16, 32, 32): {A, B},
        ("gemm", 64, 32, 32): {A, B},
        ("decode", 64, 32, 32): {Tile(0, 0, 0)},
    }
    assert len(tuner.lost) == 4
    assert all(why == "RuntimeError: out of resources" for _, why in tuner.lost)
    assert set(tune.limits_of(tuner.cells)) == {"gemv", "split_k", "gemm"}
    late = tune.Tuner(torch.device("cpu"), seconds=0)
    late.run(["gemv"], [(32, 32)])
    assert {why for _, why in late.lost} == {"out of time"}


def test_without_a_gpu_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().out.strip().splitlines() == [
        "benchmarks.tune: no CUDA device; tiles are measured on a GPU (--assumed writes the rules' tiles)"
    ]
