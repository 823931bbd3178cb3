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
    assert q.stem.weight.data_ptr() == model.stem.weight.data_ptr()  # skip_first
    assert q.bn.running_mean is model.bn.running_mean and q.body.bias.data_ptr() == model.body.bias.data_ptr()
    assert isinstance(q.body, Packed) and q.body is not model.body and not q.training


def test_the_eager_model_is_the_original_with_quantized_weights():
    model = UNet().eval()
    q = fp4fx.quantize(model, ALL)
    reference = copy.deepcopy(model)
    for name, module in reference.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            order = "conv_transpose" if module.transposed else "conv"
            stored = fp4fx.nvfp4.quantize(module.weight.detach(), scale_rule="unbiased", order=order)
            module.weight.data = fp4fx.nvfp4.dequantize(stored)
            assert isinstance(q.get_submodule(name), Packed)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(q(x), reference(x), rtol=1e-5, atol=1e-6)


def test_casting_the_new_model_leaves_the_original_alone():
    model, x = ConvNet().eval(), torch.randn(2, 3, 8, 8)
    y = model(x)
    fp4fx.quantize(model).half()
    assert model.stem.weight.dtype == torch.float32 and torch.equal(model(x), y)


def test_a_convolution_answers_in_the_format_of_its_input():
    model = nn.Sequential(nn.Conv2d(16, 8, 3)).eval()
    q = fp4fx.quantize(model, ALL)
    x = torch.randn(2, 16, 6, 6)
    assert q(x).is_contiguous()
    assert q(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_siblings_have_scales_of_their_own():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.o(self.q(x) + self.k(x))

    q = fp4fx.quantize(Block(), ALL)
    before = q.k.weight
    q.q.weight = 100 * q.q.weight
    assert torch.equal(q.k.weight, before)


@pytest.mark.parametrize("policy", [ALL, fp4fx.Policy.w4a4(skip_first=0, skip_last=0)])
def test_transformer_layers_run_their_children(policy):
    """PyTorch's fused inference op would read the weights and skip the quantization of the activations."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    q = fp4fx.quantize(nn.TransformerEncoder(layer, 2).eval(), policy)
    x = torch.randn(2, 5, 32)
    slow = q(x)
    with torch.no_grad():  # attention itself is another kernel here, whose round-off may turn a code or two
        assert fp4fx.nvfp4.sqnr(slow.detach(), q(x)) > (100 if policy is ALL else 40)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        assert torch.isfinite(q(x, src_key_padding_mask=padding)[0]).all()


def test_a_name_that_is_taken_is_an_error():
    layer = nn.Linear(32, 8)
    layer.register_buffer("weight_scale", torch.ones(1))
    with pytest.raises(fp4fx.PlanError, match="already has an attribute 'weight_scale'"):
        fp4fx.quantize(nn.Sequential(layer), ALL)


def test_a_partly_quantized_model_is_refused():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0] = fp4fx.quantize(model[0], ALL)
    with pytest.raises(fp4fx.PlanError, match="0 is already quantized"):
        fp4fx.quantize(model)


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
    assert q.head.nvfp4_activations == "nvfp4" and q.embed.nvfp4_activations is None
    assert q(torch.tensor([1, 2])).shape == (2, 40)


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
    torch.testing.assert_close(q[0].input_global_scale, 16 * x.abs().max() / 2688)
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
    with pytest.raises(fp4fx.PlanError, match="the model is already quantized"):
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


@pytest.mark.parametrize(("name", "seconds"), [("resnet50", 3), ("vit_base_patch16_224", 8)])
def test_quantizing_is_quick(name, seconds):
    """Processor time, which a busy machine does not stretch, summed over threads: no less than what a user waits."""
    model = timm.create_model(name)
    start = time.process_time()
    fp4fx.quantize(model)
    assert time.process_time() - start < seconds
