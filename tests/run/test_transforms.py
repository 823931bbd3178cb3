"""What torch.func and torch.fx do to a module, done to a quantized one."""

import io
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import fp4fx
from tests.models import Attention, ConvNet

ALL = fp4fx.Policy(skip_first=0, skip_last=0, compute="fp32")
W4A4 = fp4fx.Policy.w4a4(skip_first=0, skip_last=0, compute="fp32")
STATIC = fp4fx.Policy(activations="nvfp4-static", skip_first=0, skip_last=0, compute="fp32")


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("policy", [ALL, W4A4, STATIC], ids=["w4a16", "w4a4", "static"])
@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_over_inputs(policy, in_dim):
    x = torch.randn(4, 2, 3, 8, 8)
    q = fp4fx.quantize(ConvNet().eval(), policy, x[0])
    with torch.no_grad():
        expected = torch.stack([q(one) for one in x])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # vmap's fallback to a loop is a warning
            found = vmap(q, in_dims=in_dim)(x.movedim(0, in_dim))
    close(found, expected)


def test_gradients_per_sample():
    q = fp4fx.quantize(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 8)).eval(), ALL)
    biases = dict(q.named_parameters())

    def loss(biases, x):
        return functional_call(q, biases, (x[None],)).square().sum()

    x = torch.randn(3, 32)
    found = vmap(grad(loss), in_dims=(None, 0))(biases, x)
    for i, one in enumerate(x):
        q.zero_grad()
        q(one[None]).square().sum().backward()
        for name, p in q.named_parameters():
            close(found[name][i], p.grad)


def test_the_fused_ops_under_vmap():
    q = fp4fx.quantize(nn.Linear(40, 8), ALL)
    parts = [q.weight_packed, q.weight_scale, q.weight_global_scale]
    x = torch.randn(5, 3, 40)
    found = vmap(lambda x: torch.ops.fp4fx.linear(x, *parts, q.bias, 40))(x)
    close(found, q(x))


def test_functional_call_with_other_bytes_and_biases():
    a, b = (fp4fx.quantize(ConvNet().eval(), ALL) for _ in range(2))
    x, before = torch.randn(2, 3, 8, 8), a(torch.ones(2, 3, 8, 8))
    assert torch.equal(functional_call(a, b.state_dict(), (x,)), b(x))
    close(functional_call(a, {"head.bias": torch.zeros(10)}, (x,)), a(x) - a.head.bias)
    assert torch.equal(a(torch.ones(2, 3, 8, 8)), before)


def test_functional_call_with_a_dense_weight_encodes_it_for_that_call():
    q, dense = fp4fx.quantize(nn.Linear(40, 8), ALL), torch.randn(8, 40)
    before, sqnr, x = (
        {name: t.clone() for name, t in q.state_dict().items()},
        q.nvfp4["weight"].sqnr,
        torch.randn(2, 40),
    )
    expected = fp4fx.quantize(nn.Linear(40, 8), ALL)
    expected.load_state_dict({"weight": dense, "bias": q.bias})
    assert torch.equal(functional_call(q, {"weight": dense}, (x,)), expected(x))
    assert all(torch.equal(before[name], t) for name, t in q.state_dict().items())  # not encoded a second time
    assert q.nvfp4["weight"].sqnr == sqnr
    q.weight = q.weight
    assert all(torch.equal(before[name], t) for name, t in q.state_dict().items())


def test_a_decoded_weight_that_has_changed_is_encoded():
    q = fp4fx.quantize(nn.Linear(40, 8), ALL)
    weight = q.weight
    q.weight = torch.randn(8, 40)
    weight.data.mul_(2)  # leaves no trace in the tensor's version
    q.weight = weight
    assert (q.weight - weight).norm() < 0.2 * weight.norm()
    weight = q.weight
    q.weight_packed.zero_()
    q.weight = weight
    assert (q.weight - weight).norm() < 0.2 * weight.norm()


def test_functional_call_with_a_dense_weight_on_meta():
    q = fp4fx.quantize(nn.Linear(40, 8), ALL).to("meta")
    dense, x = (torch.empty(n, 40, device="meta") for n in (8, 2))
    assert functional_call(q, {"weight": dense}, (x,)).shape == (2, 8)


def test_a_decoded_weight_that_was_assigned_over_is_a_plain_tensor():
    q = fp4fx.quantize(nn.Linear(40, 8), ALL)
    weight = q.weight
    q.weight = torch.randn(8, 40)
    torch.save(weight, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file), weight)  # weights_only: tensors and nothing else


@pytest.mark.parametrize("policy", [ALL, W4A4], ids=["w4a16", "w4a4"])
def test_a_symbolic_trace_keeps_packed_layers_whole(policy):
    q, x = fp4fx.quantize(ConvNet().eval(), policy), torch.randn(2, 3, 8, 8)
    traced = torch.fx.symbolic_trace(q)
    calls = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {"stem", "body", "grouped", "head"} <= calls
    assert not [t for t in traced.state_dict().values() if t.is_floating_point() and t.dim() > 1]
    close(traced(x), q(x))
    torch._dynamo.reset()
    with torch.no_grad():
        close(torch.compile(traced, backend="fp4fx", fullgraph=True)(x), q(x))
    assert all(row.kernels for row in fp4fx.report(q).rows if row.decision != "kept")


def test_a_symbolic_trace_through_a_packed_module_is_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    q = fp4fx.quantize(nn.Sequential(Own()), ALL)
    with pytest.raises(fp4fx.TraceError, match=r"NVFP4Own\.weight: .*is_leaf_module keeps Own whole"):
        torch.fx.symbolic_trace(q)

    class Keeping(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, Own) or super().is_leaf_module(m, name)

    x = torch.randn(2, 32)
    assert torch.equal(torch.fx.GraphModule(q, Keeping().trace(q))(x), q(x))


def test_make_fx_records_the_ops():
    q, x = fp4fx.quantize(Attention().eval(), ALL), torch.randn(2, 3, 8)
    traced = torch.fx.experimental.proxy_tensor.make_fx(q)(x)
    assert sum(node.target is torch.ops.fp4fx.dequantize.default for node in traced.graph.nodes) >= 4
    close(traced(x), q(x))


def test_a_compiled_vmap_is_left_as_it_is_and_says_so():
    torch._dynamo.reset()
    q, x = fp4fx.quantize(nn.Sequential(nn.Linear(32, 16), nn.ReLU()).eval(), ALL), torch.randn(3, 2, 32)
    with torch.no_grad():
        mapped = vmap(q.forward)  # Dynamo (torch 2.15) cannot print a module, which vmap does
        close(torch.compile(mapped, backend="fp4fx")(x), q(x))
    (row,) = fp4fx.report(q).rows
    assert row.kernels == ("dequantize: reference",) and "torch.func" in row.refusals[0]
