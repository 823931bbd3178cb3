"""Which tile for which product: by device family, op and bucket of M, N, K.

The table is `tuning.json`: one row holds up to its bounds on m, n and k (null: any), and of the rows that hold the one
with the smallest bounds is taken, m before n before k. `python -m benchmarks.tune` writes it: rows measured on a device
say which, with what and when; the others say `"assumed": true`. `largest_m` and `native_rows` of the file are what the
functions of these names read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fp4fx.errors import KernelError
from fp4fx.sizes import estimate

PATH = Path(__file__).with_name("tuning.json")
FAMILIES = ("sm_80", "sm_90", "sm_100", "sm_120")
NATIVE = ("sm_100", "sm_120")
"""Families whose matrix unit reads two packed operands itself."""
INTERPRETER = "interpreter"


class Tile(NamedTuple):
    """How a product is cut: rows of x, rows of W and values of K per program, parts of K, warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


Size = int | torch.SymInt

_forced: dict[str, Tile] = {}


def tile(op: str, family: str, m: Size, n: Size, k: Size) -> Tile:
    """The tile for a product [m, k] x [n, k].

    Args:
        op: "gemv", "split_k", "gemm", "conv" (m positions, n results and k values of a group), or "quantize" and
            "dequantize" (m rows of k values, n is 1).
        family: that of `family_of`.
        m, n, k: sizes of this call; of symbolic ones those of the example.

    Raises:
        KernelError: the table has no row for it.
    """
    if op in _forced:
        return _forced[op]
    if family == INTERPRETER:
        return Tile(32, 32, 64, 2) if op == "conv" else Tile(16, 16, 32, 2 if op == "split_k" else 1)
    return _find(op, family, estimate(m), estimate(n), estimate(k))


def tiles(op: str, family: str) -> tuple[Tile, ...]:
    """Every tile that the table can give, once."""
    return tuple(dict.fromkeys(found for _, found in _table().get((op, family), ())))


@contextlib.contextmanager
def forced(**by_op: Tile) -> Iterator[None]:
    """Let `tile` give these, whatever it is asked, as one does who measures them: `forced(gemv=Tile(1, 8, 512))`."""
    before = dict(_forced)
    _forced.update(by_op)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def largest_m(family: str) -> Mapping[str, int]:
    """Rows of x up to which each schedule of a linear layer is the one: {"gemv": ..., "split_k": ..., "gemm": ...}.

    Above all of them the weight is decoded for the library's matmul.
    """
    limits: dict[str, int] = _data()["largest_m"]["sm_90" if family == INTERPRETER else family]["limits"]
    return limits


def native_rows(family: str) -> int:
    """Rows of x up to which a product of two packed sides is Triton's own and above which it is the library's.

    0 for a family whose matrix unit does not read such.
    """
    entry: Mapping[str, int] = _data()["native_rows"].get(family, {"m": 0})
    return entry["m"]


def family_of(device: torch.device) -> str:
    """One of `FAMILIES`, for an unknown card the nearest; "interpreter" on the CPU."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return family_for(10 * major + minor)


def family_for(capability: int) -> str:
    """The one of `FAMILIES` for a compute capability times ten."""
    return max((name for name in FAMILIES if _major(name) <= capability // 10), key=_major, default=FAMILIES[0])


def note(device: torch.device) -> str | None:
    """What a report has to say about the tiles of a device: not measured, or another family's."""
    if device.type != "cuda":
        return None
    family, (major, minor) = family_of(device), torch.cuda.get_device_capability(device)
    notes = []
    if _major(family) != major:
        notes.append(f"sm_{major}{minor} has no tiles of its own, those of {family} are used")
    if all(row.get("assumed") for row in _data()["rows"] if row["family"] == family):
        notes.append(f"the tiles of {family} are assumed, none was measured (python -m benchmarks.tune)")
    return "; ".join(notes) or None


def _major(family: str) -> int:
    return int(family.removeprefix("sm_")) // 10


# --- the table --------------------------------------------------------------------------------------------------------

Bounds = tuple[float, float, float]


@functools.lru_cache(maxsize=4096)
def _find(op: str, family: str, m: int, n: int, k: int) -> Tile:
    for bounds, found in _table().get((op, family), ()):
        if all(size <= bound for size, bound in zip((m, n, k), bounds, strict=True)):
            return found
    raise KernelError(f"{PATH.name} has no tile for {op} on {family} with M={m}, N={n}, K={k}; add a row")


@functools.cache
def _table() -> dict[tuple[str, str], list[tuple[Bounds, Tile]]]:
    """By op and family: bounds and tiles, the smallest bounds first."""
    table: dict[tuple[str, str], list[tuple[Bounds, Tile]]] = {}
    for row in _data()["rows"]:
        table.setdefault((row["op"], row["family"]), []).append((bounds_of(row), Tile(*row["tile"])))
    for rows in table.values():
        rows.sort(key=lambda entry: entry[0])
    return table


def bounds_of(row: Mapping[str, Any]) -> Bounds:
    """The largest m, n and k that a row of the file is for."""
    m, n, k = (math.inf if row[name] is None else row[name] for name in ("m", "n", "k"))
    return m, n, k


@functools.cache
def _data() -> Any:
    return json.loads(PATH.read_text("utf-8"))
