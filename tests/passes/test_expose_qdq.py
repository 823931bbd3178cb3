import torch

from fp4fx.passes.expose_qdq import expose_qdq
from tests.passes.graphs import Captured

fake_quantize = torch.ops.fp4fx.fake_quantize.default


def test_without_gradients_fake_quantize_is_split():
    g = Captured(lambda x: fake_quantize(x, None, "channels").relu(), torch.randn(2, 20, 4, 4))
    assert g.apply(expose_qdq) == 1
    assert (g.count("fp4fx.quantize"), g.count("fp4fx.dequantize"), g.count("fp4fx.fake_quantize")) == (1, 1, 0)
    g.check(0)


def test_a_needed_gradient_keeps_it_whole():
    g = Captured(lambda x: fake_quantize(x).relu(), torch.randn(2, 20, requires_grad=True), grad=True)
    assert g.apply(expose_qdq) == 0
    assert g.count("fp4fx.fake_quantize") == 1


def test_a_dynamic_batch_stays_dynamic():
    x = torch.randn(6, 20)
    torch._dynamo.mark_dynamic(x, 0)
    g = Captured(lambda x: fake_quantize(x) * 2, x)
    g.apply(expose_qdq)
    shape = next(n for n in g.gm.graph.nodes if n.target is torch.ops.fp4fx.dequantize.default).args[3]
    assert isinstance(shape[0], torch.fx.Node) and shape[1] == 20
    g.check(0)
