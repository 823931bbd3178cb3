"""The rows of the zoo: what of them is not as it must be, and a page of one line per family."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from typing import Any

from tabulate import tabulate

from fp4fx.bench import headline, version_of

TOLERANCE = 1e-3
"""Largest relative difference between a compiled graph, computing in fp32, and the same model in eager mode."""

Row = dict[str, Any]

INTRODUCTION = """# The zoo

Every model of timm and torchvision (but `quantized_*`), and small ones of transformers, written by
`python -m benchmarks.zoo`. Weights are random, so the SQNR of an output says that nothing is broken, not how accurate a
trained model is. A run goes on where the last one ended, so a row is of the tree that wrote it; "since" is the date of
the oldest of a family, if all have one. `--fresh` measures all of them anew.

1. **plan**: `fp4fx.plan` on the meta device; every parameter of two dimensions or more is a site, or named with a
   reason.
2. **ran**: `fp4fx.quantize`, then a forward on the smallest images that the model takes: finite, the original's output
   unchanged, and no product of that forward read a parameter that the plan had overlooked (seen by a dispatch mode,
   without the tracer). Models of more than 300 M parameters are planned only.
3. **compiled**: the smallest model of the family by `torch.compile(backend="fp4fx")` with `compute="fp32"`, beside
   eager mode: relative difference at most 1e-3; what `torch.export` sees beyond the trace without inputs is a failure.
"""


def failures(row: Row) -> list[str]:
    """What a row does not reach, in words; empty if it is as it must be."""
    wrong = []
    if "error" in row:
        wrong.append(row["error"])
    if row.get("unaccounted"):
        wrong.append(f"not accounted for: {', '.join(row['unaccounted'][:3])}")
    if row.get("overlooked"):
        wrong.append(f"used by the model, not found by the trace: {', '.join(row['overlooked'][:3])}")
    if row.get("finite") is False and row["reference_finite"]:
        wrong.append("NaN or infinity where the original has none")
    if row.get("untouched") is False:
        wrong.append("the original's output changed")
    if "difference" in row and not row["difference"] <= TOLERANCE:
        wrong.append(f"compiled differs from eager by {row['difference']:.1e}")
    if row.get("exact_only"):
        wrong.append(f"sites that only torch.export sees: {', '.join(row['exact_only'][:3])}")
    return wrong


def packages() -> dict[str, str | None]:
    """Versions of what the models are from."""
    return {name: version_of(name) for name in ("timm", "torchvision", "transformers")}


def summary(rows: list[Row], known: int) -> str:
    """How many of the models did what."""
    first = [row for row in rows if row["step"] == "quantize"]
    second = [row for row in rows if row["step"] == "compile"]
    good = [row for row in first if not failures(row)]
    ran = sum(row.get("eager") == "ran" for row in good)
    planned = sum(row.get("eager", "").startswith("planned only") for row in good)
    compiled = sum(not failures(row) for row in second)
    return (
        f"{len(first)} of {known} models: {ran} planned, quantized and run, {planned} too large for that and planned, "
        f"{len(first) - len(good)} not as they must be; {compiled} of {len(second)} families compiled"
    )


def page(record: dict[str, Any]) -> str:
    """The result as Markdown: the sums, one line per family, every failure."""
    rows: list[Row] = record["rows"]
    where = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    parts = [INTRODUCTION, f"{headline(record['environment'])}, {where}.", f"**{summary(rows, record['models'])}.**"]
    families: dict[str, list[Row]] = defaultdict(list)
    compiled = {row["family"]: row for row in rows if row["step"] == "compile"}
    for row in rows:
        if row["step"] == "quantize":
            families[row["family"]].append(row)
    heads = (
        "family", "models", "ran", "sites", "in NVFP4", "bits", "SQNR dB",
        "compiled", "graphs", "difference", "kernels", "refused", "since",
    )  # fmt: skip
    lines = [_line(family, here, compiled.get(family)) for family, here in sorted(families.items())]
    parts.append(tabulate(lines, heads, tablefmt="github", missingval="-", disable_numparse=True))
    wrong = [(row["source"], row["step"], why) for row in rows for why in failures(row)]
    if wrong:
        parts.append("## Not as it must be\n\n" + tabulate(wrong, ("model", "step", "what"), tablefmt="github"))
    left = Counter[str]()
    for row in rows:
        left.update(row.get("left_alone", {}))
    if left:
        reasons = tabulate(left.most_common(), ("reason", "parameters"), tablefmt="github")
        parts.append(f"## Parameters of two dimensions or more that are no site\n\n{reasons}")
    refused = Counter[str]()
    for row in compiled.values():
        refused.update(row.get("refusals", {}))
    if refused:
        parts.append("## Refusals\n\n" + tabulate(refused.most_common(), ("reason", "sites"), tablefmt="github"))
    return "\n\n".join(parts) + "\n"


def _line(family: str, rows: list[Row], compiled: Row | None) -> tuple[str | None, ...]:
    planned = [row for row in rows if "sites" in row]
    ran = [row for row in rows if row.get("eager") == "ran"]
    total, packed = (sum(row[key] for row in planned) for key in ("parameters", "quantized"))
    noise = [row["sqnr_db"] for row in ran if row["sqnr_db"] is not None]
    mean_bits = [row["bits"] for row in ran if row["bits"]]
    own = compiled or {}
    kernels = own.get("kernels")
    return (
        family,
        str(len(rows)),
        str(len(ran)),
        str(sum(row["sites"] for row in planned)),
        f"{packed / total:.1%}" if total else None,
        f"{statistics.fmean(mean_bits):.2f}" if mean_bits else None,
        f"{min(noise):.1f} - {max(noise):.1f}" if noise else None,
        own.get("source", "").partition(":")[2] or None,
        str(own["graphs"]) if "graphs" in own else None,
        f"{own['difference']:.0e}" if "difference" in own else None,
        ", ".join(f"{count} {name}" for name, count in kernels.items()) if kernels else None,
        str(sum(own["refusals"].values())) if "refusals" in own else None,
        min(row.get("date", "") for row in (*rows, *filter(None, [compiled]))) or None,
    )
