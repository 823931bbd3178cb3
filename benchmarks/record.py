"""The JSON file of a benchmark: the rows of a run, and those of an earlier one of what this one does not measure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def earlier(file: Path, where: Row) -> list[Row]:
    """The rows of `file`, each with its date; none if there is no file.

    Raises:
        SystemExit: the run that wrote it was on another machine than `where`, or with other versions.
    """
    if not file.exists():
        return []
    record = json.loads(file.read_text("utf-8"))
    before, now = ({**place, **place.get("versions", {})} for place in (record["environment"], where))
    different = sorted(k for k in (before.keys() & now.keys()) - {"date", "versions"} if before[k] != now[k])
    if different:
        raise SystemExit(f"{file}: found another {', '.join(different)}; measure all of it anew, without --update")
    return [{"date": before["date"], **row} for row in record["rows"]]


def update(rows: list[Row], new: list[Row], keys: Sequence[str], order: Sequence[str], date: str) -> list[Row]:
    """`rows` with `new` ones of that date in place of all with the same `keys`, sorted: the first key by `order`."""
    measured = [[row[key] for key in keys] for row in new]
    rows = [row for row in rows if [row[key] for key in keys] not in measured]
    rows += [{**row, "date": date} for row in new]
    places = {name: place for place, name in enumerate(order)}
    return sorted(rows, key=lambda row: (places.get(row[keys[0]], len(order)), *(row[key] for key in keys[1:])))


def write(file: Path, where: Row, rows: list[Row]) -> None:
    """Write the environment and the rows; folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n", "utf-8")
