"""Draw the results: benchmarks/results/NAME.json -> NAME.png beside it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from fp4fx import bench

mpl.use("Agg")

RESULTS = Path(__file__).parent / "results"
OURS, PEER, REFERENCE = "#76b900", "#8a8f98", "#3b4252"

Row = dict[str, Any]


def panel_of(axes: Axes, rows: list[Row], title: str, reference: str) -> None:
    """Medians as points, p10 to p90 as whiskers; fp4fx and the reference have colours of their own."""
    for place, row in enumerate(rows):
        name, median = row["candidate"], row["median_ms"]
        colour = OURS if "fp4fx" in name else REFERENCE if name == reference else PEER
        spread = [[max(median - row["p10_ms"], 0)], [max(row["p90_ms"] - median, 0)]]
        axes.errorbar(median, place, xerr=spread, fmt="o", color=colour, markersize=5, lw=1)
        if name == reference:
            axes.axvline(median, color=colour, lw=0.6, ls=":")
    axes.set_yticks(range(len(rows)), [row["candidate"] for row in rows])
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", lw=0.3, alpha=0.5)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("ms, logarithmic", fontsize=7)


def draw(record: dict[str, Any], out: Path) -> None:
    """One panel for every model and batch size, or for every linear shape, cache and M."""
    rows = [row for row in record["rows"] if "median_ms" in row]
    linear = [row for row in rows if row.get("section") == "linear"]
    if linear:
        keys, reference = ("n", "k", "m", "cache"), "torch bf16"
        title = "N={} K={} M={}, {}"
    else:
        linear, keys, reference = rows, ("model", "batch"), "Inductor bf16"
        title = "{}, batch {}"
    panels = list(dict.fromkeys(tuple(row[key] for key in keys) for row in linear))
    if not panels:
        raise SystemExit("nothing was measured, so there is nothing to draw")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(sum(tuple(row[key] for key in keys) == panel for row in linear) for panel in panels)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, lines * (0.9 + 0.19 * tallest)), squeeze=False)
    for place, panel in zip(axes.flat, panels, strict=False):
        here = [row for row in linear if tuple(row[key] for key in keys) == panel]
        panel_of(place, here, title.format(*panel), reference)
    for place in list(axes.flat)[len(panels) :]:
        place.axis("off")
    figure.suptitle(bench.headline(record["environment"]), fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()))
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draw the named files, by default every one that the benchmarks wrote."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="JSON", help="default: ops-cpu.json, models-cpu.json")
    args = parser.parse_args()
    standard = [RESULTS / f"{name}-cpu.json" for name in ("ops", "models")]
    for file in args.files or [path for path in standard if path.exists()]:
        out = file.with_suffix(".png")
        draw(json.loads(file.read_text("utf-8")), out)
        print(f"written to {out}")


if __name__ == "__main__":
    main()
