"""Convolutions that stay dense run on oneDNN's op, into which Inductor draws what follows."""

import importlib.util
import logging
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.channels_last import channels_last
from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.fold_norms import fold_norms
from fp4fx.passes.fold_parameters import fold_parameters
from fp4fx.passes.fuse_conv import fuse_conv
from fp4fx.passes.fuse_dense import fuse_dense
from fp4fx.passes.fuse_epilogue import fuse_epilogue
from fp4fx.passes.restride import restride
from fp4fx.target import onednn_computes
from tests.passes.graphs import Captured, assert_true_strides, conv
from tests.passes.test_fuse_epilogue import norm

BEFORE = (canonicalize, expose_qdq, fuse_conv, fuse_epilogue, fold_norms, channels_last, fuse_dense)
AFTER = (restride, fold_parameters)
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if onednn_computes(dtype)]
X = torch.randn(2, 16, 9, 8)


def fused(function, *inputs, expect=1, **kwargs):
    g = Captured(function, *inputs, **kwargs)
    assert g.apply(*BEFORE) == expect
    g.apply(*AFTER)
    g.inputs += [part for folded in g.ctx.folded for part in folded.parts]
    assert calls(g) == expect
    return g


def calls(g):
    op = torch.ops.mkldnn._convolution_pointwise.default
    return len(g.gm.graph.find_nodes(op="call_function", target=op))


LAYERS = {
    "depthwise": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16),
    "depthwise, multiplied": lambda: nn.Conv2d(16, 48, 5, stride=2, groups=16, bias=False),
    "stem": lambda: nn.Conv2d(16, 24, 7, stride=(2, 1), padding=(3, 2)),
    "dilated": lambda: nn.Conv2d(16, 16, 3, dilation=2, groups=4),
    "one by one": lambda: nn.Conv2d(16, 8, 1),
    "one channel": lambda: nn.Conv2d(16, 1, 3),
    "same": lambda: nn.Conv2d(16, 16, 3, padding="same", groups=16),
    "uneven": lambda: nn.Conv2d(16, 16, (4, 3), padding="same", groups=16),
    "valid": lambda: nn.Conv2d(16, 16, 3, padding="valid", groups=16),
}


@pytest.mark.parametrize("layer", list(LAYERS))
def test_the_same_numbers_in_true_strides(layer):
    torch.manual_seed(0)
    first, dense = conv(nn.Conv2d, 16, 16, 1), LAYERS[layer]()
    g = fused(lambda x: dense(first(x)).flatten(1), X)
    assert not g.count("aten.conv2d") and g.count("aten.contiguous") <= 2  # the input, and the result as captured
    g.check()
    assert_true_strides(g)


def test_three_dimensions():
    first, dense = conv(nn.Conv3d, 16, 16, 1), nn.Conv3d(16, 16, 3, padding=1, groups=16)
    g = fused(lambda x: dense(first(x)), torch.randn(2, 16, 4, 5, 3))
    g.check()
    assert_true_strides(g)


def test_one_weight_read_twice_by_images_of_two_sizes_and_a_norm_behind_one():
    first, dense, bn = conv(nn.Conv2d, 16, 16, 1), nn.Conv2d(16, 16, 3, groups=16), norm(16)
    g = fused(lambda x: dense(bn(dense(first(x)))), X, expect=2)
    assert not g.count("aten.batch_norm") and not g.count("aten.rsqrt")
    g.check()
    assert_true_strides(g)


LEFT = {
    "a large weight": "its weight has 262656 values, more than the 262144 that are kept twice",
    "a computed weight": "its weight is not computed from parameters alone",
    "no batch": "its input has no batch",
    "fp64": "oneDNN does not compute in torch.float64 here",
    "autocast": "its dtypes are torch.bfloat16, torch.float32, expected one",
    "switched off": "oneDNN does not compute in torch.float32 here",
    "sizes that vary": "its input is of shape .*, expected fixed sizes",
    "an empty batch": r"its input is of shape \(0, 16, 9, 8\), expected fixed sizes",
    "another device": "it is on meta",
    "a sum of bf16": r"it is read by i?add, and PyTorch has no sum and ReLU of torch.bfloat16 behind groups",
}


