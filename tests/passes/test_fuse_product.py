import pytest
import torch
from torch import nn

from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.fold_views import fold_views
from fp4fx.passes.fuse_product import fuse_product
from fp4fx.products import Terms, terms_of
from tests.passes.graphs import Captured, packed
from tests.passes.test_fold_views import stack


def fused(f, *inputs, **options):
    g = Captured(f, *inputs, **options)
    return g, g.apply(canonicalize, expose_qdq, fold_views, fuse_product)


def test_a_product_is_a_linear():
    m = stack(40, 8, order="columns")
    g, count = fused(lambda x: x @ m.w, torch.randn(3, 5, 40))
    assert count == 1
    assert (g.count("fp4fx.linear"), g.count("fp4fx.dequantize"), g.count("aten.permute")) == (1, 0, 0)
    g.check()


def test_a_bias_goes_with_it():
    m, b = stack(40, 8, order="columns"), torch.randn(8)
    g, count = fused(lambda x: torch.addmm(b, x, m.w), torch.randn(3, 40))
    assert (count, g.count("fp4fx.linear"), g.count("aten.add")) == (1, 1, 0)
    g.check()


def test_a_quantized_activation_is_read_packed():
    class ByHand(nn.Linear):
        def forward(self, x):
            return x @ self.weight.t()

    layer = packed(ByHand(40, 8), activations="nvfp4")
    g, count = fused(layer, torch.randn(3, 40))
    assert count == 1
    assert (g.count("fp4fx.quantize"), g.count("fp4fx.dequantize")) == (1, 0)
    g.check()


def test_a_product_from_the_left_is_turned():
    m = stack(8, 40)
    g, count = fused(lambda x: m.w @ x, torch.randn(3, 40, 5))
    assert (count, g.count("fp4fx.linear"), g.count("aten.permute")) == (1, 1, 2)
    g.check()


def test_a_stack_is_one_call_each_up_to_a_number():
    small, large, x = stack(3, 40, 8, order="columns"), stack(33, 40, 8, order="columns"), torch.randn(33, 2, 40)
    g, count = fused(lambda x: torch.bmm(x, small.w), x[:3])
    assert (count, g.count("fp4fx.linear"), g.count("fp4fx.dequantize")) == (1, 3, 0)
    g.check()
    g, count = fused(lambda x: torch.bmm(x, large.w), x)
    assert (count, g.count("fp4fx.dequantize")) == (0, 1)
    assert list(g.ctx.refusals.values()) == ["33 matrices in one product, of which 32 at most become calls"]
    g.check(0)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: torch.addmm(x[:, :8], x, w, alpha=2),  # scaled
        lambda x, w: torch.einsum("bk,kn->n", x, w),  # sums over the batch too
        lambda x, w: torch.einsum("kk,kn->n", x[:, :3].t() @ x[:, :3], w[:3]),  # a diagonal
        lambda x, w: x[:, :1] * w[0] @ w.t()[:, :1],  # multiplies what depends on the weight, and a part of its rows
        lambda x, w: torch.einsum("bk,kn->bkn", x, w),  # sums over nothing
    ],
)
def test_what_is_no_linear_is_left_alone(f):
    m = stack(40, 8, order="columns")
    g, count = fused(lambda x: f(x, m.w), torch.randn(3, 40))
    assert (count, g.count("fp4fx.linear")) == (0, 0)
    g.check(0)


def test_a_stack_that_is_broadcast_along_x_is_left_alone():
    m = stack(1, 40, 8, order="columns")
    g, count = fused(lambda x: x @ m.w, torch.randn(3, 5, 40))
    assert count == 0
    g.check(0)


def terms(left, right, name="matmul", *args):
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    return terms_of(graph.call_method(name, (*args, x, y)), (left, right))


def test_the_axes_of_products():
    assert terms(2, 2) == Terms("MK", "KN", "MN")
    assert terms(1, 2) == Terms("K", "KN", "N")
    assert terms(2, 1) == Terms("MK", "K", "M")
    assert terms(4, 3) == Terms("abMK", "bKN", "abMN")
    assert terms(2, 4) == Terms("MK", "abKN", "abMN")
    assert terms(3, 2, "einsum", "...k, nk -> ...n") == Terms("abk", "nk", "abn")
    assert terms(3, 2, "einsum", "...k,nk") == Terms("abk", "nk", "abn")
    assert terms(2, 2, "einsum", "ij,jk") == Terms("ij", "jk", "ik")
    assert terms(2, 2, "einsum", "ii,ik->k") is None
    assert terms(2, 2, "einsum", "ij,jk,kl->il") is None
    assert terms(3, 3, "addbmm") is None
