"""Which quantizes happen inside the linear that reads them."""

import pytest
import torch

import fp4fx
from fp4fx import capture, ops
from fp4fx.passes.select_kernels import select_kernels
from tests.passes.graphs import Captured

quantize, linear = torch.ops.fp4fx.quantize.default, torch.ops.fp4fx.linear.default
W = ops.quantize(torch.randn(8, 32))


def product(x, parts, *rest, dtype=torch.float32):
    packed, scale, g = parts
    return linear(packed, *W, None, 32, scale, g, dtype, None, None, "relu", *rest)


def quantizes(function, *inputs, tolerance=2e-2):
    """How many quantizes are left, and how many linears do it themselves; the graph gives what it gave."""
    g = Captured(function, *inputs)
    g.apply(select_kernels)
    g.check(tolerance)
    targets = [n.target for n in g.gm.graph.nodes]
    assert torch.ops.fp4fx_cpu.linear.default in targets
    inside = [n for n in g.gm.graph.nodes if n.kwargs.get("quantize_x")]
    assert all(capture.value(n).shape == (*capture.value(n.args[0]).shape[:-1], 8) for n in inside)
    return targets.count(torch.ops.fp4fx_cpu.quantize.default), len(inside)


X = torch.randn(3, 5, 32)


@pytest.mark.parametrize("given", [None, torch.tensor(0.01)])
@pytest.mark.parametrize("how", [(), ("rows", 1, "four_over_six"), ("rows", 1, "search", 1)])
def test_a_single_reader_quantizes_what_it_reads(cpu_ops, given, how):
    assert quantizes(lambda x: product(x, quantize(x, given, *how)), X) == (0, 1)


def test_a_chain_too(cpu_ops):
    def f(x):
        x = product(x, quantize(x)).repeat(1, 1, 4)
        return product(x, quantize(x))

    assert quantizes(f, X) == (0, 2)


def test_two_readers_share_one(cpu_ops):
    def f(x):
        parts = quantize(x)
        return product(x, parts) + product(x, parts)

    assert quantizes(f, X) == (1, 0)


def test_another_reader_of_the_codes_keeps_them(cpu_ops):
    def f(x):
        parts = quantize(x)
        return product(x, parts), parts[2]

    assert quantizes(f, X) == (1, 0)


def test_a_write_in_between_keeps_them_apart(cpu_ops):
    def f(x):
        x = x.clone()
        parts = quantize(x)
        x.view(-1).add_(1.0)  # through an alias
        return product(x, parts) + x.sum()

    assert quantizes(f, X) == (1, 0)

    def elsewhere(x):
        y, parts = x + 1, quantize(x)
        y.add_(1.0)
        return product(x, parts) + y.sum()

    assert quantizes(elsewhere, X) == (0, 1)


def test_what_is_quantized_otherwise_stays(cpu_ops):
    assert quantizes(lambda x: product(x, quantize(x, None, "rows", 1, "max", 16)), X) == (1, 0)
    assert quantizes(lambda x: product(x, quantize(x), "int8"), X, tolerance=0.3) == (1, 0), "it reads a row twice"
    assert quantizes(lambda x: product(x, quantize(x), dtype=torch.bfloat16), X, tolerance=0.1) == (1, 0)


def test_a_compiled_w4a4_model(cpu_ops):
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8)).eval()
    q = fp4fx.quantize(model, fp4fx.Policy.w4a4(skip_first=0, skip_last=0, compute="fp32"))
    with torch.no_grad():
        found = torch.compile(q, backend="fp4fx", dynamic=True)(X)
        torch.testing.assert_close(found, q(X), rtol=1e-5, atol=1e-5)


def test_a_compiled_w4a4_model_with_a_rule_for_its_activations(cpu_ops):
    """Quantized and compiled, and compiled from the dense model by the same policy."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8)).eval()
    how = {"skip_first": 0, "skip_last": 0, "compute": "fp32"}
    policy = fp4fx.Policy.w4a4(activation_scale_rule="four_over_six", **how)
    with torch.no_grad():
        expected, plain = (fp4fx.quantize(model, p)(X) for p in (policy, fp4fx.Policy.w4a4(**how)))
        found = torch.compile(fp4fx.quantize(model, policy), backend="fp4fx")(X)
        from_dense = torch.compile(model, backend="fp4fx", options={"policy": policy})(X)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(from_dense, expected, rtol=1e-5, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3
