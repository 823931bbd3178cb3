"""nn.MultiheadAttention in both layouts, and the transformer layers of PyTorch."""

import pytest
import torch
from torch import nn

import fp4fx
from tests.kinds.reference import EVERY, check_compiled, packed_names, with_rounded

X, MEMORY = torch.randn(2, 5, 32), torch.randn(2, 7, 32)


class Attend(nn.Module):
    def __init__(self, own, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.own = nn.MultiheadAttention(32, 4, batch_first=True, **options), own

    def forward(self, *inputs):
        return self.attend(*(inputs * 3 if self.own else inputs), need_weights=False)[0]


ATTENTION = {
    "self": (True, {}, (X,)),
    "cross": (False, {}, (X, MEMORY, MEMORY)),
    "of three": (False, {}, (X, MEMORY, MEMORY + 1)),
    "other widths": (False, {"kdim": 16, "vdim": 24}, (X, MEMORY[..., :16], MEMORY[..., :24])),
    "with biases": (False, {"add_bias_kv": True, "add_zero_attn": True}, (X, MEMORY, MEMORY)),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_every_projection_is_packed_and_fused(name):
    own, options, inputs = ATTENTION[name]
    model = Attend(own, **options).eval()
    quantized = fp4fx.quantize(model, EVERY)
    separate = ["attend.k_proj_weight", "attend.q_proj_weight", "attend.v_proj_weight"]
    names = [*(separate if "kdim" in options else ["attend.in_proj_weight"]), "attend.out_proj.weight"]
    assert packed_names(quantized) == sorted(names)
    with torch.no_grad():
        expected = with_rounded(model, dict.fromkeys(names, 1))(*inputs)
        torch.testing.assert_close(quantized(*inputs), expected, rtol=1e-5, atol=1e-5)
    check_compiled(quantized, *inputs, fullgraph=True)


LAYERS = {
    "encoder layer": (lambda: nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), (X,)),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2), (X,)),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(32, 4, 48, batch_first=True), (X, MEMORY)),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, batch_first=True), 2),
        (X, MEMORY),
    ),
    "transformer": (lambda: nn.Transformer(32, 4, 1, 1, 48, batch_first=True), (MEMORY, X)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_a_transformer_never_skip_packed_weights(name):
    make, inputs = LAYERS[name]
    torch.manual_seed(0)
    model = make().eval()
    matrices = sorted(n for n, p in model.named_parameters() if p.dim() == 2)
    quantized = fp4fx.quantize(model, EVERY)
    assert packed_names(quantized) == matrices
    with torch.no_grad():
        expected = with_rounded(model, dict.fromkeys(matrices, 1))(*inputs)
        torch.testing.assert_close(quantized(*inputs), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(*inputs), expected, rtol=1e-3, atol=1e-3)
    check_compiled(quantized, *inputs, tolerance=1e-3)


def test_the_fast_path_with_a_padding_mask_and_nested_tensors():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2).eval()
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    quantized = fp4fx.quantize(model, EVERY)
    names = dict.fromkeys(packed_names(quantized), 1)
    with torch.no_grad():
        found = quantized(X, src_key_padding_mask=mask)
        expected = with_rounded(model, names)(X, src_key_padding_mask=mask)
    torch.testing.assert_close(found[~mask], expected[~mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: nn.LSTM(8, 16, 2), lambda: nn.GRU(8, 16, bidirectional=True)])
def test_recurrent_layers_are_kept_with_a_reason(make):
    model, x = make().eval(), torch.randn(3, 2, 8)
    plan = fp4fx.plan(model, EVERY)
    assert plan.quantized == ()
    weights = {n for n, p in model.named_parameters() if p.dim() == 2}
    assert {n.name for n in plan.unreached} == weights
    assert all(n.reason == "recurrent layers are not supported yet" for n in plan.unreached)
    assert torch.equal(fp4fx.quantize(model, EVERY)(x)[0], model(x)[0])
