"""Plan -> packed model: what is shared, what is tied, what is refused."""

import copy
import time

import pytest
import timm
import torch
from torch import nn

import fp4fx
from fp4fx.packed import Packed
from fp4fx.quantize import apply
from tests.models import Attention, ConvNet, Tied, UNet

ALL = fp4fx.Policy(skip_first=0, skip_last=0)


def test_the_original_is_untouched_and_what_is_kept_is_shared():
    model = ConvNet().eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    y = model(x)
    q = fp4fx.quantize(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), y) and not any(isinstance(m, Packed) for m in model.modules())
    assert q.stem.weight is model.stem.weight  # skip_first
    assert q.bn.running_mean is model.bn.running_mean and q.body.bias is model.body.bias
    assert isinstance(q.body, Packed) and q.body is not model.body and not q.training


def test_the_eager_model_is_the_original_with_quantized_weights():
    model = UNet().eval()
    q = fp4fx.quantize(model, ALL)
    reference = copy.deepcopy(model)
    for name, module in reference.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            order = "conv_transpose" if module.transposed else "conv"
            stored = fp4fx.nvfp4.quantize(module.weight.detach(), order=order)
            module.weight.data = fp4fx.nvfp4.dequantize(stored)
            assert isinstance(q.get_submodule(name), Packed)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(q(x), reference(x))


def test_aliases_inside_the_model_stay_aliases():
    model = ConvNet()
    model.again = [model.body]
    q = fp4fx.quantize(model)
    assert q.again[0] is q.body and isinstance(q.again[0], Packed)


def test_a_module_under_two_names_is_packed_once():
    model = ConvNet()
    model.again = model.body
    q = fp4fx.quantize(model, ALL)
    assert q.again is q.body and isinstance(q.body, Packed)


def test_a_plan_that_quantizes_inputs_refuses_another_class():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 40))

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    plan = fp4fx.plan(nn.Sequential(nn.Linear(40, 8)), fp4fx.Policy.w4a4(skip_first=0, skip_last=0))
    with pytest.raises(fp4fx.PlanError, match="0: the plan quantizes its input, which a Odd"):
        apply(nn.Sequential(Odd()), plan)
    with pytest.raises(fp4fx.PlanError, match="no such parameter"):
        apply(nn.Sequential(nn.ReLU()), fp4fx.plan(nn.Sequential(nn.Linear(40, 8)), ALL))
    with pytest.raises(fp4fx.PlanError, match=r"found shape \(9, 40\)"):
        apply(nn.Sequential(nn.Linear(40, 9)), plan)


def test_tied_weights_are_quantized_once_or_kept_together():
    kept = fp4fx.quantize(Tied(), ALL)
    assert kept.head.weight is kept.embed.weight  # an embedding is kept, and with it the head
    q = fp4fx.quantize(Tied(), fp4fx.Policy.w4a4(embeddings=True, skip_first=0, skip_last=0))
    assert q.head.weight_packed is q.embed.weight_packed
    assert q.head.activations == "nvfp4" and q.embed.activations is None
    assert q(torch.tensor([1, 2])).shape == (2, 40)


def test_siblings_share_one_global_scale():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
            nn.init.normal_(self.k.weight, std=3.0)

        def forward(self, x):
            return self.o(self.q(x) + self.k(x))

    q = fp4fx.quantize(Block(), ALL)
    assert torch.equal(q.q.weight_global_scale, q.k.weight_global_scale)
    assert not torch.equal(q.q.weight_global_scale, q.o.weight_global_scale)


def test_attention_projections_are_packed():
    q = fp4fx.quantize(Attention().eval(), ALL)
    assert isinstance(q.attention, Packed) and isinstance(q.attention.out_proj, Packed)
    assert q.attention.in_proj_weight.shape == (96, 32)
    with torch.no_grad():  # PyTorch's own fast path reads the weights too
        fast = q(torch.randn(2, 3, 8))
    assert torch.isfinite(fast).all()


def test_norms_and_embeddings_on_request():
    q = fp4fx.quantize(ConvNet(), fp4fx.Policy(skip_norms=False, skip_first=0, skip_last=0))
    assert isinstance(q.bn, Packed) and q.bn.weight.shape == (32,)
    q(torch.randn(2, 3, 8, 8))


def test_tiles_of_16_by_16():
    q = fp4fx.quantize(nn.Linear(64, 32), fp4fx.Policy(block=(16, 16), skip_first=0, skip_last=0))
    scale = q.weight_scale.view(2, 16, 4)
    assert torch.equal(scale, scale[:, :1].expand_as(scale))


def test_static_activation_scales_are_measured_on_the_example():
    policy = fp4fx.Policy(activations="nvfp4-static", skip_first=0, skip_last=0)
    model, x = nn.Sequential(nn.Linear(40, 8)).eval(), torch.randn(4, 40)
    q = fp4fx.quantize(model, policy, x)
    torch.testing.assert_close(q[0].input_global_scale, 8 * x.abs().max() / 2688)
    assert torch.equal(q(100 * x)[0], q(100 * x)[0]) and not model[0]._forward_pre_hooks
    with pytest.raises(fp4fx.PlanError, match="example_inputs"):
        fp4fx.quantize(model, policy)
    with pytest.raises(fp4fx.PlanError, match="eval"):
        fp4fx.quantize(model.train(), policy, x)


def test_bad_weights_and_models_are_named():
    model = ConvNet()
    model.body.weight.data[1, 2] = float("inf")
    with pytest.raises(fp4fx.NonFiniteWeightError, match=r"body\.weight"):
        fp4fx.quantize(model)
    with pytest.raises(fp4fx.PlanError, match="already quantized"):
        fp4fx.quantize(fp4fx.quantize(ConvNet()))
    with pytest.raises(fp4fx.Error, match="str"):
        fp4fx.quantize("resnet50")


def test_on_fallback_raise_names_what_cannot_be_had():
    policy = fp4fx.Policy.w4a4(skip_first=0, skip_last=0, on_fallback="raise")
    with pytest.raises(fp4fx.FallbackError, match="in_proj_weight: weight only"):
        fp4fx.quantize(Attention(), policy)
    fp4fx.quantize(ConvNet(), policy)


def test_a_meta_model_gives_a_meta_model():
    with torch.device("meta"):
        model = ConvNet()
    q = fp4fx.quantize(model)
    assert q.body.weight_packed.is_meta and q.body.weight_packed.shape == (32, 144)


def test_resident_bytes_per_quantized_weight():
    q = fp4fx.quantize(timm.create_model("resnet18"), ALL)
    weights = sum(d.site.numel for d in fp4fx.plan(timm.create_model("resnet18"), ALL).quantized)
    stored = sum(b.nbytes for m in q.modules() if isinstance(m, Packed) for n, b in m.named_buffers(recurse=False))
    assert stored / weights < 0.6


def test_quantizing_resnet18_is_quick():
    """resnet50 has 2.2 times the weights and shall take less than 3 s; a generous factor is left for a busy machine."""
    model = timm.create_model("resnet18")
    start = time.perf_counter()
    fp4fx.quantize(model)
    assert time.perf_counter() - start < 6
