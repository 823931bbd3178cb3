"""transformers' generate() with a cache: compiled, eager, and a dense model of the same weights say the same tokens."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fp4fx
from fp4fx.packed import Packed

SETTINGS = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}


@pytest.fixture(scope="module")
def models():
    """A quantized Llama, and a dense one with its decoded weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
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


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_eager_and_compiled(models, cache):
    q, dense = models
    torch._dynamo.reset()
    settings = {**SETTINGS, "cache_implementation": cache}
    prompts = [torch.randint(1, 256, (batch, length)) for batch, length in ((1, 5), (2, 9))]
    expected = [dense.generate(ids, **settings) for ids in prompts]
    assert all(torch.equal(q.generate(ids, **settings), tokens) for ids, tokens in zip(prompts, expected, strict=True))

    graphs = []

    def counting(gm, inputs, **kwargs):
        graphs.append(gm)
        return fp4fx.backend.fp4fx(gm, inputs, **kwargs)

    forward = q.forward
    q.forward = torch.compile(forward, backend=counting, dynamic=True)
    try:
        found = [q.generate(ids, **settings) for ids in prompts]
    finally:
        q.forward = forward
    assert all(map(torch.equal, found, expected))
    assert 0 < len(graphs) <= 4  # the prompt and the token, each for the first and for any further length
    assert all(row.kernels for row in fp4fx.report(q).rows if row.decision != "kept")
