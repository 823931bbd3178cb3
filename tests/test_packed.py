"""Packed modules are still the user's modules."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fp4fx
from fp4fx import nvfp4
from fp4fx.packed import Packed, class_for
from tests.models import Attention, ConvNet

ALL = fp4fx.Policy(skip_first=0, skip_last=0)


@pytest.fixture
def layer():
    return fp4fx.quantize(nn.Linear(40, 8), ALL)


def test_it_is_an_instance_of_its_class_and_runs_its_forward(layer):
    assert isinstance(layer, nn.Linear) and isinstance(layer, Packed)
    assert type(layer).__name__ == "NVFP4Linear"
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert "NVFP4[8, 40]" in repr(layer) and "in_features=40" in repr(layer)


def test_the_weight_reads_like_the_dense_one(layer):
    assert layer.weight.shape == (8, 40) and layer.weight.dtype == torch.float32
    assert layer.weight.device == layer.bias.device and not layer.weight.requires_grad
    assert [n for n, _ in layer.named_parameters()] == ["bias"]
    assert set(layer.state_dict()) == {"bias", "weight_packed", "weight_scale", "weight_global_scale"}
    assert layer.requires_grad_(False).bias.requires_grad is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_move_the_computed_dtype_and_spare_the_scales(layer, dtype):
    before, parts = layer.weight, {k: v.clone() for k, v in layer.state_dict().items() if "weight" in k}
    layer = layer.to(dtype)
    assert layer.weight.dtype == dtype == layer.bias.dtype
    assert torch.equal(layer.weight, before.to(dtype))
    for name, part in parts.items():
        assert layer.state_dict()[name].dtype == part.dtype and torch.equal(layer.state_dict()[name], part)
    assert layer(torch.randn(2, 40, dtype=dtype)).dtype == dtype
    assert torch.equal(layer.float().weight, before)  # nothing was lost on the way


def test_half_and_bfloat16_methods_too(layer):
    assert layer.half().weight.dtype == torch.float16
    assert layer.bfloat16().weight_global_scale.dtype == torch.float32


def test_meta_and_back(layer):
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    moved = copy.deepcopy(layer).to("meta")
    assert moved.weight.device.type == "meta" and moved.weight_packed.is_meta
    moved = moved.to_empty(device="cpu")
    assert moved.weight_global_scale.dtype == torch.float32
    moved.load_state_dict(state)
    assert torch.equal(moved.weight, layer.weight)


@pytest.mark.parametrize("make", [lambda: nn.Linear(40, 8), ConvNet, Attention])
def test_copies_and_pickles_are_equal_and_independent(make):
    q = fp4fx.quantize(make().eval(), ALL)
    saved = io.BytesIO()
    torch.save(q, saved)
    saved.seek(0)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), torch.load(saved, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in q.modules()]
        mine, theirs = q.state_dict(), other.state_dict()
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]) and mine[name].data_ptr() != theirs[name].data_ptr()
        assert fp4fx.report(other).to_dict() == fp4fx.report(q).to_dict()


def test_a_class_is_generated_once():
    assert class_for(nn.Linear, ("weight",), False) is class_for(nn.Linear, ("weight",), False)


def test_state_dict_loads_strictly_and_dense_values_are_encoded(layer):
    other = fp4fx.quantize(nn.Linear(40, 8), ALL)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    assert other.nvfp4["weight"].sqnr is None  # that of the codes before would be a wrong number

    dense = nn.Linear(40, 8)
    other.load_state_dict(dense.state_dict())
    assert torch.equal(other.weight, fp4fx.quantize(dense, ALL).weight)
    assert other.nvfp4["weight"].sqnr == fp4fx.quantize(dense, ALL).nvfp4["weight"].sqnr

    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        other.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "weight_scale"})
    with pytest.raises(RuntimeError, match="weight"):
        other.load_state_dict(nn.Linear(41, 8).state_dict())


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xB8, 0xFF])
def test_scales_that_kernels_would_read_otherwise_are_refused_by_name(byte):
    q = fp4fx.quantize(nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 40)), ALL)
    state = {name: value.clone() for name, value in q.state_dict().items()}
    expected = {name: value.clone() for name, value in q[1].state_dict().items()}
    state["1.weight_scale"][3, 0] = state["1.weight_scale"][5, 0] = byte
    state["1.weight_packed"] += 1
    for strict in (True, False):
        with pytest.raises(
            fp4fx.CheckpointError, match=rf"^1\.weight_scale: found byte {byte:#04x} at \[3, 0\], expected .*; it is"
        ):
            q.load_state_dict(state, strict=strict)
    assert all(torch.equal(value, expected[name]) for name, value in q[1].state_dict().items())
    assert q[1].nvfp4["weight"].sqnr is not None


def test_other_scales_load_and_those_without_values_are_not_looked_at(layer):
    state = layer.state_dict()
    state["weight_scale"] = torch.arange(24, dtype=torch.uint8).view(8, 3)
    state["weight_scale"][7, 2] = 0x7E
    layer.load_state_dict(state)
    assert torch.equal(layer.weight_scale, state["weight_scale"])

    layer.load_state_dict({name: value.to("meta") for name, value in state.items()}, assign=True)
    assert layer.weight_scale.is_meta
    mode = FakeTensorMode()
    fakes = {name: mode.from_tensor(value) for name, value in state.items()}
    with mode:
        layer.load_state_dict(fakes, assign=True)
    assert isinstance(layer.weight_scale, FakeTensor)


def test_assignment_encodes_in_place(layer):
    buffer, dense = layer.weight_packed, torch.randn(8, 40)
    layer.weight = nn.Parameter(dense)
    assert layer.weight_packed is buffer  # a compiled graph that holds it sees the new values
    expected = fp4fx.nvfp4.dequantize(fp4fx.nvfp4.quantize(dense, scale_rule="unbiased"))
    assert torch.equal(layer.weight, expected)
    layer.weight = dense * 2
    assert torch.equal(layer.weight, 2 * expected)
    with pytest.raises(fp4fx.PlanError, match=r"shape \(8, 41\).*expected.*\(8, 40\)"):
        layer.weight = torch.randn(8, 41)
    with pytest.raises(fp4fx.NonFiniteWeightError, match="weight"):
        layer.weight = dense / 0
    assert torch.isfinite(layer.weight).all()


def test_hooks_go_on_working_and_are_not_shared():
    model, calls = ConvNet().eval(), []
    model.body.register_forward_hook(lambda m, args, out: calls.append(type(m).__name__))
    q = fp4fx.quantize(model, ALL)
    q(torch.randn(1, 3, 8, 8))
    assert calls == ["NVFP4Conv2d"]
    q.body.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    model(torch.randn(1, 3, 8, 8))
    assert calls == ["NVFP4Conv2d", "Conv2d"]


def test_gradients_reach_inputs_and_biases():
    for policy in (ALL, fp4fx.Policy.w4a4(skip_first=0, skip_last=0)):
        q = fp4fx.quantize(ConvNet(), policy)
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        q(x).square().sum().backward()
        assert x.grad.abs().sum() > 0 and q.body.bias.grad.abs().sum() > 0 and q.head.bias.grad.abs().sum() > 0


def test_shared_memory(layer):
    layer.share_memory()
    assert layer.weight_packed.is_shared() and layer.weight_global_scale.is_shared()
    assert layer.weight_global_scale.dtype == torch.float32


def test_activations_pass_quantize_and_dequantize_first():
    q = fp4fx.quantize(nn.Linear(40, 8), fp4fx.Policy.w4a4(skip_first=0, skip_last=0))
    x = torch.randn(3, 40)
    assert torch.equal(q(x), nn.functional.linear(torch.ops.fp4fx.fake_quantize(x), q.weight, q.bias))
    assert "activations=nvfp4" in repr(q)
    conv = fp4fx.quantize(nn.Conv2d(24, 8, 3), fp4fx.Policy.w4a4(skip_first=0, skip_last=0))
    x = torch.randn(2, 24, 5, 5)
    expected = nn.functional.conv2d(torch.ops.fp4fx.fake_quantize(x, None, "channels"), conv.weight, conv.bias)
    assert torch.equal(conv(x), expected)
    torch.testing.assert_close(conv(x[0]).shape, expected[0].shape)


@pytest.mark.parametrize("activations", ["nvfp4", "nvfp4-static"])
def test_scales_of_activations_are_chosen_by_their_rule(activations):
    rule = "four_over_six"
    policy = fp4fx.Policy(activations=activations, activation_scale_rule=rule, skip_first=0, skip_last=0)
    x = torch.randn(5, 40)
    q = fp4fx.quantize(nn.Linear(40, 8).eval(), policy, x)
    inner = nvfp4.quantize(x, scale_rule=rule, global_scale=getattr(q, "input_global_scale", None))
    assert torch.equal(q(x), nn.functional.linear(nvfp4.dequantize(inner), q.weight, q.bias))
    assert f"activations={activations} {rule}" in repr(q)
    assert torch.equal(copy.deepcopy(q)(x), q(x)) and torch.equal(pickle.loads(pickle.dumps(q))(x), q(x))


def test_state_survives_a_round_through_half_of_a_static_scale():
    policy = fp4fx.Policy(activations="nvfp4-static", skip_first=0, skip_last=0)
    q = fp4fx.quantize(nn.Linear(40, 8).eval(), policy, torch.randn(4, 40))
    before = q.input_global_scale.clone()
    assert q.half().input_global_scale.dtype == torch.float32 and torch.equal(q.input_global_scale, before)
