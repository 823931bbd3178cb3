"""Measure, print the page, write benchmarks/results/formats.json, its plots and docs/formats.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.formats import codecs, measure, page
from benchmarks.versions import versions
from fp4fx import bench
from fp4fx.kernels.cpu import library

RESULT = Path(__file__).parents[1] / "results" / "formats.json"
PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def main() -> None:
    """Run from the command line; the page and the plots are made anew from the JSON by `--draw`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1 << 20, metavar="N", help="values, a multiple of 32768")
    parser.add_argument("--size", type=int, default=1024, metavar="N", help="of the products' matrices")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="JSON", help="the plots lie beside it")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="MD")
    parser.add_argument("--draw", action="store_true", help="measure nothing, take what the JSON has")
    args = parser.parse_args()
    if not args.draw:
        library.load()
        rows = measure.errors((*codecs.FORMATS, *codecs.PEERS), args.samples)
        rows += measure.products(args.size) + measure.global_scales(args.samples)
        record = {"environment": {**bench.environment(), **versions()}, "samples": args.samples, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    record = json.loads(args.out.read_text("utf-8"))
    text = page.page(record)
    args.page.write_text(text, "utf-8")
    print(text)
    print("written to", *map(str, (args.out, args.page, *page.draw(record, args.out.parent))))


if __name__ == "__main__":
    main()
