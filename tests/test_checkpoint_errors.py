"""A file that is damaged or does not fit is refused by name, and the model is left as it was."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fp4fx
from fp4fx.checkpoint import load, save
from fp4fx.packed import Packed
from tests.checkpoints import (
    ALL,
    assert_same_bits,
    assert_same_contents,
    assert_unchanged,
    contents,
    everything,
    snapshot,
)
from tests.models import ConvNet, UNet


def refuses(path, message, make=ConvNet):
    """Loading fails as said, with the file in the message, and leaves a dense model and one on meta as they were."""
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = make()
        before = snapshot(model)
        with pytest.raises(fp4fx.CheckpointError, match=message) as error:
            load(model, path)
        assert str(path) in str(error.value)
        assert_unchanged(model, before)


def test_a_missing_file(tmp_path):
    model = ConvNet()
    before = snapshot(model)
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"{path}: no such file"):
            load(model, path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file(size, good, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(good.read_bytes()[:size])
    refuses(path, "no whole safetensors file.*cut off, damaged")


def test_files_of_another_kind(good, tmp_path):
    path = tmp_path / "m.safetensors"
    torch.save(ConvNet().state_dict(), path)
    refuses(path, "no whole safetensors file")
    save_file(ConvNet().state_dict(), path)
    refuses(path, "format 'unknown', expected 'fp4fx'; load it by the library that wrote it")
    save_file(ConvNet().state_dict(), path, {"format": "pt"})
    refuses(path, "format 'pt', expected 'fp4fx'")


def edited(key, change):
    """A damage to one metadata entry, given as a function on its JSON value."""
    return lambda metadata: metadata.update({key: json.dumps(change(json.loads(metadata[key])))})


METADATA = {
    "newer": (lambda m: m.update(version="2"), "version 2, expected version 1; install"),
    "no version": (lambda m: m.pop("version"), "version None, expected version 1"),
    "no plan": (lambda m: m.pop("plan"), "metadata: 'plan' is missing; the file is damaged"),
    "half a plan": (lambda m: m.update(plan=m["plan"][:100]), r"metadata: .*char \d+\); the file is damaged"),
    "no mapping": (lambda m: m.update(plan="[1]"), "metadata: plan: found format 'list'"),
    "newer plan": (edited("plan", lambda p: {**p, "version": 9}), "plan: found version 9"),
    "odd site": (edited("plan", lambda p: p["decisions"][1]["site"].update(shape=[1, 2]) or p), "does not hold"),
    "odd dtype": (
        edited("packed", lambda p: {**p, "body.weight": {"dtype": "int4", "sqnr": 1.0}}),
        "body.weight.*'int4'",
    ),
    "other weights": (edited("packed", lambda p: {}), "packed: found other parameters"),
    "no tensor": (edited("tied", lambda t: {"again": "nothing"}), "tied: found a name that is not tied to"),
    "tied twice": (edited("tied", lambda t: {"bn.bias": "bn.weight"}), "tied: found a name that is not tied to"),
    "odd names": (edited("tied", lambda t: {"again": ["bn.bias"]}), "tied: found a name that is not tied to"),
    "extra name": (edited("tied", lambda t: {"again": "bn.bias"}), "missing tensors: none, extra tensors: again"),
}


@pytest.mark.parametrize("damage", METADATA)
def test_damaged_metadata(damage, good, tmp_path):
    change, message = METADATA[damage]
    tensors, metadata = contents(good)
    change(metadata)
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    refuses(tmp_path / "m.safetensors", message)


def put(name, value):
    """A damage to one tensor: another value in its first place."""
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


def swap(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


E4M3 = r"body\.weight_scale: found byte {} at \[0, 0\], expected positive E4M3 numbers.*damaged"
POSITIVE = "expected a positive finite number; the file is damaged"
TENSORS = {
    "missing": (lambda t: t.pop("body.weight_scale"), r"missing tensors: body\.weight_scale, extra tensors: none"),
    "missing kept": (lambda t: t.pop("bn.running_mean"), r"missing tensors: bn\.running_mean"),
    "extra": (
        lambda t: t.update(lora=torch.zeros(2)),
        "missing tensors: none, extra tensors: lora, expected those of the model; build",
    ),
    "many": (lambda t: [t.pop(n) for n in list(t) if "body" in n], r"missing tensors: body\.bias, .* and 2 more"),
    "shape": (swap("body.bias", lambda t: t[:5]), r"body\.bias: found shape \(5,\), expected \(32,\); build the model"),
    "packed shape": (
        swap("body.weight_packed", lambda t: t[:, :8]),
        r"packed: found shape \(32, 8\), expected \(32, 144\)",
    ),
    "scale shape": (swap("body.weight_global_scale", lambda t: t.view(1)), r"found shape \(1,\), expected \(\)"),
    "dtype": (swap("body.bias", lambda t: t.int()), r"body\.bias: found torch\.int32, expected torch\.float32; build"),
    "packed dtype": (
        swap("body.weight_packed", lambda t: t.view(torch.int8)),
        r"packed: found torch\.int8, .*uint8; the",
    ),
    "scale dtype": (
        swap("body.weight_scale", lambda t: t.view(torch.float8_e4m3fn)),
        r"float8_e4m3fn, expected torch.uint8",
    ),
    "global dtype": (swap("body.weight_global_scale", lambda t: t.half()), r"global_scale: found torch\.float16"),
    "nan scale": (put("body.weight_scale", 0x7F), E4M3.format("0x7f")),
    "-nan scale": (put("body.weight_scale", 0xFF), E4M3.format("0xff")),
    "zero scale": (put("body.weight_scale", 0), E4M3.format("0x00")),
    "negative scale": (put("body.weight_scale", 0xB8), E4M3.format("0xb8")),
    "nan": (put("body.weight_global_scale", torch.nan), rf"body\.weight_global_scale: found nan, {POSITIVE}"),
    "inf": (put("body.weight_global_scale", torch.inf), POSITIVE),
    "zero": (put("body.weight_global_scale", 0.0), POSITIVE),
    "negative": (put("body.weight_global_scale", -1.0), POSITIVE),
    "input": (put("body.input_global_scale", torch.nan), rf"body\.input_global_scale: found nan, {POSITIVE}"),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_damaged_tensors(damage, good, tmp_path):
    change, message = TENSORS[damage]
    tensors, metadata = contents(good)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "m.safetensors", metadata)
    refuses(tmp_path / "m.safetensors", message)


def test_an_undamaged_copy_loads(good, tmp_path):
    """The near miss of all the damages above."""
    tensors, metadata = contents(good)
    put("body.weight_scale", 0x7E)(tensors)
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    assert load(ConvNet(), tmp_path / "m.safetensors").body.weight_scale[0, 0] == 0x7E


def test_models_of_another_architecture(good, tmp_path):
    refuses(good, "a ConvNet does not fit here: .*no such parameter", UNet)
    refuses(good, r"does not fit here: stem\.weight: found shape \(16, 3, 3, 3\)", lambda: ConvNet(16))
    refuses(good, "missing tensors: spare.bias, spare.weight", lambda: grown(ConvNet()))
    save(fp4fx.quantize(grown(ConvNet()), fp4fx.Policy(include=["body"])), tmp_path / "m.safetensors")
    refuses(tmp_path / "m.safetensors", "extra tensors: spare.bias, spare.weight")


def grown(model):
    model.spare = nn.LayerNorm(4)
    return model


def test_a_quantized_model_is_not_loaded_into(good):
    q = fp4fx.quantize(ConvNet(), ALL)
    before = snapshot(q)
    with pytest.raises(fp4fx.CheckpointError, match=r"found a quantized model to load into.*build it anew"):
        load(q, good)
    assert_unchanged(q, before)
    with pytest.raises(fp4fx.CheckpointError, match="found str"):
        load("resnet50", good)


def test_a_plain_tensor_attribute_cannot_be_restored_on_meta(tmp_path):
    class Plain(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(32, 8))
            self.mean = torch.zeros(3)

    save(fp4fx.quantize(Plain(), ALL), tmp_path / "m.safetensors")
    assert isinstance(load(Plain(), tmp_path / "m.safetensors")[0], Packed)
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(fp4fx.CheckpointError, match="mean: found a plain attribute on the meta device"):
        load(model, tmp_path / "m.safetensors")


def test_the_loaded_tensors_do_not_depend_on_the_file(good, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(good.read_bytes())
    loaded = load(ConvNet(), path)
    expected = {name: t.clone() for name, t in everything(loaded).items()}
    path.write_bytes(bytes(path.stat().st_size))
    assert_same_bits(everything(loaded), expected)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in everything(loaded).values())


def test_loading_does_not_unpickle(good):
    program = f"""
        import pickle, sys
        import torch
        import fp4fx.checkpoint
        from tests.models import ConvNet

        def refuse(*args, **kwargs):
            raise SystemExit("something was unpickled")

        class Refused(pickle.Unpickler):
            __init__ = refuse

        pickle.load = pickle.loads = torch.load = refuse
        pickle.Unpickler = Refused
        sys.addaudithook(lambda event, args: event == "pickle.find_class" and refuse())
        with torch.device("meta"):
            model = ConvNet().eval()
        loaded = fp4fx.checkpoint.load(model, {str(good)!r})
        print(loaded(torch.ones(1, 3, 8, 8)).isfinite().all().item())
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_go_where_the_model_is_or_where_they_are_told(good, tmp_path):
    expected = load(ConvNet(), good)
    with torch.device("meta"):
        meta = ConvNet()
    for loaded in (load(ConvNet().cuda(), good), load(ConvNet(), good, device="cuda"), load(meta, good, device="cuda")):
        assert {t.device.type for t in everything(loaded).values()} == {"cuda"}
        assert_same_bits({n: t.cpu() for n, t in everything(loaded).items()}, everything(expected))
    assert {t.device.type for t in everything(load(ConvNet().cuda(), good, device="cpu")).values()} == {"cpu"}
    save(load(ConvNet().cuda(), good), tmp_path / "m.safetensors")
    assert_same_contents(tmp_path / "m.safetensors", good)
