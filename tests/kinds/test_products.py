"""Raw parameters in products: a linear in disguise is quantized along what it reduces, and fused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp4fx
from fp4fx.errors import TraceError
from fp4fx.plan import Plan
from fp4fx.quantize import apply
from fp4fx.trace import trace
from tests.kinds.reference import EVERY, check_compiled, packed_names, resident_bits, with_rounded


class Product(nn.Module):
    def __init__(self, shape, call):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(8))
        self.call = call

    def forward(self, x):
        return self.call(x, self.weight, self.bias)


K, N, E = 40, 8, 3
CASES = {  # name -> shape of the weight, of x, the call, the axis that is reduced
    "linear": ((N, K), (5, K), F.linear, 1),
    "linear of t": ((K, N), (5, K), lambda x, w, b: F.linear(x, w.t(), b), 0),
    "x @ w": ((K, N), (2, 5, K), lambda x, w, b: x @ w + b, 0),
    "x @ w.T": ((N, K), (5, K), lambda x, w, b: x @ w.T, 1),
    "x @ w.mT": ((N, K), (5, K), lambda x, w, b: torch.matmul(x, w.mT), 1),
    "vector @ w": ((K, N), (K,), lambda x, w, b: x @ w, 0),
    "w @ x": ((N, K), (2, K, 5), lambda x, w, b: w @ x, 1),
    "w @ vector": ((N, K), (K,), lambda x, w, b: torch.matmul(w, x), 1),
    "mm": ((K, N), (5, K), lambda x, w, b: torch.mm(x, w), 0),
    "matmul by name": ((K, N), (5, K), lambda x, w, b: x.matmul(w), 0),
    "addmm": ((K, N), (5, K), lambda x, w, b: torch.addmm(b, x, w), 0),
    "addmm of a matrix": ((K, N), (N, K), lambda x, w, b: torch.addmm(x[:, :8], x, w), 0),
    "einsum": ((K, N), (2, 5, K), lambda x, w, b: torch.einsum("btk,kn->btn", x, w), 0),
    "einsum from the left": ((N, K), (2, K, 5), lambda x, w, b: torch.einsum("nk,bkt->btn", w, x), 1),
    "einsum with dots": ((N, K), (2, 5, K), lambda x, w, b: torch.einsum("...k,nk->...n", x, w), 1),
    "einsum without a result": ((K, N), (5, K), lambda x, w, b: torch.einsum("ij,jk", x, w), 0),
    "einsum into heads": ((4, N, K), (2, 5, K), lambda x, w, b: torch.einsum("btk,hnk->bhtn", x, w), 2),
    "a part of the rows": ((4 * N, K), (5, K), lambda x, w, b: x @ w[N : 2 * N].t() + F.linear(x, w.chunk(4)[3]), 1),
    "bmm": ((E, K, N), (E, 5, K), lambda x, w, b: torch.bmm(x, w), 1),
    "bmm from the left": ((E, N, K), (E, K, 5), lambda x, w, b: torch.bmm(w, x), 2),
    "baddbmm": ((E, K, N), (E, 5, K), lambda x, w, b: torch.baddbmm(b, x, w), 1),
    "matmul of a stack": ((E, K, N), (2, E, 5, K), lambda x, w, b: x @ w.transpose(1, 2).transpose(-1, -2), 1),
    "one of a stack": ((E, N, K), (5, K), lambda x, w, b: F.linear(x, w[1]) + x @ w[2].t(), 2),
    "grouped by einsum": ((E, K, N), (2, 5, E, K), lambda x, w, b: torch.einsum("btek,ekn->bten", x, w), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_quantized_along_what_is_reduced_and_fused(name):
    shape, of_x, call, axis = CASES[name]
    model, x = Product(shape, call).eval(), torch.randn(of_x)
    for result in (trace(model), trace(model, x)):
        assert {(s.parameter, s.op, s.refusal, s.transform) for s in result.sites} == {("weight", "linear", None, None)}
        assert {s.order for s in result.sites} == {"rows" if axis == len(shape) - 1 else "columns"}
        assert {s.rows for s in result.sites} == {(model.weight.numel() // K, K)}
        assert result.opaque == result.unreached == ()
    quantized = fp4fx.quantize(model, EVERY)
    assert packed_names(quantized) == ["weight"]
    assert resident_bits(quantized, "weight") < 6  # K is two and a half blocks
    with torch.no_grad():
        expected = with_rounded(model, {"weight": axis})(x)
        torch.testing.assert_close(quantized(x), expected, rtol=1e-6, atol=1e-5)
        assert not torch.allclose(expected, model(x), rtol=1e-3, atol=1e-3)
    check_compiled(quantized, x, fullgraph=True)


KEPT = {
    "two axes": ((4, N, K), (2, 5, 4, K), lambda x, w, b: torch.einsum("bthk,hnk->btn", x, w), "exactly one"),
    "no axis": ((5, K), (2, 5, K), lambda x, w, b: torch.einsum("btk,tk->btk", x, w), "exactly one of its axes"),
    "the first of three": ((K, 4, N), (5, K), lambda x, w, b: torch.einsum("bk,khn->bhn", x, w), "axis 0 of 3"),
}


@pytest.mark.parametrize("name", KEPT)
def test_any_other_product_is_kept_with_the_reason(name):
    shape, of_x, call, reason = KEPT[name]
    model, x = Product(shape, call).eval(), torch.randn(of_x)
    for example in (None, x):
        (decision,) = fp4fx.plan(model, EVERY, example).decisions
        assert (decision.label, decision.rule) == ("kept", "refusal")
        assert reason in decision.reason
    quantized = fp4fx.quantize(model, EVERY)
    assert packed_names(quantized) == []
    assert torch.equal(quantized(x), model(x))


def test_what_is_no_product_of_a_parameter_is_left_alone():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.scale = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            q = self.q(x)
            return torch.tanh(self.scale) @ (q @ q.transpose(-1, -2)) + q @ torch.exp(self.scale)

    for result in (trace(Mixed()), trace(Mixed(), torch.randn(2, 16, 16))):
        assert [s.parameter for s in result.sites] == ["q.weight"]
        assert [(n.name, n.reason.split(",")[0]) for n in result.unreached] == [("scale", "used in tanh")]


def test_a_factor_of_low_rank_is_a_layer_of_its_own_and_a_product_of_parameters_is_none():
    class LowRank(nn.Module):
        def __init__(self, merged):
            super().__init__()
            self.a, self.b, self.merged = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(16, 32)), merged

        def forward(self, x):
            return x @ (self.a @ self.b) if self.merged else x @ self.a @ self.b

    apart, merged = LowRank(False), LowRank(True)
    assert [(s.parameter, s.order) for s in trace(apart).sites] == [("a", "columns"), ("b", "columns")]
    plan = fp4fx.plan(merged, EVERY)
    assert plan.quantized == ()
    assert {n.name for n in plan.unreached} | {d.site.parameter for d in plan.decisions} == {"a", "b"}
    check_compiled(fp4fx.quantize(apart, EVERY), torch.randn(4, 32))


def test_uses_along_both_axes_are_kept():
    class AutoEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 16))

        def forward(self, x):
            return torch.relu(x @ self.w) @ self.w.t()

    plan = fp4fx.plan(AutoEncoder(), EVERY)
    assert [d.label for d in plan.decisions] == ["kept", "kept"]
    assert all("blocks run along another axis" in d.reason for d in plan.decisions)


def test_a_linear_that_multiplies_by_hand_may_quantize_its_input():
    class ByHand(nn.Linear):
        def forward(self, x):
            return x @ self.weight.t() + self.bias

    model, x = nn.Sequential(ByHand(32, 8)), torch.randn(4, 32)
    quantized = fp4fx.quantize(model, fp4fx.Policy.w4a4(skip_first=0, skip_last=0, compute="fp32"))
    assert fp4fx.report(quantized).rows[0].decision == "W4A4 in fp32"
    check_compiled(quantized, x)
    torch._dynamo.reset()
    policy = fp4fx.Policy.w4a4(skip_first=0, skip_last=0, compute="fp32")
    with torch.no_grad():
        found = torch.compile(copy.deepcopy(model), backend="fp4fx", options={"policy": policy})(x)
    torch.testing.assert_close(found, quantized(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["x @ w", "einsum into heads", "bmm"])
def test_a_dense_model_compiles_by_a_policy_too(name):
    shape, of_x, call, axis = CASES[name]
    model, x = Product(shape, call).eval(), torch.randn(of_x)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, backend="fp4fx", options={"policy": EVERY})(x)
        expected = with_rounded(model, {"weight": axis})(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (row,) = (row for row in fp4fx.report(model).rows if row.parameter == "weight")
    assert all(kernel.startswith("linear") for kernel in row.kernels), row.kernels


def test_gradients_pass_through_a_fused_product():
    shape, of_x, call, axis = CASES["x @ w"]
    model, x = Product(shape, call), torch.randn(of_x, requires_grad=True)
    quantized = fp4fx.quantize(model, EVERY)
    torch._dynamo.reset()
    torch.compile(quantized, backend="fp4fx")(x).square().sum().backward()
    found, x.grad = x.grad, None
    with_rounded(model, {"weight": axis})(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-3, atol=1e-3)


def test_a_batch_of_any_size_runs_in_one_graph():
    shape, _, call, _ = CASES["bmm"]
    quantized = fp4fx.quantize(Product(shape, call), EVERY)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(quantized, backend="fp4fx", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in (2, 5, 9):
            x = torch.randn(E, tokens, K)
            torch.testing.assert_close(compiled(x), quantized(x), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_under_autocast_the_result_has_its_dtype():
    shape, of_x, call, _ = CASES["einsum from the left"]
    quantized, x = fp4fx.quantize(Product(shape, call), EVERY), torch.randn(of_x)
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = torch.compile(quantized, backend="fp4fx")(x), quantized(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=5e-2)


def test_files_hold_columns_and_those_of_before_load(tmp_path):
    shape, of_x, call, _ = CASES["linear of t"]
    model, x = Product(shape, call).eval(), torch.randn(of_x)
    quantized = fp4fx.quantize(model, EVERY)
    fp4fx.save(quantized, tmp_path / "new.safetensors")
    again = fp4fx.load(Product(shape, call).eval(), tmp_path / "new.safetensors")
    assert torch.equal(again(x), quantized(x))
    older = fp4fx.plan(model, EVERY).to_dict()
    older["decisions"][0]["site"].update(order="rows", transform="t")
    before = apply(model, Plan.from_dict(older))
    fp4fx.save(before, tmp_path / "old.safetensors")
    loaded = fp4fx.load(Product(shape, call).eval(), tmp_path / "old.safetensors")
    assert torch.equal(loaded(x), with_rounded(model, {"weight": 1})(x))


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(4), lambda: nn.LazyConv2d(4, 3), nn.LazyBatchNorm1d])
def test_lazy_modules_say_what_to_do(make):
    with pytest.raises(TraceError, match="a lazy parameter has no shape yet; run the model once on an example input"):
        fp4fx.quantize(nn.Sequential(make()))
