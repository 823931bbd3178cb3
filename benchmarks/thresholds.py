"""What `max_kurtosis` and `min_sqnr` do on trained networks, beside a choice by output error at the same bits.

For each network thresholds keep the worst tenth, quarter and half of the sites; the nearest peer is
`Policy.for_budget` with the bits that a threshold took. Writes a JSON file, in which networks measured before stay,
and a page of the documentation.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fp4fx
from benchmarks.accuracy import nets
from benchmarks.accuracy.measure import score
from fp4fx import Policy, bench, nvfp4

RESULT = Path(__file__).parent / "results" / "thresholds.json"
DOCS = Path(__file__).resolve().parents[1] / "docs" / "thresholds.md"
NETS = ("resnet", "vit", "unet", "mobilenet", "convnext", "chars")
SHARES = (0.1, 0.25, 0.5)
"""Of the sites that a threshold keeps."""
CALIBRATION = {"unet": 32}
"""Inputs of the training part that scores are taken on, where it is not 128."""

Row = dict[str, Any]


def rows_of(name: str, seed: int, inputs: int) -> tuple[list[Row], Row]:
    """The rows of one network, and what kurtosis says about its layers.

    Args:
        name: of `nets.RECIPES`.
        seed: of its training.
        inputs: of the test part that it is tested on.
    """
    recipe = nets.RECIPES[name]
    model = nets.trained(name, seed)
    test, train = recipe.data("test")[:inputs], recipe.data("train")[: CALIBRATION.get(name, 128)]
    batches = train.batches(32)
    reference = outputs(model, test.inputs)
    dense = score(reference, test.targets, recipe.metric)
    everything = Policy(skip_first=0, skip_last=0, depthwise=True, embeddings=True)

    def row(rule: str, policy: Policy, value: float | None = None) -> Row:
        packed = fp4fx.quantize(model, policy, batches[0])
        scores = outputs(packed, test.inputs)
        found = score(scores, test.targets, recipe.metric)
        return {
            "net": name,
            "seed": seed,
            "rule": rule,
            "value": value,
            **stored(fp4fx.plan(model, policy, batches[0])),
            "sqnr_db": nvfp4.sqnr(reference, scores),
            "metric": recipe.metric,
            "score": found,
            "drop": dense - found,
        }

    measured = fp4fx.sensitivity(model, batches, policy=everything)
    free = fp4fx.sensitivity(model, policy=everything)
    rows = [row("none", everything)]
    rows += [row("first and last", replace(everything, skip_first=n, skip_last=n), n) for n in (1, 2)]
    for rule, values in (
        ("max_kurtosis", [-r.kurtosis for r in measured.rows if r.kurtosis is not None]),
        ("min_sqnr", [r.weight_sqnr for r in measured.rows]),
    ):
        for share in SHARES:
            least = threshold(values, share)
            value = -least if rule == "max_kurtosis" else least
            rows.append(row(rule, Policy.from_dict({**everything.to_dict(), rule: value}), value))
    for taken in rows[1:].copy():
        chosen = Policy.for_budget(model, bits=taken["bits"], batches=batches, policy=everything)
        rows.append({**row("for_budget", chosen), "beside": [taken["rule"], taken["value"]]})
    kurtosis = [r.kurtosis for r in measured.rows if r.kurtosis is not None]
    of_weights = [r.weight_sqnr for r in measured.rows]
    of_outputs = [r.output_sqnr for r in measured.rows if r.output_sqnr is not None]
    study = {
        "net": name,
        "seed": seed,
        "metric": recipe.metric,
        "fp32": dense,
        "inputs": len(test),
        "sites": len(measured.rows),
        "kurtosis": [min(kurtosis), max(kurtosis)],
        "weight_sqnr_db": [min(of_weights), max(of_weights)],
        "output_sqnr_db": [min(of_outputs), max(of_outputs)],
        "correlation": dict(measured.correlation),
        "correlation_without_data": dict(free.correlation),
    }
    return rows, study


def threshold(values: Sequence[float], share: float) -> float:
    """A limit, between two of the values, that this share of them, at least one, lies below."""
    ordered = sorted(values)
    place = max(1, round(share * len(ordered)))
    return (ordered[place - 1] + ordered[place]) / 2


def stored(plan: fp4fx.Plan) -> Row:
    """How many sites a plan keeps, the share of all their values in NVFP4, and mean bits per value."""
    sites = {d.site.parameter: d for d in plan.decisions}.values()
    numel = sum(d.site.numel for d in sites)
    return {
        "kept": sum(d.spec is None and d.rule != "skip_norms" for d in sites),
        "share": sum(d.site.numel for d in sites if d.spec is not None) / numel,
        "bits": sum(d.nbytes * 8 if d.spec is not None else d.site.numel * 32 for d in sites) / numel,
    }


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Scores fp32 [N, classes, ...] of all inputs."""
    return torch.cat([model(part) for part in torch.split(inputs, 100)])


