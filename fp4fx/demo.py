"""The main job on real input, start to end: quantize, explain, compile, compare, save. `fp4fx demo` runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fp4fx import bench, checkpoint, digits, nvfp4
from fp4fx.errors import HubError
from fp4fx.models import create, require
from fp4fx.quantize import quantize
from fp4fx.report import report

Say = Callable[[str], None]

PHOTOGRAPHS = ("china.jpg", "flower.jpg")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels, as the weights of resnet50 expect them."""
SIDE, ROWS, COLUMNS = 224, 2, 4
ROUNDS, WARMUP = 10, 2


def run(folder: Path, say: Say) -> dict[str, Any]:
    """Both parts of the demo.

    Args:
        folder: where the packed resnet50 is written.
        say: takes the text for the reader, a piece at a time.

    Returns:
        What was measured, JSON-ready.

    Raises:
        MissingPackageError: the extra `demo` is not installed.
    """
    where = bench.environment()
    say(bench.headline(where))
    return {"environment": where, "digits": on_digits(say), "resnet50": on_photographs(folder, say)}


def on_digits(say: Say) -> list[dict[str, Any]]:
    """Part 1: accuracy on real data of a network that is trained here."""
    train, test = digits.load()
    say("\n== 1. Handwritten digits: a small ResNet, trained now ==\n")
    model = digits.train(train)
    results = digits.compare(model, test)
    say(digits.table(results))
    say(
        f"\n{len(train.labels)} images to train on, {len(test.labels)} others to test on; "
        f"one test image is {1 / len(test.labels):.2%}, so differences of a few tenths are chance."
    )
    return [asdict(result) for result in results]


def on_photographs(folder: Path, say: Say) -> dict[str, Any]:
    """Part 2 and 3: decisions, bytes, numbers and latency of resnet50 on photographs; the packed file."""
    say("\n== 2. timm resnet50 on two photographs ==\n")
    images = photographs()
    model, trained = resnet50(say)
    start = perf_counter()
    packed = quantize(model, example_inputs=images[:1])
    seconds = perf_counter() - start
    say(f"quantized in {seconds:.1f} s; compiling four graphs takes a minute or two")
    ways = bench.candidates(model, packed, (images[:1],))
    rows = bench.compare(ways, ROUNDS, WARMUP)
    with torch.no_grad():
        dense, quantized = model(images), packed(images)
        eager, compiled = packed(images[:1]), ways[bench.FP4FX].call()
    sqnr, agree = nvfp4.sqnr(dense, quantized), int((dense.argmax(1) == quantized.argmax(1)).sum())
    explained = report(packed)
    say(f"\n{explained}\n")
    say(f"weights: {explained.dense:,} bytes before, {explained.resident:,} bytes after")
    say(f"output SQNR: {sqnr:.1f} dB over {len(images)} crops (logits of the packed model against fp32's)")
    say(f"the compiled graph against the same model run eagerly: {nvfp4.sqnr(eager, compiled):.0f} dB")
    say(
        f"top-1 agreement: {agree} of {len(images)} crops"
        + ("" if trained else "; with random weights the classes are as good as ties, so this count means little")
    )
    say(f"\nlatency, batch 1, the candidates alternated in this process, {ROUNDS} rounds:\n")
    say(bench.table(rows))
    say(f"\n{bench.verdict(rows)}")
    saved = save(packed, folder, say)
    return {
        "pretrained": trained,
        "report": explained.to_dict(),
        "quantize_s": seconds,
        "crops": len(images),
        "sqnr": sqnr,
        "agree": agree,
        "latency": [row.to_dict() for row in rows],
        **saved,
    }


def photographs() -> Tensor:
    """Overlapping crops of both photographs of scikit-learn -> [16, 3, 224, 224] fp32, normalised as ImageNet is."""
    sample = require("sklearn.datasets", "demo").load_sample_image
    crops = []
    for name in PHOTOGRAPHS:
        image = torch.tensor(sample(name)).permute(2, 0, 1)[None] / 255
        scale = ROWS * SIDE / image.shape[2]
        image = interpolate(image, scale_factor=scale, mode="bilinear", antialias=True)
        step = (image.shape[3] - SIDE) // (COLUMNS - 1)
        crops += [
            image[:, :, SIDE * row : SIDE * (row + 1), step * column : step * column + SIDE]
            for row in range(ROWS)
            for column in range(COLUMNS)
        ]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (torch.cat(crops) - mean) / std


def resnet50(say: Say) -> tuple[nn.Module, bool]:
    """The model, and whether it is trained: with the hub's weights if it answers, else random ones, and it says so."""
    try:
        return create("timm:resnet50", pretrained=True), True
    except HubError as error:
        say(f"random weights, because the hub is out of reach ({error.reason})\n")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        # timm starts every residual branch at zero, which would hide most layers from the comparison
        model: nn.Module = require("timm", "vision").create_model("resnet50", zero_init_last=False)
    return model.eval(), False


def save(packed: nn.Module, folder: Path, say: Say) -> dict[str, Any]:
    """Part 3: the packed file, and how to load it."""
    say("\n== 3. The packed file ==\n")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "resnet50.safetensors"
    checkpoint.save(packed, path)
    size = path.stat().st_size
    say(f"{path}: {size:,} bytes. To load it:\n")
    say("    import fp4fx, timm")
    say(f'    model = fp4fx.load(timm.create_model("resnet50"), "{path}").eval()')
    return {"file": str(path), "file_bytes": size}
