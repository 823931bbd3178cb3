"""Real architectures through all passes: values and strides as eager has them, few calls left, no copies of images."""

from collections import Counter

import pytest
import timm
import torch
import torchvision
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fp4fx
from fp4fx.passes import PASSES
from fp4fx.passes.select_kernels import select_kernels
from fp4fx.pipeline import run
from tests.models import UNet
from tests.passes.graphs import Captured, assert_true_strides, copies

IMAGE = torch.randn(2, 3, 64, 64)


def llama():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    return LlamaForCausalLM(config)


MODELS = {
    # name -> model, input, epilogues expected (scale, residual, activation) with their number
    "resnet18": (torchvision.models.resnet18, IMAGE, {(True, False, "relu"): 8, (True, True, "relu"): 8}),
    "resnet50": (torchvision.models.resnet50, IMAGE, {(True, False, "relu"): 32, (True, True, "relu"): 16}),
    "mobilenet_v3_small": (
        torchvision.models.mobilenet_v3_small,
        IMAGE,
        {(True, True, "none"): 6, (False, False, "hardsigmoid"): 9, (False, False, "hardswish"): 1},
    ),
    "convnext": (
        lambda: timm.create_model("convnext_atto", depths=(1, 1, 2, 1), ls_init_value=0.5, conv_mlp=False),
        IMAGE,
        {(False, False, "gelu"): 5, (True, True, "none"): 5},
    ),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, init_values=0.5),
        IMAGE,
        {(False, False, "gelu"): 2, (True, True, "none"): 4},
    ),
    "unet": (lambda: UNet(16), IMAGE, {}),
}


def livened(model):
    """The model in evaluation with statistics, biases and affine weights that all matter."""
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.data.uniform_(-0.2, 0.2) if name.endswith("bias") else p.data.uniform_(0.5, 1)
    return model


def epilogues(g):
    ops = [n for n in g.gm.graph.nodes if str(n.target).startswith(("fp4fx.conv", "fp4fx.linear"))]
    return Counter((n.args[-4] is not None, n.args[-3] is not None, n.args[-2]) for n in ops)


def compiled(function, x):
    g = Captured(function, x)
    with torch.no_grad():
        passes = [step for step in PASSES if step.rewrite is not select_kernels]
        run(g.gm, g.ctx, passes)  # as the backend does, dialects verified
    g.inputs += [part for folded in g.ctx.folded for part in folded.parts]
    return g


@pytest.mark.parametrize(("compute", "tolerance"), [("bf16_operands", 1e-4), ("bf16", 5e-2)])
@pytest.mark.parametrize("name", list(MODELS))
def test_values_strides_and_epilogues(name, compute, tolerance):
    torch.manual_seed(0)
    make, x, expected = MODELS[name]
    g = compiled(fp4fx.quantize(livened(make()), fp4fx.Policy(compute=compute)), x)
    g.check(tolerance)
    assert_true_strides(g)
    assert {key: epilogues(g)[key] for key in expected} == expected
    inside = [n for n in copies(g) if n.args[0].op != "placeholder" and g.gm.graph.output_node() not in n.users]
    assert not [n for n in inside if n.meta["example_value"].dim() == 4]


def test_a_decoder_adds_its_residuals_in_its_linears():
    torch.manual_seed(0)
    q = fp4fx.quantize(llama().eval(), fp4fx.Policy(skip_first=0, skip_last=0, compute="bf16_operands"))
    g = compiled(lambda ids: q(ids).logits, torch.randint(0, 64, (2, 5)))
    g.check(1e-4)
    found = epilogues(g)
    assert (found[False, True, "none"], found[False, False, "silu"]) == (4, 2)


def test_w4a4_convolutions_pass_images_on_without_copies():
    torch.manual_seed(0)
    g = compiled(fp4fx.quantize(livened(torchvision.models.resnet18()), fp4fx.Policy.w4a4()), IMAGE)
    assert_true_strides(g)
    assert len([n for n in copies(g) if n.meta["example_value"].dim() == 4]) == 1


def test_bf16_loses_nothing():
    """The epilogue in fp32 with one rounding is as near to the fp32 model as the separate calls are."""
    torch.manual_seed(0)
    q = fp4fx.quantize(livened(torchvision.models.resnet18()))
    with torch.no_grad():
        exact = q(IMAGE)
    g = compiled(q.bfloat16(), IMAGE.bfloat16())
    with torch.no_grad():
        found, eager = g.gm(*g.inputs)[0], g.expected
    assert (found - exact).norm() <= 1.1 * (eager - exact).norm()
