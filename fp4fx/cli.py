"""The command `fp4fx`: quantize, plan, report, sensitivity, bench, demo.

Results go to stdout, progress to stderr. Exit codes: 0 done, 1 an error of fp4fx (message on stderr), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fp4fx import __version__, bench, checkpoint, demo
from fp4fx.errors import Error
from fp4fx.models import create, input_shape
from fp4fx.plan import plan
from fp4fx.policy import Policy
from fp4fx.quantize import quantize
from fp4fx.report import report
from fp4fx.sensitivity import sensitivity

MODEL = "timm:NAME, torchvision:NAME, or module:callable (imported, also from the current directory, and called)"
EXAMPLES = """\
examples:
  fp4fx plan timm:resnet50 --no-pretrained
  fp4fx quantize timm:resnet50 --out resnet50.safetensors
  fp4fx quantize my_package.models:make_unet --preset segmentation --input-shape 1,3,256,256 --out unet.safetensors
  fp4fx quantize timm:vit_base_patch16_224 --set 'max_kurtosis=10' --set 'exclude=["head"]' --out vit.safetensors
  fp4fx report timm:resnet50 resnet50.safetensors --compile
  fp4fx sensitivity timm:resnet50 --data images.npy --plot resnet50.png
  fp4fx bench torchvision:resnet18 --rounds 30 --json > resnet18.json

