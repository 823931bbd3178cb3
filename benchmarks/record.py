"""The JSON file of a benchmark: the rows of a run, and those of an earlier one of what this one does not measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def earlier(file: Path, where: Row, anew: Callable[[Row], bool]) -> list[Row]:
    """The rows of `file` but those that are measured anew.

    Raises:
        SystemExit: the run that wrote it was on another machine than `where`, or with other versions.
    """
    record = json.loads(file.read_text("utf-8"))
    before, now = ({**place, **place.get("versions", {})} for place in (record["environment"], where))
    different = sorted(k for k in (before.keys() & now.keys()) - {"date", "versions"} if before[k] != now[k])
    if different:
        raise SystemExit(f"{file}: found another {', '.join(different)}; measure all of it anew, without --update")
    return [row for row in record["rows"] if not anew(row)]


def write(file: Path, where: Row, rows: list[Row]) -> None:
    """Write the environment and the rows; folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n", "utf-8")
