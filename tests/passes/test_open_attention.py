import torch
from torch import nn

from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.fuse_linear import fuse_linear
from fp4fx.passes.open_attention import open_attention
from tests.passes.graphs import Captured, packed


def attention(**kwargs):
    mha = nn.MultiheadAttention(16, 2, batch_first=True, **kwargs).eval()
    packed(mha, "in_proj_weight")
    packed(mha.out_proj)
    return mha


def test_self_attention_opens_into_two_linears_on_packed_weights():
    mha = attention()
    g = Captured(lambda x: mha(x, x, x, need_weights=False)[0], torch.randn(2, 3, 16))
    assert g.apply(open_attention) == 1
    assert g.apply(canonicalize, fuse_linear) == 2
    assert g.count("fp4fx.dequantize") == 0
    g.check()


def test_averaged_weights_come_out_too():
    mha = attention()
    g = Captured(lambda x: mha(x, x, x)[1], torch.randn(2, 3, 16))
    assert g.apply(open_attention) == 1
    g.check()


def test_cross_attention_is_equal_too():
    mha = attention()
    g = Captured(lambda q, k: mha(q, k, k, need_weights=False)[0], torch.randn(2, 3, 16), torch.randn(2, 5, 16))
    assert g.apply(open_attention) == 1
    g.check()


def test_scaled_dot_product_attention_has_nothing_to_open():
    g = Captured(lambda q: nn.functional.scaled_dot_product_attention(q, q, q), torch.randn(1, 2, 3, 8))
    assert g.apply(open_attention) == 0
    g.check(0)
