"""The rows as tables and plots: docs/formats.md and PNG files beside the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.formats.measure import DISTRIBUTIONS, Row
from fp4fx import bench

HEAD = """# The error of 4-bit formats

Written by `python -m benchmarks.formats` into [formats.json](../benchmarks/results/formats.json); {where}.

Relative error is Σ(decoded - x)² / Σx², times 1000, of {count:,} values; 9.06 are 20.4 dB. Bits count the scales of
blocks. Figures move by half a percent with the seed, those of Student's t with 3 degrees of freedom (t3) by five.

{errors}

![errors by distribution](../benchmarks/results/formats.png)

* A **scale search** makes a quarter less error than the rule block maximum / 6 ("nearest"), at the same size. It is
  the default for weights, with a global scale ("unbiased") that makes up for what least squares take off a tensor's own
  direction; what that does to networks is in [accuracy.md](accuracy.md). The best fp32 scales would make 7 to 11 % less
  than the search. **Four over six** tries two scales where the search tries eleven and makes a sixth less than
  "nearest"; choosing by absolute error is a little worse. It is offered for activations (`activation_scale_rule`).
* With **one scale per 16x16 tile** the error grows with the tails of the distribution; with one per 16 values it does
  not: kurtosis says nothing about it.
* A **Hadamard rotation** makes every distribution a Gaussian, or nearly. That helps MXFP4 and INT4 on heavy tails.
  NVFP4 has the error of a Gaussian with it: more behind a ReLU, and on heavy tails more by "nearest", less by the
  search.
* **Scales that are powers of two** (MXFP4, E8M0) cost half as much again, or more.

Other libraries on the same values:

{peers}

## Products

y = x · Wᵀ of Gaussians, {size} values a side: signal to noise ratio of y. The errors of both sides add up.

{products}

## A static global scale of activations

The error (times 1000) where the global scale is a factor of that of the values' maximum, and where it is that of a
percentile of the magnitudes, by the rule "max".

{factors}

{percentiles}

![effect of the global scale](../benchmarks/results/formats-global-scale.png)

A global scale may be far too large at no cost, since normal numbers of E4M3 span 28,672 to 1; too small, it saturates.
That of a percentile is too small: it costs more, the heavier the tails.
"""


def page(record: dict[str, Any]) -> str:
    """The text of docs/formats.md."""
    rows: list[Row] = record["rows"]
    products = [row for row in rows if row["section"] == "product"]
    static = [row for row in rows if row["section"] == "global scale"]
    return HEAD.format(
        where=bench.headline(record["environment"]),
        count=record["samples"],
        errors=_errors([row for row in rows if row["section"] == "error" and not row["peer"]]),
        peers=_errors([row for row in rows if row["section"] == "error" and row["peer"]]),
        size=products[0]["size"],
        products=_table([(row["format"], f"{row['sqnr']:.2f}") for row in products], ("", "dB")),
        factors=_static([row for row in static if "percentile" not in row], "factor", "{:g}", "factor"),
        percentiles=_static([row for row in static if "percentile" in row], "percentile", "{:g}", "percentile"),
    )


def _table(lines: Sequence[Sequence[Any]], heads: Sequence[str]) -> str:
    align = ("left", *("right" for _ in heads[1:]))
    return str(tabulate(lines, heads, tablefmt="pipe", colalign=align, disable_numparse=True))


def _errors(rows: Sequence[Row]) -> str:
    lines, reasons = [], []
    for name, bits in dict.fromkeys((row["format"], row["bits"]) for row in rows):
        own = {row["distribution"]: row for row in rows if row["format"] == name}
        failed = [f"{name}: {row['reason']}" for row in own.values() if "reason" in row]
        reasons += failed
        if failed:
            continue
        lines.append((name, f"{bits:g}", *(f"{1000 * own[d]['error']:#.3g}" for d in DISTRIBUTIONS)))
    return "\n\n".join([_table(lines, ("", "bits", *DISTRIBUTIONS)), *reasons])


def _static(rows: Sequence[Row], key: str, form: str, head: str) -> str:
    names = list(dict.fromkeys(row["distribution"] for row in rows))
    values = list(dict.fromkeys(row[key] for row in rows))
    found = {(row["distribution"], row[key]): row["error"] for row in rows}
    lines = [(name, *(f"{1000 * found[name, value]:#.3g}" for value in values)) for name in names]
    return _table(lines, (head, *(form.format(value) for value in values)))


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """formats.png and formats-global-scale.png in the folder."""
    import matplotlib as mpl  # noqa: PLC0415  (of the extra `peers`)

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    rows = [row for row in record["rows"] if row["section"] == "error" and not row["peer"]]
    names = list(dict.fromkeys(row["format"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(names) + 1.2))
    for place in range(len(names)):
        axes.axhline(place, color="#dddddd", lw=0.6, zorder=0)
    for marker, distribution in zip("os^DvP", DISTRIBUTIONS, strict=True):
        own = [row for row in rows if row["distribution"] == distribution]
        places = [names.index(row["format"]) for row in own]
        axes.scatter([1000 * row["error"] for row in own], places, s=26, marker=marker, label=distribution, alpha=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("1000 x relative squared error")
    axes.legend(ncols=6, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.06))
    files = [folder / "formats.png", folder / "formats-global-scale.png"]
    figure.tight_layout()
    figure.savefig(files[0], dpi=110)
    plt.close(figure)

    static = [row for row in record["rows"] if row["section"] == "global scale"]
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for name, colour in (("N(0,1)", "#76b900"), ("t5", "#3b4252")):
        own = [row for row in static if row["distribution"] == name]
        factors = [row for row in own if "percentile" not in row]
        axes.plot([r["factor"] for r in factors], [1000 * r["error"] for r in factors], "o-", color=colour, label=name)
        cut = [row for row in own if "percentile" in row]
        axes.plot([r["factor"] for r in cut], [1000 * r["error"] for r in cut], "x", color=colour,
                  label=f"{name}, percentiles")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="global scale / that of the maximum", ylabel="1000 x relative error")
    axes.grid(lw=0.3, alpha=0.6)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(files[1], dpi=110)
    plt.close(figure)
    return files
