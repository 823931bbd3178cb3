"""docs/accuracy.md from the rows: what was to be reached, and a table for every network."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from benchmarks.accuracy.measure import Row
from benchmarks.accuracy.variants import AS_TORCHAO, CALIBRATED, DEFAULT, FP32, TORCHAO
from fp4fx import bench

FEW_BITS = 5.0
"""Per weight, up to which a peer is compared with NVFP4's 4.5."""
DROPS = {DEFAULT: 0.3, CALIBRATED: 1.0}
"""Points that may be lost against fp32."""
SHOWN = ("bits", "share", "bytes", "score", "drop", "loss_bits", "error", "weight_mse")
PEAK = 2.0
"""Times the bytes of the model."""


@dataclass(frozen=True)
class Verdict:
    """One thing to be reached."""

    goal: str
    where: str
    met: bool | None
    """None: not measured."""
    measured: str


@dataclass(frozen=True)
class Summary:
    """A quantity over the seeds."""

    mean: float
    spread: float
    """Standard deviation; 0 for a single seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Of the values of the seeds."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def show(self, digits: int) -> str:
        """Mean ± spread."""
        return f"{self.mean:.{digits}f} ± {self.spread:.{digits}f}" if self.spread else f"{self.mean:.{digits}f}"


def verdicts(rows: Sequence[Row], costs: Sequence[Row] = ()) -> list[Verdict]:
    """What was to be reached, and whether it was."""
    found: list[Verdict] = []
    for net in _unique(row["net"] for row in rows):
        of_net = [row for row in rows if row["net"] == net]
        found += _against_peers(net, of_net)
        for variant, limit in DROPS.items():
            found.append(_drop(net, variant, limit, of_net))
    return found + [_cost(row) for row in costs]


def _against_peers(net: str, rows: Sequence[Row]) -> Iterable[Verdict]:
    for peer in _unique(row["variant"] for row in rows if row["kind"] == "peer"):
        ours_name = AS_TORCHAO if peer == TORCHAO else DEFAULT
        ours, theirs = _by_seed(rows, ours_name), _by_seed(rows, peer)
        goal = f"{ours_name}: error ≤ {peer}'s"
        seeds = sorted(set(ours) & set(theirs))
        if not seeds:
            missing = _reason(rows, peer) if not theirs else f"{ours_name}: {_reason(rows, ours_name)}"
            yield Verdict(goal, net, None, missing)
            continue
        if max(theirs[seed]["bits"] for seed in seeds) > FEW_BITS:
            continue  # more bits, not the same question
        pairs = [(ours[seed]["error"], theirs[seed]["error"]) for seed in seeds]
        mean_ours, mean_theirs = (statistics.fmean(column) for column in zip(*pairs, strict=True))
        difference = Summary.of([a - b for a, b in pairs])
        tie = abs(difference.mean) <= difference.spread
        measured = f"{mean_ours:.4f} against {mean_theirs:.4f}" + (", within the spread" if tie else "")
        yield Verdict(goal, net, mean_ours <= mean_theirs or tie, measured)


def _drop(net: str, variant: str, limit: float, rows: Sequence[Row]) -> Verdict:
    found = _by_seed(rows, variant)
    goal = f"{variant}: within {limit} points of fp32"
    if not found:
        return Verdict(goal, net, None, _reason(rows, variant))
    drop = Summary.of([row["drop"] for row in found.values()])
    return Verdict(goal, net, drop.mean <= limit, f"{drop.show(2)} points lost")


def _cost(row: Row) -> Verdict:
    goal = f"{row['what']}: < {row['limit_s']:g} s, peak memory < {PEAK:g} × the model"
    if "reason" in row:
        return Verdict(goal, row["model"], None, row["reason"])
    met = row["seconds"] < row["limit_s"] and row["peak"] < PEAK
    return Verdict(goal, row["model"], met, f"{row['seconds']:.1f} s, {row['peak']:.2f} × the model")


def summary(record: dict[str, Any]) -> str:
    """What was reached, a line each for what was not."""
    found = verdicts(record["rows"], record["costs"])
    missed = [f"not met: {v.where}: {v.goal}: {v.measured}" for v in found if v.met is False]
    counts = [f"{sum(v.met is met for v in found)} {name}" for met, name in ((True, "met"), (None, "not measured"))]
    return "\n".join([*missed, f"{', '.join(counts)}, {len(missed)} not met"])


def summarised(rows: Sequence[Row], variant: str, key: str) -> Summary:
    """A quantity of a variant that was measured, over its seeds."""
    return Summary.of([row[key] for row in _by_seed(rows, variant).values()])


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _by_seed(rows: Sequence[Row], variant: str) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["variant"] == variant and "reason" not in row}


def _reason(rows: Sequence[Row], variant: str) -> str:
    """Why a variant, or else its whole network, is not there."""
    reasons = {row["variant"]: row["reason"] for row in rows if "reason" in row}
    return reasons.get(variant) or reasons.get(FP32) or "not run"


def net_table(rows: Sequence[Row]) -> str:
    """The variants of one network, as Markdown; below the table those that could not be had, with the reason."""
    lines, absent = [], []
    for variant in _unique(row["variant"] for row in rows):
        if not _by_seed(rows, variant):
            absent.append(f"* {variant}: {_reason(rows, variant)}")
            continue
        numbers = {key: summarised(rows, variant, key) for key in SHOWN}
        error = numbers["error"].mean
        lines.append(
            [
                variant,
                f"{numbers['bits'].mean:.2f}",
                f"{100 * numbers['share'].mean:.0f} %",
                f"{numbers['bytes'].mean / 1e3:.0f}",
                numbers["score"].show(2),
                numbers["drop"].show(2),
                numbers["loss_bits"].show(3),
                f"{1e3 * numbers['weight_mse'].mean:.2f}",
                f"{error:.4f}",
                summarised(rows, variant, "sqnr_db").show(1) if error else "",
            ]
        )
    metric = next((row["metric"] for row in rows if "metric" in row), "score")
    headers = [
        "variant",
        "bits",
        "quantized",
        "kB",
        f"{metric} %",
        "points lost",
        "loss, bits",
        "weights",
        "error",
        "SQNR dB",
    ]
    table = tabulate(lines, headers, tablefmt="github", disable_numparse=True)
    return "\n".join([table, *([""] if absent else []), *absent])


def page(record: dict[str, Any]) -> str:
    """The document."""
    rows, costs = record["rows"], record["costs"]
    found = verdicts(rows, costs)
    counts = {met: sum(verdict.met is met for verdict in found) for met in (True, False, None)}
    names = {True: "met", False: "**not met**", None: "not measured"}
    verdict_rows = [(v.where, v.goal, names[v.met], v.measured) for v in found]
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items() if version)
    parts = [
        "# Accuracy",
        "",
        "Made by `python -m benchmarks.accuracy`; the numbers are those of `benchmarks/results/accuracy.json`.",
        INTRODUCTION,
        f"{bench.headline(record['environment'])}; {packages}.",
        "",
        "![errors of all variants](../benchmarks/results/accuracy.png)",
        "",
        "## What was to be reached",
        "",
        f"{counts[True]} met, {counts[False]} not met, {counts[None]} not measured.",
        "",
        tabulate(verdict_rows, ("where", "what", "", "measured"), tablefmt="github"),
        "",
    ]
    for net in _unique(row["net"] for row in rows):
        of_net = [row for row in rows if row["net"] == net]
        seeds = sorted({row["seed"] for row in of_net})
        inputs = next((row["inputs"] for row in of_net if "inputs" in row), 0)
        parts += [f"## {net}", "", f"{len(seeds)} seed(s), {inputs:,} test inputs.", "", net_table(of_net), ""]
    return "\n".join(parts)


INTRODUCTION = """
Small networks are trained on real data that packages bring along: scikit-learn's digits, turned, shifted and in noise
(resnet, mobilenet, convnext, vit); the same digits on photographs, to be segmented (unet); docstrings and licences, to
be continued (chars). Any other network has timm's name and trained weights, and images of `--dataset`. Every variant of
a network sees the same test inputs; mean ± standard deviation over the seeds of the training. Test inputs come from
images, pictures and texts that no network was trained on.

