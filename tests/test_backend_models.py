"""Real architectures, some blocks deep, one graph each: compiled equals eager, two batch sizes share one artifact, and
every site is explained.

Tolerance: both sides multiply the same decoded fp32 weights and differ only in the order of fp32 sums (round-off 6e-8
each over K up to a few thousand terms, through some ten layers), so the largest difference is held to 2e-5 of the
largest output.
"""

import copy
import gc

import pytest
import timm
import torch
import torchvision
from transformers import LlamaConfig, LlamaForCausalLM

import fp4fx
from fp4fx.backend import fp4fx as backend
from fp4fx.packed import Packed
from tests.models import UNet

TOLERANCE = 2e-5


def llama():
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    return model


def image(size):
    return lambda batch: torch.randn(batch, 3, size, size)


SWIN = {"depths": (2, 1), "num_heads": (3, 6), "img_size": 128}
MODELS = {
    "resnet50": (lambda: timm.create_model("resnet50", layers=(2, 1, 1, 1)), image(64)),
    "vit": (lambda: timm.create_model("vit_base_patch16_224", depth=3, img_size=64), image(64)),
    "beit": (lambda: timm.create_model("beit_base_patch16_224", depth=3, img_size=64), image(64)),
    "swinv2": (lambda: timm.create_model("swinv2_tiny_window8_256", **SWIN), image(128)),
    "convnext": (lambda: timm.create_model("convnext_tiny", depths=(1, 1, 2, 1)), image(64)),
    "torchvision vit": (lambda: torchvision.models.VisionTransformer(64, 16, 3, 12, 768, 3072), image(64)),
    "unet": (lambda: UNet(32), image(64)),
    "llama": (llama, lambda batch: torch.randint(0, 512, (batch, 17))),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_one_graph_equal_to_eager_for_two_batch_sizes(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    q = fp4fx.quantize(make().eval(), fp4fx.Policy(compute="fp32"))
    graphs = []

    def counting(gm, example_inputs):
        graphs.append(gm)
        return backend(gm, example_inputs)

    compiled = torch.compile(q, backend=counting, fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled(inputs(2))
        captured = len(graphs)
        for batch in (2, 5):
            x = inputs(batch)
            expected, found = q(x), compiled(x)
            expected, found = (y if isinstance(y, torch.Tensor) else y.logits for y in (expected, found))
            assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert len(graphs) == captured, "another batch size was compiled anew"

    rows = fp4fx.report(q).rows
    assert all(row.reason for row in rows)
    quantized = [row for row in rows if row.decision != "kept"]
    assert quantized and all(row.kernels and row.refusals == () for row in quantized), "a site was not fused"
    assert not any("dequantize" in kernel for row in quantized for kernel in row.kernels)
    gc.collect()


def test_generate_works_on_a_quantized_language_model():
    torch.manual_seed(0)
    model = llama().eval()
    q = fp4fx.quantize(model)
    reference = copy.deepcopy(model)
    for name, module in q.named_modules():
        if isinstance(module, Packed):
            reference.get_submodule(name).weight.data = module.weight
    ids = torch.randint(0, 512, (1, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    assert torch.equal(q.generate(ids, **settings), reference.generate(ids, **settings))
    assert not torch.equal(q(ids).logits, model(ids).logits)
