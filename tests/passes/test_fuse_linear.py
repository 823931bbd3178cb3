import torch
import torch.nn.functional as F
from torch import nn

from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.fuse_linear import fuse_linear
from tests.passes.graphs import Captured, linear, packed


def test_a_linear_on_a_decoded_weight_reads_it_packed():
    layer = linear(40, 8)
    g = Captured(layer, torch.randn(3, 5, 40))
    assert g.apply(canonicalize, fuse_linear) == 1
    assert (g.count("fp4fx.linear"), g.count("fp4fx.dequantize"), g.count("aten.linear")) == (1, 0, 0)
    g.check()


def test_a_quantized_activation_is_read_packed_too():
    layer = packed(nn.Linear(40, 8), activations="nvfp4")
    g = Captured(layer, torch.randn(3, 5, 40))
    assert g.apply(canonicalize, expose_qdq, fuse_linear) == 1
    assert (g.count("fp4fx.quantize"), g.count("fp4fx.dequantize")) == (1, 0)
    g.check()


def test_under_autocast_the_activation_is_cast_and_not_the_codes():
    layer = linear(40, 8)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    g = Captured(f, torch.randn(3, 40))
    assert g.apply(canonicalize, fuse_linear) == 1
    assert g.gm(*g.inputs)[0].dtype == torch.bfloat16
    assert torch.equal(g.gm(*g.inputs)[0], g.expected)


def test_a_weight_changed_on_its_way_is_left_alone():
    layer = linear(32, 8)
    g = Captured(lambda x: F.linear(x, layer.weight * 2), torch.randn(3, 32))
    assert g.apply(canonicalize, fuse_linear) == 0
    assert g.count("fp4fx.dequantize") == 1
    g.check(0)


def test_a_weight_also_read_elsewhere_is_fused_and_decoded():
    layer = linear(32, 8)

    def f(x):
        w = layer.weight
        return F.linear(x, w) + w.sum()

    g = Captured(f, torch.randn(3, 32))
    assert g.apply(canonicalize, fuse_linear) == 1
    assert g.count("fp4fx.dequantize") == 1
    g.check()


def test_a_dense_linear_is_left_alone():
    layer = nn.Linear(32, 8)
    g = Captured(layer, torch.randn(3, 32))
    assert g.apply(canonicalize, fuse_linear) == 0
    g.check(0)
