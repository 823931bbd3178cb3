"""Norms behind convolutions that stay dense."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.channels_last import channels_last
from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.fold_norms import fold_norms
from fp4fx.passes.fold_parameters import fold_parameters
from fp4fx.passes.fuse_conv import fuse_conv
from fp4fx.passes.fuse_epilogue import fuse_epilogue
from fp4fx.passes.restride import restride
from tests.passes.graphs import Captured, assert_true_strides, conv
from tests.passes.test_fuse_epilogue import norm

BEFORE = (canonicalize, expose_qdq, fuse_conv, fuse_epilogue, fold_norms)
AFTER = (channels_last, restride, fold_parameters)


def folded(function, *inputs, expect=1, **kwargs):
    g = Captured(function, *inputs, **kwargs)
    assert g.apply(*BEFORE) == expect
    g.apply(*AFTER)
    g.inputs += [part for folded in g.ctx.folded for part in folded.parts]
    return g


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("cls", "shape"), [(nn.Conv1d, (2, 16, 9)), (nn.Conv2d, (2, 16, 7, 6)), (nn.Conv3d, (2, 16, 3, 4, 5))]
)
def test_the_weight_holds_the_norm(cls, shape, affine, bias):
    rank = len(shape) - 2
    first, dense = conv(cls, 16, 16, 1), cls(16, 16, 3, padding=1, groups=16, bias=bias)
    bn = norm(16, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1], affine=affine)
    g = folded(lambda x: bn(dense(first(x))), torch.randn(shape))
    assert not g.count("aten.batch_norm") and not g.count("aten.rsqrt")
    g.check()
    assert_true_strides(g)


@pytest.mark.parametrize("case", ["training", "read elsewhere", "large", "computed weight", "unfused graph"])
def test_what_is_left_alone(case):
    first = conv(nn.Conv2d, 16, 16, 1) if case != "unfused graph" else nn.Identity()
    dense = nn.Conv2d(16, 16, (130, 130), padding=65) if case == "large" else nn.Conv2d(16, 16, 3, padding=1)
    bn = norm(16).train() if case == "training" else norm(16)

    def f(x):
        x = first(x)
        if case == "computed weight":
            return bn(F.conv2d(x, dense.weight - dense.weight.mean(), dense.bias))
        y = dense(x)
        return bn(y) + y if case == "read elsewhere" else bn(y)

    g = folded(f, torch.randn(2, 16, 7, 6), expect=0)
    assert g.count("aten.batch_norm") == 1


def test_a_gradient_is_left_alone():
    first, dense, bn = conv(nn.Conv2d, 16, 16, 1), nn.Conv2d(16, 16, 3, padding=1), norm(16)
    g = folded(lambda x: bn(dense(first(x))), torch.randn(2, 16, 7, 6), expect=0, grad=True)
    assert g.ctx.folded == []


def test_a_float_that_is_an_input_is_left_alone():
    """Dynamo captures so at first, under dynamic=True, and once more when it has seen that the float is constant."""
    torch._dynamo.reset()
    model = nn.Sequential(conv(nn.Conv2d, 16, 16, 1), nn.Conv2d(16, 16, 3, padding=1), norm(16)).eval()
    compiled = torch.compile(model, backend="fp4fx", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3):
            x = torch.randn(batch, 16, 7, 6)
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=5e-2)


def test_freezing_leaves_it_to_inductor():
    first, dense, bn = conv(nn.Conv2d, 16, 16, 1), nn.Conv2d(16, 16, 3, padding=1), norm(16)
    folded(lambda x: bn(dense(first(x))), torch.randn(2, 16, 7, 6), expect=0, freezing=True)