@pytest.mark.parametrize("case", list(LEFT))
def test_what_is_left_alone_has_a_reason(case, caplog):
    first, dense = conv(nn.Conv2d, 16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
    x = X[0] if case == "no batch" else X[:0] if case == "an empty batch" else X.clone()
    if case == "a large weight":
        dense = nn.Conv2d(16, 32, (27, 19), padding=13)
    if case == "fp64":
        first, dense, x = first.double(), dense.double(), x.double()
    if case == "sizes that vary":
        torch._dynamo.mark_dynamic(x, 0)
    if case == "another device":
        first, dense, x = first.to("meta"), dense.to("meta"), x.to("meta")

    if case == "a sum of bf16":
        first, dense, x = first.bfloat16(), dense.bfloat16(), x.bfloat16()

    def f(x):
        if case == "a sum of bf16":
            return F.relu(F.dropout(dense(y := first(x)), training=False) + y)
        if case == "a computed weight":
            return F.conv2d(first(x), dense.weight * x.mean(), dense.bias, padding=1, groups=16)
        return dense(first(x))

    caplog.set_level(logging.DEBUG, logger=fuse_dense.__module__)
    with (
        torch.backends.mkldnn.flags(enabled=case != "switched off"),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
    ):
        g = fused(f, x, expect=0)
    assert g.count("aten.conv2d") == 1
    (told,) = (r.getMessage() for r in caplog.records if r.name == fuse_dense.__module__)
    assert re.search(f"^conv2d\\w* stays aten.conv2d: {LEFT[case]}", told)


def test_a_torch_without_onednn(monkeypatch, caplog):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    spec = importlib.util.find_spec(fuse_dense.__module__)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    first, dense = conv(nn.Conv2d, 16, 16, 1), nn.Conv2d(16, 16, 3, groups=16)
    g = Captured(lambda x: dense(first(x)), X)
    caplog.set_level(logging.DEBUG, logger=module.__name__)
    assert g.apply(*BEFORE[:-1], module.fuse_dense) == 0 and g.count("aten.conv2d") == 1
    assert "oneDNN does not compute in torch.float32 here" in caplog.text


def test_a_gradient_freezing_and_a_graph_without_fused_ops():
    first, dense = conv(nn.Conv2d, 16, 16, 1), nn.Conv2d(16, 16, 3, groups=16)
    fused(lambda x: dense(first(x)), X, expect=0, grad=True)
    fused(lambda x: dense(first(x)), X, expect=0, freezing=True)
    fused(dense, X, expect=0)


ACTIVATIONS = {
    "relu": F.relu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "swish": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "hardtanh": F.relu6,
}


class Net(nn.Module):
    """A packed convolution, a dense one before each activation, one that is read twice, and residuals."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = conv(nn.Conv2d, 16, 16, 1), norm(16)
        self.dense = nn.ModuleList(
            nn.Conv2d(16, 16, 3, padding=1, groups=groups) for groups in [16] * (len(ACTIVATIONS) + 1) + [1, 1]
        )

    def forward(self, x):
        x = self.first(x)
        for layer, activation in zip(self.dense, ACTIVATIONS.values(), strict=False):
            x = activation(layer(x))
        *_, twice, added, last = self.dense
        x = torch.tanh(y := twice(x)) * y
        x = F.relu(added(x) + x)
        return self.norm(last(x)) + x


@pytest.mark.parametrize("dtype", DTYPES)
def test_inductor_draws_in_what_follows(dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    counters.clear()
    net, x = Net().eval().to(dtype), X.to(dtype)
    with torch.no_grad():
        compiled = torch.compile(net, backend="fp4fx", fullgraph=True, dynamic=False)
        y, (code,) = run_and_get_code(compiled, x)
        exact = net.double()(x.double())
    lines = [line for line in code.splitlines() if "= torch.ops.mkldnn._convolution_pointwise" in line]
    assert len(lines) == len(ACTIVATIONS) + 3 and "= extern_kernels.convolution" not in code
    for name, line in zip(ACTIVATIONS, lines, strict=False):
        assert f"'{name}'" in line
    twice, added, last = lines[-3:]
    assert "'none'" in twice and "'add'" in added and "'relu'" in added and "'add'" in last
    assert counters["inductor"]["fxgraph_cache_bypass"] == counters["aot_autograd"]["autograd_cache_bypass"] == 0
    error = float((y.double() - exact).norm() / exact.norm())
    assert error < {torch.float32: 1e-2}.get(dtype, 2e-2)