* *bits*: mean per quantized weight, scales included. *quantized*: share of all parameters. *kB*: of the whole network.
* *error*: ‖y − y₀‖ / ‖y₀‖ over all outputs before the softmax, y₀ being fp32's; SQNR is the same in dB.
* *weights*: mean of ‖w − w₀‖² / ‖w₀‖² over the quantized weights, × 10³; what methods with data trade for *error*.
* *points lost*: of the score, against fp32 with the same seed; below 0 is better than fp32, by chance.
* *loss*: cross entropy; for chars bits per character.
* Peers encode the weights that fp4fx's default policy packs: all but the first, the last and depthwise ones. torchao
  takes Linear layers only, the first and the last too, so it is compared with fp4fx on exactly its layers.
* ModelOpt computes with its fake quantization on CUDA only; what stands here are its encoder, its scale sweep
  (`NVFP4MSECalibrator`) and its decoder, which run on a CPU. Its configurations put blocks on the last axis, for a
  convolution the width of the kernel: 3 values share 16 places, 24 bits per weight in a 3×3 kernel. "ModelOpt NVFP4"
  and "scale sweep" are the same encoders with blocks along the axis that the op sums over.
* Peers of more than 5 bits per weight (FP8, blocks on a kernel's width) are shown and not compared.
* Methods with data (GPTQ, AdaRound, static scales, bias correction) see 256 inputs of the training part, no targets.
"""
