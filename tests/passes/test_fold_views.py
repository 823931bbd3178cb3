import torch
import torch.nn.functional as F
from torch import nn

from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.fold_views import fold_views
from fp4fx.passes.fuse_linear import fuse_linear
from tests.passes.graphs import Captured, linear, packed


class Stack(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))


def stack(*shape, order="rows"):
    return packed(Stack(*shape), "w", order)


def test_a_transpose_is_decoded_from_the_other_order():
    m = stack(40, 8, order="columns")
    g = Captured(lambda x: F.linear(x, m.w.t()), torch.randn(3, 40))
    assert g.apply(canonicalize, fold_views) == 1
    assert g.apply(fuse_linear) == 1
    assert g.count("fp4fx.dequantize") == 0
    g.check()


def test_two_transposes_are_none():
    m = stack(8, 40)
    g = Captured(lambda x: F.linear(x, m.w.transpose(-1, 0).T.contiguous()), torch.randn(3, 40))
    assert g.apply(canonicalize, fold_views) == 3
    assert g.apply(fuse_linear) == 1
    g.check()


def test_rows_and_matrices_are_views_of_the_codes():
    m = stack(6, 8, 40)

    def f(x):
        first, *_ = m.w.unbind()
        return (
            F.linear(x, m.w[2]) + F.linear(x, first) + F.linear(x, m.w[3:5][1]) + F.linear(x, m.w[0].chunk(2)[1]).sum()
        )

    g = Captured(f, torch.randn(3, 40))
    assert g.apply(canonicalize, fold_views) >= 6
    assert g.apply(fuse_linear) == 4
    assert g.count("fp4fx.dequantize") == 0
    g.check()


def test_a_cut_along_the_columns_stays():
    m, turned = stack(8, 40), stack(40, 8, order="columns")
    g = Captured(lambda x: x @ m.w[:, 16:].t() + x @ turned.w[16:], torch.randn(3, 24))
    assert g.apply(canonicalize, fold_views) == 0
    g.check(0)


def test_a_permutation_of_the_stack_stays():
    m = stack(3, 8, 40)
    g = Captured(lambda x: x @ m.w.permute(1, 2, 0)[0], torch.randn(3, 40))
    assert g.apply(canonicalize, fold_views) == 0
    g.check(0)


def test_a_mask_of_a_stack_stays():
    m = stack(3, 8, 40)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        g = Captured(lambda mask: m.w[mask].sum(0), torch.tensor([True, False, True]))
    assert g.apply(canonicalize, fold_views) == 0
    g.check(0)


def test_a_dense_weight_is_left_alone():
    layer, other = nn.Linear(40, 8), linear(40, 8)
    g = Captured(lambda x: x @ layer.weight.t() + other(x), torch.randn(3, 40))
    assert g.apply(canonicalize, fold_views) == 0
    g.check(0)
