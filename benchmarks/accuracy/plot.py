"""Draw the rows: the error of every variant on every network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from benchmarks.accuracy.table import summarised
from benchmarks.plot import OURS, PEER, REFERENCE
from fp4fx import bench

COLOURS = {"W4A16": OURS, "W4A4": "#3a6b00", "peer": PEER, "reference": REFERENCE}


def draw(record: dict[str, Any], out: Path) -> None:
    """Two panels a network: relative error of the outputs, points lost; mean and standard deviation over seeds."""
    mpl.use("Agg")
    rows = [row for row in record["rows"] if "reason" not in row and row["variant"] != "fp32"]
    nets = list(dict.fromkeys(row["net"] for row in rows))
    if not nets:
        return
    tallest = max(len({row["variant"] for row in rows if row["net"] == net}) for net in nets)
    size = 11, len(nets) * (0.8 + 0.19 * tallest)
    figure, axes = plt.subplots(len(nets), 2, figsize=size, squeeze=False)
    for (left, right), net in zip(axes, nets, strict=True):
        of_net = [row for row in rows if row["net"] == net]
        kinds = {row["variant"]: row["kind"] for row in of_net}
        for panel, key in ((left, "error"), (right, "drop")):
            for place, (variant, kind) in enumerate(kinds.items()):
                found = summarised(of_net, variant, key)
                panel.errorbar(
                    found.mean, place, xerr=found.spread, fmt="o", color=COLOURS[kind], markersize=4, linewidth=1
                )
            panel.set_yticks(range(len(kinds)), list(kinds) if key == "error" else [""] * len(kinds))
            panel.invert_yaxis()
            panel.grid(axis="x", lw=0.3, alpha=0.5)
            panel.tick_params(labelsize=7)
        left.set_xscale("log")
        left.xaxis.set_minor_formatter(NullFormatter())
        left.set_title(f"{net}: relative error of the outputs", fontsize=8)
        right.axvline(0, color=REFERENCE, lw=0.6, ls=":")
        right.set_title(f"{net}: points lost against fp32 ({of_net[0]['metric']})", fontsize=8)
    figure.suptitle(bench.headline(record["environment"]), fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / size[1]))
    figure.savefig(out, dpi=110)
    plt.close(figure)
