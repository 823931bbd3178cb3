"""Stacks of matrices: one of them by its number, some of them by data, all of them at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import fp4fx
from fp4fx.passes.fold_views import fold_views
from fp4fx.trace import trace
from tests.kinds.reference import EVERY, check_compiled, packed_names, with_rounded
from tests.passes.graphs import Captured, packed

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "use_cache": False,
}


class Loop(nn.Module):
    """Every expert on every token, as a loop over a stack."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Parameter(torch.randn(3, 24, 32)), nn.Parameter(torch.randn(3, 32, 24))
        self.gate = nn.Linear(32, 3)

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        outputs = [F.linear(F.silu(F.linear(x, self.up[i])), self.down[i]) for i in range(3)]
        return sum(weights[..., i : i + 1] * y for i, y in enumerate(outputs))


class Chosen(nn.Module):
    """One expert for each token, its matrix gathered by number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(5, 24, 32))

    def forward(self, x, number):
        return torch.bmm(self.experts[number], x.unsqueeze(-1)).squeeze(-1)


def test_a_loop_over_a_stack_reads_each_matrix_packed():
    model, x = Loop().eval(), torch.randn(4, 32)
    for result in (trace(model), trace(model, x)):
        names = [s.parameter for s in result.sites]
        assert names == ["gate.weight", *["up", "down"] * 3]
        assert {s.order for s in result.sites} == {"rows"}
        assert result.unreached == ()
    quantized = fp4fx.quantize(model, EVERY)
    with torch.no_grad():
        axes = {"gate.weight": 1, "up": 2, "down": 2}
        assert torch.equal(quantized(x), with_rounded(model, axes)(x))
    kernels = check_compiled(quantized, x, fullgraph=True)
    assert kernels.keys() == axes.keys()


def test_matrices_that_data_chooses_are_gathered_packed():
    model, inputs = Chosen().eval(), (torch.randn(4, 32), torch.tensor([1, 4, 0, 1]))
    for result in (trace(model), trace(model, inputs)):
        assert [(s.parameter, s.order, s.refusal) for s in result.sites] == [("experts", "rows", None)]
    quantized = fp4fx.quantize(model, EVERY)
    with torch.no_grad():
        assert torch.equal(quantized(*inputs), with_rounded(model, {"experts": 2})(*inputs))
    check_compiled(quantized, *inputs, fullgraph=True)


def test_a_gather_decodes_what_it_takes_alone():
    model = packed(Chosen(), "experts")
    g = Captured(model, torch.randn(4, 32), torch.tensor([1, 4, 0, 1]))
    assert g.apply(fold_views) == 1
    (decoded,) = (n for n in g.gm.graph.nodes if "dequantize" in str(n.target))
    assert list(decoded.meta["example_value"].shape) == [4, 24, 32]
    g.check(0)


def test_a_stack_that_is_written_to_stays_whole():
    model = packed(Chosen(), "experts")

    def scaled(x):
        w = model.experts
        first = w[0]
        w.mul_(2)
        return x @ first.t()

    g = Captured(scaled, torch.randn(4, 32))
    assert g.apply(fold_views) == 0
    g.check(0)


def mixtral():
    return MixtralForCausalLM(MixtralConfig(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, **SIZES))


def qwen():
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, head_dim=16, **SIZES))


@pytest.mark.parametrize("make", [mixtral, qwen])
def test_language_models_of_experts(make):
    torch.manual_seed(0)
    model, ids = make().eval(), torch.arange(6).view(1, 6)
    for result in (trace(model), trace(model, ids)):
        stacks = {s.attribute: (s.order, s.refusal) for s in result.sites if len(s.shape) == 3}
        assert stacks == {"gate_up_proj": ("rows", None), "down_proj": ("rows", None)}
        assert not [n for n in result.unreached if "proj" in n.name]
    quantized = fp4fx.quantize(model, EVERY)
    names = packed_names(quantized)
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"} <= set(names)
    with torch.no_grad():
        expected = with_rounded(model, dict.fromkeys(names, -1))(ids).logits
        assert torch.equal(quantized(ids).logits, expected)
        torch._dynamo.reset()
        found = torch.compile(quantized, backend="fp4fx")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    rows = {row.parameter.rpartition(".")[2]: row for row in fp4fx.report(quantized).rows}
    assert rows["gate_up_proj"].kernels and "read by" in " ".join(rows["gate_up_proj"].refusals)


def test_all_experts_in_one_product():
    torch.manual_seed(0)
    experts = Llama4TextExperts(Llama4TextConfig(num_local_experts=3, intermediate_size=16, **SIZES)).eval()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(12, 32)
    assert {(s.parameter, s.order) for s in trace(experts).sites} == {
        ("gate_up_proj", "columns"),
        ("down_proj", "columns"),
    }
    quantized = fp4fx.quantize(experts, EVERY)
    with torch.no_grad():
        assert torch.equal(quantized(x), with_rounded(experts, {"gate_up_proj": 1, "down_proj": 1})(x))
    check_compiled(quantized, x, tolerance=1e-3)
