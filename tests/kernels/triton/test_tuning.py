import json

import pytest
import torch

from fp4fx.errors import KernelError
from fp4fx.kernels.triton import tuning
from fp4fx.kernels.triton.tuning import Tile

CARDS = {
    (7, 5): "sm_80",
    (8, 0): "sm_80",
    (8, 6): "sm_80",
    (8, 9): "sm_80",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (11, 0): "sm_100",
    (12, 0): "sm_120",
    (12, 1): "sm_120",
    (13, 0): "sm_120",
}
OPS = ("gemv", "split_k", "gemm", "conv", "quantize", "dequantize")


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A function that puts a table of rows in place of the file's."""

    def put(*rows, **limits):
        data = {"rows": list(rows), "largest_m": limits}
        monkeypatch.setattr(tuning, "_data", lambda: data)
        for cached in (tuning._find, tuning._table):
            cached.cache_clear()

    yield put
    for cached in (tuning._find, tuning._table):
        cached.cache_clear()


def row(m, n, k, block, op="gemm", family="sm_90", **more):
    return {"family": family, "op": op, "m": m, "n": n, "k": k, "tile": [block, 64, 128, 1, 4, 3], **more}


@pytest.mark.parametrize("capability", CARDS)
def test_a_card_has_the_nearest_family(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert tuning.family_of(torch.device("cuda")) == CARDS[capability]
    note = tuning.note(torch.device("cuda"))
    known = capability[0] in (8, 9, 10, 12)
    assert ("has no tiles of its own" in (note or "")) is not known


def test_the_cpu_is_interpreted_and_has_nothing_to_say():
    cpu = torch.device("cpu")
    assert tuning.family_of(cpu) == "interpreter"
    assert tuning.note(cpu) is None
    assert all(tuning.tile(op, "interpreter", 5, 7, 9).block_k <= 64 for op in OPS)


def test_the_note_says_whether_tiles_were_measured(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    table(row(None, None, None, 16, assumed=True))
    assert "none was measured" in tuning.note(torch.device("cuda"))
    table(row(None, None, None, 16, assumed=True), row(1, None, None, 16, us=[3]))
    assert tuning.note(torch.device("cuda")) is None


def test_the_smallest_bounds_that_hold_a_product_win_whatever_the_order(table):
    table(row(None, None, None, 1), row(64, 4096, None, 2), row(64, 4096, 1024, 3), row(16, None, None, 4))
    sizes = {
        (65, 1, 1): 1,
        (64, 4097, 1): 1,
        (64, 4096, 1025): 2,
        (64, 4096, 1024): 3,
        (16, 9999, 9999): 4,
        (1, 1, 1): 4,
    }
    assert {size: tuning.tile("gemm", "sm_90", *size).block_m for size in sizes} == sizes


def test_what_no_row_holds_is_an_error_that_names_it(table):
    table(row(64, None, None, 1))
    with pytest.raises(KernelError, match=r"no tile for gemm on sm_90 with M=65, N=2, K=3"):
        tuning.tile("gemm", "sm_90", 65, 2, 3)
    with pytest.raises(KernelError, match="no tile for conv"):
        tuning.tile("conv", "sm_90", 1, 2, 3)


def test_a_forced_tile_is_given_until_the_block_ends():
    before = tuning.tile("gemv", "sm_90", 1, 64, 64)
    with tuning.forced(gemv=Tile(7, 7, 7)):
        assert tuning.tile("gemv", "sm_90", 1, 64, 64) == tuning.tile("gemv", "interpreter", 1, 1, 1) == Tile(7, 7, 7)
        with tuning.forced(gemm=Tile(8, 8, 8)):
            assert tuning.tile("gemv", "sm_90", 1, 64, 64) == Tile(7, 7, 7)
        assert tuning.tile("gemm", "sm_90", 1, 64, 64) != Tile(8, 8, 8)
    assert tuning.tile("gemv", "sm_90", 1, 64, 64) == before


# --- the file that ships --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tuning.FAMILIES)
@pytest.mark.parametrize("op", OPS)
def test_every_product_has_a_tile(op, family):
    sizes = (1, 3, 17, 100, 1000, 5000, 20000, 200000)
    found = {tuning.tile(op, family, m, n, k) for m in sizes for n in sizes for k in sizes}
    assert found <= set(tuning.tiles(op, family))
    for tile in found:
        assert tile.block_m > 0
        assert tile.block_m & (tile.block_m - 1) == tile.block_n & (tile.block_n - 1) == 0
        assert tile.block_k % 16 == 0
        assert 1 <= tile.num_warps <= 8
        assert tile.split_k >= 1


def test_every_row_says_where_it_is_from_and_none_is_there_twice():
    rows = json.loads(tuning.PATH.read_text("utf-8"))["rows"]
    keys = [(r["family"], r["op"], r["m"], r["n"], r["k"]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert all(r.get("assumed") is True or {"device", "torch", "triton", "date", "us"} <= set(r) for r in rows)


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (8192, 8192), (11008, 4096), (4096, 14336), (2048, 8192)])
def test_split_k_fills_an_h100(n, k):
    for m in (5, 16, 32, 64):
        tile = tuning.tile("split_k", "sm_90", m, n, k)
        assert tile.block_m >= m
        assert -(-n // tile.block_n) * tile.split_k >= 132
        assert k // tile.split_k >= 2 * tile.block_k  # each part has something to pipeline


def test_native_products_are_those_of_families_that_have_them():
    assert {family for family in tuning.FAMILIES if tuning.native_rows(family)} == set(tuning.NATIVE)
    assert tuning.native_rows("interpreter") == 0


@pytest.mark.parametrize("family", tuning.FAMILIES)
def test_schedules_take_over_from_each_other(family):
    limits = tuning.largest_m(family)
    assert list(limits) == ["gemv", "split_k", "gemm"]
    assert 1 <= limits["gemv"] <= limits["split_k"] <= limits["gemm"]
    assert tuning.largest_m("interpreter") == tuning.largest_m("sm_90")