exit codes: 0 done, 1 an error of fp4fx (message on stderr), 2 wrong usage
"""
PRESETS = ("weight_only", "w4a4", "segmentation")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (wrong usage exits at once, with 2)."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = args.run
    try:
        run(args)
    except Error as error:
        print(f"fp4fx {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fp4fx",
        description="Any PyTorch model in NVFP4.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fp4fx {__version__}, torch {torch.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(run.__name__.strip("_"), help=text, description=text)
        parser.set_defaults(run=run, parser=parser)
        parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
        return parser

    parser = command(_quantize, "pack the weights of a model and write them to a safetensors file")
    _add_model(parser, pretrained=True)
    _add_policy(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")

    parser = command(_plan, "show what would be quantized, and why; writes nothing")
    _add_model(parser, pretrained=True)
    _add_policy(parser)

    parser = command(_report, "show what became of every weight, of a file or of a model quantized now")
    _add_model(parser, pretrained=True)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="what `fp4fx quantize` wrote for this model")
    _add_policy(parser)
    parser.add_argument("--compile", action="store_true", help="compile and run it once, to name the kernels too")

    parser = command(_sensitivity, "show what NVFP4 does to each layer alone: to its weight and to its output")
    _add_model(parser, pretrained=True)
    _add_policy(parser)
    parser.add_argument("--data", type=Path, metavar="FILE.npy", help="inputs of the model, one array [N, ...]")
    parser.add_argument("--batch", type=_count, default=32, metavar="N", help="inputs per forward (32)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: a PNG, SVG or PDF file (needs matplotlib)")

    parser = command(_bench, "time a model: eager, Inductor and fp4fx, in fp32 and bf16, alternated")
    _add_model(parser, pretrained=False)
    _add_policy(parser)
    parser.add_argument("--rounds", type=_count, default=20, metavar="N", help="measured rounds (20)")
    parser.add_argument("--warmup", type=_count, default=3, metavar="N", help="rounds before them (3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")

    parser = command(_demo, "the whole way on real input, in minutes: accuracy on digits, resnet50 on photographs")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="FOLDER", help="where files go (demo)")
    return top


def _add_model(parser: argparse.ArgumentParser, *, pretrained: bool) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=pretrained,
        help=f"trained weights for timm and torchvision models (default: {'yes' if pretrained else 'no'})",
    )
    parser.add_argument(
        "--input-shape",
        type=_shape,
        action="append",
        metavar="N,N,...",
        help="shape of an example input, e.g. 1,3,224,224, once per argument of the model; makes the trace exact",
    )


def _add_policy(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--policy", type=Path, metavar="FILE.toml", help="fields of fp4fx.Policy as TOML")
    source.add_argument("--preset", choices=PRESETS, help="a policy by name")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the policy; the value is TOML, a bare word, true, false or none",
    )


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected sizes such as 1,3,224,224")
    return shape


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 1 or more")
    return int(text)


def _setting(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not field.strip() or not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected FIELD=VALUE, such as skip_first=0")
    words = {"true": True, "false": False, "none": None}
    if value.strip().lower() in words:
        return field.strip(), words[value.strip().lower()]
    try:
        return field.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return field.strip(), value.strip()


def _policy(args: argparse.Namespace) -> Policy:
    base = Policy()
    if args.policy is not None:
        base = Policy.from_toml(args.policy)
    elif args.preset is not None:
        base = getattr(Policy, args.preset)()
    return Policy.from_dict({**base.to_dict(), **dict(args.set)})


def _quantize(args: argparse.Namespace) -> None:
    if not args.out.parent.is_dir():
        _refuse(args, f"--out: there is no folder {args.out.parent}")
    policy = _policy(args)
    with tqdm(total=3, desc="make the model", unit="step", disable=None, leave=False) as bar:
        model = create(args.model, pretrained=args.pretrained)
        _next(bar, "quantize")
        packed = quantize(model, policy, _example(args))
        _next(bar, "write the file")
        checkpoint.save(packed, args.out)
    explained, size = report(packed), args.out.stat().st_size
    if args.json:
        _print_json({"model": args.model, "file": str(args.out), "file_bytes": size, "report": explained.to_dict()})
    else:
        print(f"{explained}\n{args.out}: {size:,} bytes; fp4fx report {args.model} {args.out} shows it again")


def _plan(args: argparse.Namespace) -> None:
    chosen = plan(create(args.model, pretrained=args.pretrained), _policy(args), _example(args))
    if args.json:
        _print_json(chosen.to_dict())
    else:
        print(chosen)


def _report(args: argparse.Namespace) -> None:
    if args.file is None:
        packed = quantize(create(args.model, pretrained=args.pretrained), _policy(args), _example(args))
    elif args.policy or args.preset or args.set:
        _refuse(args, "FILE has its policy in it; leave out --policy, --preset and --set")
    elif not args.file.is_file():
        _refuse(args, f"there is no file {args.file}")
    else:
        packed = checkpoint.load(create(args.model, pretrained=False), args.file)
    if args.compile:
        inputs = _inputs(args, packed)
        with torch.no_grad(), tqdm(total=1, desc="compile", disable=None, leave=False):
            torch.compile(packed, backend="fp4fx")(*inputs)
    explained = report(packed)
    if args.json:
        _print_json(explained.to_dict())
    else:
        print(explained)


def _sensitivity(args: argparse.Namespace) -> None:
    if args.plot is not None and not args.plot.parent.is_dir():
        _refuse(args, f"--plot: there is no folder {args.plot.parent}")
    data = _data(args)
    if data is None and args.input_shape is not None:
        data = [_noise(args.input_shape)]
    policy = _policy(args) if args.policy or args.preset or args.set else None
    found = sensitivity(create(args.model, pretrained=args.pretrained), data, policy=policy)
    if args.plot is not None:
        found.plot(args.plot)
    print(found.to_json() if args.json else found)


def _data(args: argparse.Namespace) -> Sequence[Any] | None:
    """Batches of the array in the file asked for, or None."""
    if args.data is None:
        return None
    try:
        array = np.load(args.data, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        _refuse(args, f"--data: {args.data} cannot be read as an array of numpy: {error}")
    if not isinstance(array, np.ndarray) or not array.ndim:
        _refuse(args, f"--data: {args.data} holds no array [N, ...]")
    return list(torch.split(torch.from_numpy(array), args.batch))


def _bench(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        _refuse(args, "--device: torch sees no CUDA device here")
    model = create(args.model, pretrained=args.pretrained)
    inputs = _inputs(args, model)
    packed = quantize(model, _policy(args), inputs)
    device = torch.device(args.device)
    ways = bench.candidates(model.to(device), packed.to(device), [x.to(device) for x in inputs])
    rows = bench.compare(ways, args.rounds, args.warmup)
    where = bench.environment(device)
    if args.json:
        shapes = [list(x.shape) for x in inputs]
        measured = [row.to_dict() for row in rows]
        _print_json({"model": args.model, "input_shapes": shapes, "environment": where, "rows": measured})
    else:
        print(f"{bench.headline(where)}\n\n{bench.table(rows)}\n\n{bench.verdict(rows)}")


def _demo(args: argparse.Namespace) -> None:
    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    measured = demo.run(args.out, say)
    if args.json:
        _print_json(measured)


def _next(bar: tqdm[Any], description: str) -> None:
    bar.set_description_str(description, refresh=False)
    bar.update()


def _example(args: argparse.Namespace) -> tuple[Tensor, ...] | None:
    """Example inputs of the shapes asked for, or None."""
    return None if args.input_shape is None else _noise(args.input_shape)


def _inputs(args: argparse.Namespace, model: nn.Module) -> tuple[Tensor, ...]:
    """Example inputs of the shapes asked for, or of the one that the model takes."""
    shape = input_shape(args.model, model)
    if args.input_shape is None and shape is None:
        _refuse(args, f"--input-shape: {args.model} has to be run, and nothing is known of what it takes")
    return _noise(args.input_shape or [shape])


def _noise(shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _refuse(args: argparse.Namespace, message: str) -> NoReturn:
    """Wrong usage that only shows once the arguments are seen together."""
    parser: argparse.ArgumentParser = args.parser
    parser.error(message)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))