def document(record: Row) -> str:
    """The page of the documentation."""
    where = record["environment"]
    lines = [
        "# What thresholds do",
        "",
        "`python -m benchmarks.thresholds` wrote this page. `Policy(max_kurtosis=...)` keeps the weights whose excess",
        "kurtosis is above a limit, `Policy(min_sqnr=...)` those whose NVFP4 form is below so many dB; both look at",
        "the weight alone. Here each keeps the worst tenth, quarter and half of the sites of trained networks. The",
        "last two columns are what [`Policy.for_budget`](choosing.md), which looks at the error of the network's",
        "output, reaches with the bits of that row. All sites but the normalisations take part.",
        "",
        f"{bench.headline(where)}.",
        "",
        "## Kurtosis and error",
        "",
    ]
    studies = [
        (
            s["net"],
            s["sites"],
            "{:.2f} … {:.2f}".format(*s["kurtosis"]),
            "{:.1f} … {:.1f}".format(*s["weight_sqnr_db"]),
            "{:.1f} … {:.1f}".format(*s["output_sqnr_db"]),
            *(_two(s["correlation"].get(kind)) for kind in ("weight", "output")),
        )
        for s in record["studies"]
    ]
    headers = ("net", "sites", "kurtosis", "weight dB", "output dB", "r with weight error", "r with output error")
    lines += [tabulate(studies, headers, tablefmt="pipe", disable_numparse=True), ""]
    lines += [
        "r is Spearman's rank correlation of kurtosis with noise over signal, of weights and of layers' outputs.",
        "",
    ]
    for study in record["studies"]:
        rows = [r for r in record["rows"] if (r["net"], r["seed"]) == (study["net"], study["seed"])]
        beside = {tuple(r["beside"]): r for r in rows if "beside" in r}
        table = []
        for r in rows:
            if "beside" in r:
                continue
            other = beside.get((r["rule"], r["value"]))
            limit = "" if r["value"] is None else f"={r['value']:.2f}".removesuffix(".00")
            table.append(
                (
                    r["rule"] + limit,
                    r["kept"],
                    f"{r['share']:.1%}",
                    f"{r['bits']:.2f}",
                    f"{r['sqnr_db']:.1f}",
                    f"{r['score']:.2f}",
                    "" if other is None else f"{other['sqnr_db']:.1f}",
                    "" if other is None else f"{other['score']:.2f}",
                )
            )
        names = (
            "rule",
            "kept",
            "in NVFP4",
            "bits",
            "output dB",
            study["metric"],
            "by output error: dB",
            study["metric"],
        )
        title = f"## {study['net']}, seed {study['seed']}: {study['fp32']:.2f} in fp32 on {study['inputs']} test inputs"
        lines += [title, "", tabulate(table, names, tablefmt="pipe", disable_numparse=True), ""]
    return "\n".join([*lines, *verdict(record), ""])


def verdict(record: Row) -> list[str]:
    """In how many cases the choice by output error is better than the threshold with the same bits."""
    rows = record["rows"]
    first = {(r["net"], r["seed"], r["rule"], r["value"]): r for r in rows if "beside" not in r}
    lines = ["## In sum", ""]
    for rule in ("first and last", "max_kurtosis", "min_sqnr"):
        pairs = [
            (r["sqnr_db"], first[r["net"], r["seed"], *r["beside"]]["sqnr_db"])
            for r in rows
            if r.get("beside", [None])[0] == rule
        ]
        gains = [ours - theirs for ours, theirs in pairs]
        if not gains:
            continue
        no_worse = sum(gain > -0.05 for gain in gains)
        lines.append(
            f"* {rule}: at the same bits the choice by output error is as good or better in {no_worse} of {len(gains)} "
            f"cases, by {sum(gains) / len(gains):.1f} dB on average ({min(gains):.1f} to {max(gains):.1f})."
        )
    return lines


def _two(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:+.2f}"


def main() -> None:
    """Measure, write the JSON file and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS[:3]), help="resnet vit unet")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the training (0)")
    parser.add_argument("--inputs", type=int, default=1000, metavar="N", help="test inputs at most (1000)")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="JSON")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="FILE.md")
    args = parser.parse_args()
    record: Row = {"rows": [], "studies": []}
    if args.out.exists():
        record = json.loads(args.out.read_text("utf-8"))
    record = {**record, "environment": bench.environment(torch.device("cpu"))}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in tqdm(args.nets, unit="net", disable=None):
        for seed in args.seeds:
            rows, study = rows_of(name, seed, args.inputs)
            for part, new in (("rows", rows), ("studies", [study])):
                others = [row for row in record[part] if (row["net"], row["seed"]) != (name, seed)]
                record[part] = sorted([*others, *new], key=lambda row: (NETS.index(row["net"]), row["seed"]))
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    args.docs.write_text(document(record), encoding="utf-8")
    print(f"written to {args.out} and {args.docs}")


if __name__ == "__main__":
    main()
