import torch

from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.merge_qdq import merge_qdq
from tests.passes.graphs import Captured, conv, linear

fake_quantize = torch.ops.fp4fx.fake_quantize.default


def test_three_readers_of_one_activation_share_one_quantize():
    def f(x):
        return fake_quantize(x).relu() + fake_quantize(x).exp() + fake_quantize(x)

    g = Captured(f, torch.randn(4, 32))
    assert g.apply(expose_qdq, merge_qdq) == 2
    assert (g.count("fp4fx.quantize"), g.count("fp4fx.dequantize")) == (1, 1)
    g.check(0)


def test_a_write_in_between_keeps_them_apart():
    def f(x):
        x = x.clone()
        a = fake_quantize(x)
        x.view(-1).add_(1.0)  # through an alias
        return a + fake_quantize(x)

    g = Captured(f, torch.randn(4, 32))
    assert g.apply(expose_qdq, merge_qdq) == 0
    assert g.count("fp4fx.quantize") == 2
    g.check(0)


def test_a_write_by_a_positional_inplace_is_a_write():
    relu6 = torch.nn.ReLU6(inplace=True)

    def f(x):
        x = x * 4
        a = fake_quantize(x)
        relu6(x)
        return a + fake_quantize(x)

    g = Captured(f, torch.randn(4, 32))
    assert g.apply(expose_qdq, merge_qdq) == 0
    g.check(0)


def test_a_write_elsewhere_does_not():
    def f(x):
        a, y = fake_quantize(x), x + 1
        y.relu_()
        return a + fake_quantize(x) + y

    g = Captured(f, torch.randn(4, 32))
    assert g.apply(expose_qdq, merge_qdq) == 1
    g.check(0)


def test_another_scale_or_order_is_another_quantize():
    def f(x):
        return fake_quantize(x, None, "rows") + fake_quantize(x, None, "channels")

    g = Captured(f, torch.randn(2, 16, 4, 32))
    assert g.apply(expose_qdq, merge_qdq) == 0
    g.check(0)


def test_another_scale_rule_is_another_quantize():
    def f(x):
        plain, better = (fake_quantize(x, None, "rows", 1, rule) for rule in ("max", "four_over_six"))
        return plain + better + fake_quantize(x, None, "rows", 1, "four_over_six")

    g = Captured(f, torch.randn(4, 32))
    assert g.apply(expose_qdq, merge_qdq) == 1
    rules = [n.args[4] for n in g.gm.graph.nodes if n.target is torch.ops.fp4fx.quantize.default]
    assert rules == ["max", "four_over_six"]
    g.check(0)


def test_a_layer_used_twice_is_decoded_once():
    layer = linear(32, 32)
    g = Captured(lambda x: layer(layer(x)), torch.randn(4, 32))
    assert g.count("fp4fx.dequantize") == 2
    g.apply(merge_qdq)
    assert g.count("fp4fx.dequantize") == 1
    g.check(0)


def test_convolution_siblings_share_too():
    a = conv(torch.nn.Conv2d, 16, 8, 3, padding=1, activations="nvfp4")
    b = conv(torch.nn.Conv2d, 16, 8, 1, activations="nvfp4")
    g = Captured(lambda x: a(x) + b(x), torch.randn(2, 16, 6, 6))
    assert g.apply(expose_qdq, merge_qdq) == 1
    g.check(0)
