"""Accuracy of fp4fx's variants and of its peers on networks trained here, or on timm's models and images of yours.

Writes a JSON of all rows, the page docs/accuracy.md and a plot. Every row is written as it comes, and a run goes on
where the JSON has no row yet; a row that only says why it could not be had is tried again. `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
RESULT, PAGE = ROOT / "benchmarks" / "results" / "accuracy.json", ROOT / "docs" / "accuracy.md"
QUICK_STEPS, QUICK_INPUTS = 20, 200
PACKAGES = ("timm", "torchvision", "torchao", "nvidia-modelopt", "bitsandbytes", "scikit-learn", "scikit-image")

Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--nets", nargs="*", metavar="NET", help="networks trained here; by default all")
    result.add_argument("--seeds", nargs="*", type=int, metavar="N", help="by default 0 1 2")
    result.add_argument("--only", nargs="*", metavar="TEXT", help="variants whose name has one of these in it")
    result.add_argument("--dataset", type=Path, metavar="FOLDER", help="images in one folder per class: timm's models")
    result.add_argument("--models", nargs="*", default=["resnet50", "vit_base_patch16_224", "convnext_tiny"])
    result.add_argument("--no-pretrained", action="store_true", help="random weights, to try --dataset out")
    result.add_argument("--limit", type=int, metavar="N", help="test images of --dataset")
    result.add_argument("--cost", action="store_true", help="only seconds and memory of quantizing a ViT")
    result.add_argument("--quick", action="store_true", help="hardly trained networks, few inputs, one seed")
    result.add_argument("--fresh", action="store_true", help="forget what was done")
    result.add_argument("--out", type=Path, metavar="FILE", help=f"by default {RESULT.relative_to(ROOT)}")
    result.add_argument("--page", type=Path, metavar="FILE", help=f"by default {PAGE.relative_to(ROOT)}")
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not measured yet, write the result."""
    args = parser().parse_args(arguments)
    folder = ROOT / "build" / "accuracy"
    trial = args.quick or args.no_pretrained
    args.out = args.out or (folder / "trial.json" if trial else RESULT)
    args.page = args.page or (folder / "trial.md" if trial else PAGE)
    for path in (args.out, args.page):
        path.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"rows": [], "costs": []}
    if args.out.exists() and not args.fresh:
        record |= json.loads(args.out.read_text("utf-8"))
    if args.cost:
        from benchmarks.accuracy import cost  # noqa: PLC0415  (after --help)

        record["costs"] = cost.costs()
    else:
        measure(record, args)
    write(record, args.out)
    finish(record, args)


def measure(record: dict[str, Any], args: argparse.Namespace) -> None:
    """Add the rows that are missing."""
    from benchmarks.accuracy.measure import outputs, row_of  # noqa: PLC0415
    from benchmarks.accuracy.variants import variants  # noqa: PLC0415
    from fp4fx.errors import HubError  # noqa: PLC0415

    chosen = [v for v in variants() if not args.only or any(text in v.name for text in args.only)]
    rows = {(row["net"], row["seed"], row["variant"]): row for row in record["rows"]}
    for net, seed, make in tasks(args):
        todo = [v for v in chosen if "reason" in rows.get((net, seed, v.name), {"reason": "not run"})]
        if not todo:
            continue
        try:
            task = make()
        except HubError as error:
            todo = []
            rows[net, seed, "fp32"] = {
                "net": net, "seed": seed, "variant": "fp32", "kind": "reference", "reason": str(error),
            }  # fmt: skip
        else:
            reference, _ = outputs(task.model, task)
        for variant in tqdm(todo, desc=f"{net}, seed {seed}", unit="variant", disable=None, leave=False):
            row = rows[net, seed, variant.name] = row_of(task, variant, reference)
            if row.pop("failed", False):
                tqdm.write(f"{net}, seed {seed}: {variant.name}: {row['reason']}")
            record["rows"] = list(rows.values())
            write(record, args.out)
    nets, names = list(dict.fromkeys(row["net"] for row in rows.values())), [v.name for v in variants()]
    kept = [row for row in rows.values() if row["variant"] in names]
    kept.sort(key=lambda row: (nets.index(row["net"]), row["seed"], names.index(row["variant"])))
    record["rows"] = kept


def tasks(args: argparse.Namespace) -> Iterable[tuple[str, int, Callable[[], Any]]]:
    """Network, seed, and how to get it: trained here, all of one seed first, or timm's."""
    if args.dataset:
        from benchmarks.accuracy import imagenet  # noqa: PLC0415

        for name in args.models:
            options = {"pretrained": not args.no_pretrained, "limit": args.limit}
            yield name, 0, lambda name=name, options=options: imagenet.task(args.dataset, name, **options)
        return
    from benchmarks.accuracy import nets  # noqa: PLC0415
    from benchmarks.accuracy.measure import trained_task  # noqa: PLC0415

    short = {"steps": QUICK_STEPS, "inputs": QUICK_INPUTS} if args.quick else {}
    for seed in args.seeds or (nets.SEEDS[:1] if args.quick else nets.SEEDS):
        for net in args.nets or nets.RECIPES:
            yield net, seed, lambda net=net, seed=seed: trained_task(net, seed, **short)


def write(record: dict[str, Any], out: Path) -> None:
    """The record as JSON, a row a line; what was there is replaced at once or not at all."""
    from fp4fx import bench  # noqa: PLC0415

    record["environment"] = bench.environment()
    record["packages"] = {name: bench.version_of(name) for name in PACKAGES}
    head = json.dumps({key: record[key] for key in ("environment", "packages")}, indent=1)[:-2]
    parts = [f' "{key}": [\n' + ",\n".join(map(json.dumps, record[key])) + "\n]" for key in ("costs", "rows")]
    new = out.with_suffix(".new")
    new.write_text(",\n".join([head, *parts]) + "\n}\n", "utf-8")
    new.replace(out)


def finish(record: dict[str, Any], args: argparse.Namespace) -> None:
    """The page, the plot, and what was reached in the terminal."""
    from benchmarks.accuracy import table  # noqa: PLC0415

    args.page.write_text(table.page(record), "utf-8")
    print(table.summary(record))
    try:
        from benchmarks.accuracy import plot  # noqa: PLC0415
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed")
    else:
        plot.draw(record, args.out.with_suffix(".png"))
    print(f"written to {args.out} and {args.page}")


if __name__ == "__main__":
    main()
