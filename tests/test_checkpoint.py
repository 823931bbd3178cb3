"""One safetensors file: what is saved comes back bit by bit."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import fp4fx
from fp4fx import nvfp4
from fp4fx.checkpoint import load, save
from fp4fx.packed import plan_of
from tests.checkpoints import (
    ALL,
    IMAGE,
    STATIC,
    W4A4,
    Rotary,
    assert_same_bits,
    assert_same_contents,
    assert_unchanged,
    contents,
    everything,
    packed_modules,
    snapshot,
)
from tests.models import Attention, ConvNet, Tied, UNet

MODELS = {
    "cnn": (lambda: ConvNet(24), ALL, IMAGE),
    "segmentation": (UNet, fp4fx.Policy.segmentation(), IMAGE),
    "norms": (ConvNet, fp4fx.Policy(skip_norms=False, skip_first=0, skip_last=0), IMAGE),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 7)).bfloat16(),
        ALL,
        torch.randn(3, 40).bfloat16(),
    ),
    "linear": (lambda: nn.Linear(40, 8), ALL, torch.randn(3, 40)),
    "attention": (Attention, ALL, torch.randn(2, 3, 8)),
    "tied": (Tied, fp4fx.Policy(embeddings=True, skip_first=0, skip_last=0), torch.tensor([1, 39])),
    "tied_kept": (Tied, ALL, torch.tensor([1, 39])),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 16)), ALL, torch.randn(2, 32)),
    "rotary": (Rotary, ALL, torch.randn(2, 32)),
    "w4a4": (ConvNet, W4A4, IMAGE),
    "static": (ConvNet, STATIC, IMAGE),
    "rules": (
        ConvNet,
        replace(W4A4, scale_rule="four_over_six_mae", activation_scale_rule="four_over_six"),
        IMAGE,
    ),
    "resnet18": (lambda: timm.create_model("resnet18", num_classes=10), W4A4, torch.randn(1, 3, 32, 32)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("into", ["cpu", "meta"])
def test_a_round_trip_is_exact(name, into, tmp_path):
    make, policy, x = MODELS[name]
    q = fp4fx.quantize(make().eval(), policy, x if policy is STATIC else None)
    save(q, tmp_path / "m.safetensors")
    with torch.device(into):
        model = make().eval()
    before = snapshot(model)
    loaded = load(model, tmp_path / "m.safetensors")

    assert packed_modules(q) and [str(type(m)) for m in loaded.modules()] == [str(type(m)) for m in q.modules()]
    assert_same_bits(everything(loaded), everything(q))
    assert loaded.state_dict().keys() == q.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(x), q(x))
    assert plan_of(loaded) == plan_of(q) and str(fp4fx.report(loaded)) == str(fp4fx.report(q))
    assert {n: m.nvfp4 for n, m in packed_modules(loaded).items()} == {n: m.nvfp4 for n, m in packed_modules(q).items()}
    assert_unchanged(model, before)
    given = {t.untyped_storage().data_ptr() for t in everything(model).values() if not t.is_meta}
    assert all(t.untyped_storage().data_ptr() not in given for t in everything(loaded).values())
    save(loaded, tmp_path / "again.safetensors")
    assert_same_contents(tmp_path / "again.safetensors", tmp_path / "m.safetensors")


def test_loading_searches_for_no_scales_and_codes(tmp_path, monkeypatch):
    fp4fx.save(fp4fx.quantize(model := ConvNet().eval()), tmp_path / "m.safetensors")
    monkeypatch.setattr(nvfp4, "unbiased", lambda *_, **__: pytest.fail("searched"))
    fp4fx.load(model, tmp_path / "m.safetensors")
    with pytest.raises(pytest.fail.Exception, match="searched"):
        fp4fx.quantize(model)


def test_tied_tensors_are_written_once_and_stay_tied(tmp_path):
    for policy, part in ((ALL, "weight"), (MODELS["tied"][1], "weight_packed")):
        q = fp4fx.quantize(Tied(), policy)
        save(q, tmp_path / "m.safetensors")
        tensors, metadata = contents(tmp_path / "m.safetensors")
        assert f"embed.{part}" in tensors and f"head.{part}" not in tensors
        assert json.loads(metadata["tied"])[f"head.{part}"] == f"embed.{part}"
        model = Tied()
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())  # tied in the file, not in this model
        loaded = load(model, tmp_path / "m.safetensors")
        assert getattr(loaded.head, part) is getattr(loaded.embed, part)
        assert model.head.weight is not model.embed.weight


def test_other_views_of_one_memory_are_written_apart(tmp_path):
    model = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8))
    flat = torch.randn(8)
    model[1].weight.data, model[1].running_mean, model[1].bias.data = (
        flat,
        flat.view(2, 4).T.reshape(8),
        flat[:1].expand(8),
    )
    model[1].register_buffer("matrix", flat.view(2, 4))
    model[1].register_buffer("transposed", flat.view(2, 4).T)
    q = fp4fx.quantize(model, ALL)
    save(q, tmp_path / "m.safetensors")
    fresh = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8))
    fresh[1].register_buffer("matrix", torch.empty(2, 4))
    fresh[1].register_buffer("transposed", torch.empty(4, 2))
    assert_same_bits(everything(load(fresh, tmp_path / "m.safetensors")), everything(q))


def test_the_file_is_as_small_as_the_plan_says(tmp_path):
    model = timm.create_model("resnet18")
    q = fp4fx.quantize(model)
    save(q, tmp_path / "m.safetensors")
    blob = (tmp_path / "m.safetensors").read_bytes()
    header = 8 + int.from_bytes(blob[:8], "little")
    weights = sum(d.site.numel for d in plan_of(q).quantized)
    dense = sum(t.nbytes for t in model.state_dict().values())
    # K is a multiple of 16 in every convolution that is quantized: 4.5 bits per weight, and an fp32 per tensor.
    payload = dense - 4 * weights + weights * 9 // 16 + 4 * len(plan_of(q).quantized)
    assert weights > 11e6 and len(blob) - header == payload
    assert header < 40_000 and len(blob) / dense < 0.182


def test_the_metadata_says_what_is_in_it(good, tmp_path):
    tensors, metadata = contents(good)
    assert (metadata["format"], metadata["version"], metadata["model"]) == ("fp4fx", "1", "ConvNet")
    assert fp4fx.Plan.from_dict(json.loads(metadata["plan"])).policy.activations == "nvfp4-static"
    packed = json.loads(metadata["packed"])
    assert packed["body.weight"]["dtype"] == "float32" and 15 < packed["body.weight"]["sqnr"] < 30
    assert tensors["body.weight_packed"].dtype == tensors["body.weight_scale"].dtype == torch.uint8
    assert tensors["body.input_global_scale"].dtype == torch.float32
    save(fp4fx.quantize(Rotary(), ALL), tmp_path / "r.safetensors")
    assert json.loads(contents(tmp_path / "r.safetensors")[1]["non_persistent"]) == ["inv_freq"]


def test_the_dtypes_are_those_of_the_file(tmp_path):
    q = fp4fx.quantize(ConvNet().eval(), ALL).bfloat16()
    save(q, tmp_path / "m.safetensors")
    model = ConvNet().eval()
    loaded = load(model, tmp_path / "m.safetensors")
    assert loaded.body.weight.dtype == loaded.body.bias.dtype == loaded.bn.running_mean.dtype == torch.bfloat16
    assert loaded.body.weight_global_scale.dtype == torch.float32 and model.body.weight.dtype == torch.float32
    assert torch.equal(loaded(IMAGE.bfloat16()), q(IMAGE.bfloat16()))


def test_training_flag_and_requires_grad_are_those_of_the_model(good):
    model = ConvNet()
    model.head.eval()
    model.stem.bias.requires_grad_(False)
    loaded = load(model, good)
    assert loaded.training and loaded.stem.training and not loaded.head.training
    assert loaded.body.bias.requires_grad and not loaded.stem.bias.requires_grad
    loaded(IMAGE).sum().backward()
    assert loaded.body.bias.grad is not None and model.body.bias.grad is None


def test_buffers_that_come_and_go_do_not_count_as_structure(tmp_path):
    used, fresh = Rotary(), Rotary()
    used.cache = torch.randn(7)
    save(fp4fx.quantize(used, ALL), tmp_path / "used.safetensors")
    assert torch.equal(load(fresh, tmp_path / "used.safetensors").cache, used.cache) and fresh.cache is None
    save(fp4fx.quantize(fresh, ALL), tmp_path / "fresh.safetensors")
    assert torch.equal(load(used, tmp_path / "fresh.safetensors").cache, used.cache)


def test_a_compiled_model_is_saved_as_what_it_wraps(good, tmp_path):
    q = load(ConvNet(), good)
    save(torch.compile(q, backend="eager"), tmp_path / "m.safetensors")
    assert_same_contents(tmp_path / "m.safetensors", good)
    assert type(load(torch.compile(ConvNet(), backend="eager"), good)) is ConvNet


class Counting(nn.Linear):
    """A layer with extra state."""

    state = torch.tensor([1, 2])

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_extra_state_that_is_a_tensor_is_saved_and_any_other_refused(tmp_path):
    model = nn.Sequential(Counting(32, 8))
    model[0].state = torch.tensor([3, 4, 5])
    save(fp4fx.quantize(model, ALL), tmp_path / "m.safetensors")
    fresh = nn.Sequential(Counting(32, 8))
    assert load(fresh, tmp_path / "m.safetensors")[0].state.tolist() == [3, 4, 5] and fresh[0].state.tolist() == [1, 2]
    model[0].state = {"count": 3}
    with pytest.raises(
        fp4fx.CheckpointError, match=r"m\.safetensors: 0\._extra_state: found .*dict.*expected a tensor"
    ):
        save(fp4fx.quantize(model, ALL), tmp_path / "m.safetensors")


def test_writing_is_all_or_nothing(good, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    q = load(ConvNet(), good)
    save(q, path)
    whole = path.read_bytes()
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode

    def broken(tensors, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("fp4fx.checkpoint.save_file", broken)
    with pytest.raises(OSError, match="no space"):
        save(q, path)
    assert path.read_bytes() == whole and sorted(tmp_path.iterdir()) == [path, tmp_path / "plain"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ConvNet, "ConvNet without a plan, expected all of a quantized model; pass what fp4fx.quantize returned"),
        (lambda: fp4fx.quantize(nn.Sequential(ConvNet()), ALL)[0], "ConvNet without a plan"),
        (lambda: "resnet50", "found str, expected a torch.nn.Module"),
        (lambda: fp4fx.quantize(ConvNet(), ALL).to("meta"), r"stem\.bias: found torch.float32, .*on meta"),
    ],
)
def test_what_cannot_be_saved_is_refused(make, message, tmp_path):
    with pytest.raises(fp4fx.CheckpointError, match=message):
        save(make(), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_changed_after_quantization_is_refused(tmp_path):
    q = fp4fx.quantize(ConvNet(), ALL)
    q.head = nn.Linear(32, 3)
    with pytest.raises(fp4fx.CheckpointError, match=r"packed none, dense head\.weight"):
        save(q, tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        save(q, tmp_path / "nowhere" / "m.safetensors")
    for odd in (torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex128)):
        q = fp4fx.quantize(ConvNet(), ALL)
        q.register_buffer("odd", odd)
        with pytest.raises(fp4fx.CheckpointError, match=r"odd: found torch\.\w+, torch\.\w+"):
            save(q, tmp_path / "m.safetensors")
