"""transformers' generate() with a cache: compiled, eager, and a dense model of the same weights say the same tokens."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fp4fx
from fp4fx.backend import fp4fx as backend
from fp4fx.packed import Packed

SETTINGS = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, "pad_token_id": 0}


@pytest.fixture(scope="module")
def models():
    """A quantized Llama, and a dense one with its decoded weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    q = fp4fx.quantize(model, fp4fx.Policy(compute="fp32"))
    dense = copy.deepcopy(model)
    for name, module in q.named_modules():
        if isinstance(module, Packed):
            dense.get_submodule(name).weight.data = module.weight
    return q, dense


def compiled_tokens(model, prompts, settings, backend):
    """What a model with a compiled forward generates, and the number of graphs that took."""
    graphs = []

    def counting(gm, inputs, **kwargs):
        graphs.append(gm)
        return backend(gm, inputs, **kwargs)

    torch._dynamo.reset()
    forward = model.forward
    model.forward = torch.compile(forward, backend=counting, dynamic=True)
    try:
        return [model.generate(ids, **settings) for ids in prompts], len(graphs)
    finally:
        model.forward = forward


def test_generate_with_a_static_cache_eager_and_compiled(models):
    """Eager mode with a growing cache is in test_backend_models."""
    q, dense = models
    settings = {**SETTINGS, "cache_implementation": "static"}
    prompts = [torch.randint(1, 256, (1, 5))]
    expected, graphs = compiled_tokens(dense, prompts, settings, lambda gm, inputs: gm.forward)
    assert compiled_tokens(q, prompts, settings, lambda gm, inputs: gm.forward)[1] == graphs
    assert all(torch.equal(q.generate(ids, **settings), tokens) for ids, tokens in zip(prompts, expected, strict=True))

    found, ours = compiled_tokens(q, prompts, settings, backend)
    assert all(map(torch.equal, found, expected))
    assert ours <= graphs + 1  # the strides of the cache that Inductor returns are others at first
    assert all(row.kernels for row in fp4fx.report(q).rows if row.decision != "kept")
