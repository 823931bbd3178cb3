"""Embeddings, bags of them, tied tables, bilinear layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp4fx
from fp4fx.trace import trace
from tests.kinds.reference import EVERY, check_compiled, packed_names, with_rounded

TABLES = fp4fx.Policy(skip_first=0, skip_last=0, embeddings=True, compute="fp32")
IDS = torch.tensor([[1, 2, 3], [7, 0, 9]])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode):
    model = nn.EmbeddingBag(12, 24, mode=mode).eval()
    for result in (trace(model), trace(model, IDS)):
        assert [(s.parameter, s.op, s.order, s.refusal) for s in result.sites] == [
            ("weight", "embedding", "rows", None)
        ]
    (kept,) = fp4fx.plan(model, EVERY).decisions
    assert (kept.label, kept.reason) == ("kept", "embedding table")
    quantized = fp4fx.quantize(model, TABLES)
    with torch.no_grad():
        assert torch.equal(quantized(IDS), with_rounded(model, {"weight": 1})(IDS))
    check_compiled(quantized, IDS, fused=False)


def test_bags_by_offsets_and_weights():
    model = nn.EmbeddingBag(12, 24, mode="sum", include_last_offset=True).eval()
    inputs = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 4]), torch.rand(4)
    quantized = fp4fx.quantize(model, TABLES)
    with torch.no_grad():
        assert torch.equal(quantized(*inputs), with_rounded(model, {"weight": 1})(*inputs))
    check_compiled(quantized, *inputs, fused=False)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_table_that_is_rescaled_in_place_is_kept(kind):
    model = kind(12, 24, max_norm=1.0).eval()
    plan = fp4fx.plan(model, TABLES)
    assert plan.quantized == ()
    assert "with max_norm, which writes to the table" in plan.unreached[0].reason


def test_bilinear_layers():
    torch.manual_seed(0)
    model, inputs = nn.Bilinear(12, 40, 6).eval(), (torch.randn(3, 12), torch.randn(3, 40))
    for result in (trace(model), trace(model, inputs)):
        assert [(s.parameter, s.op, s.order, s.rows) for s in result.sites] == [
            ("weight", "bilinear", "rows", (72, 40))
        ]
    quantized = fp4fx.quantize(model, EVERY)
    with torch.no_grad():
        assert torch.equal(quantized(*inputs), with_rounded(model, {"weight": 2})(*inputs))
    check_compiled(quantized, *inputs, fused=False)
    (row,) = fp4fx.report(quantized).rows
    assert "bilinear" in " ".join(row.refusals)


class Scores(nn.Module):
    """A table whose transpose is the head, by hand."""

    def __init__(self, head):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(40, 32), head

    def forward(self, ids):
        return self.head(torch.tanh(self.table(ids)), self.table.weight)


@pytest.mark.parametrize(
    "head",
    [F.linear, lambda x, w: x @ w.t(), lambda x, w: torch.einsum("btd,vd->btv", x, w), lambda x, w: x.matmul(w.T)],
)
def test_a_table_that_is_the_head_too(head):
    model = Scores(head).eval()
    assert [(s.op, s.order) for s in trace(model).sites] == [("embedding", "rows"), ("linear", "rows")]
    assert packed_names(fp4fx.quantize(model, EVERY)) == []  # the embedding is kept, and so its other use
    quantized = fp4fx.quantize(model, TABLES)
    with torch.no_grad():
        assert torch.equal(quantized(IDS), with_rounded(model, {"table.weight": 1})(IDS))
    check_compiled(quantized, IDS)
