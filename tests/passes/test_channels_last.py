import pytest
import torch
from torch import nn

from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.channels_last import channels_last
from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.fuse_conv import fuse_conv
from fp4fx.passes.fuse_linear import fuse_linear
from fp4fx.passes.restride import restride
from tests.passes.graphs import Captured, conv, linear, values

LAYERS = [
    ("fp4fx.conv", lambda: conv(nn.Conv2d, 16, 8, 3), (2, 16, 7, 6)),
    ("fp4fx.conv", lambda: conv(nn.Conv3d, 16, 8, 2), (2, 16, 4, 5, 3)),
    ("fp4fx.conv", lambda: conv(nn.Conv2d, 16, 8, 3, activations="nvfp4"), (2, 16, 7, 6)),
    ("fp4fx.conv_transpose", lambda: conv(nn.ConvTranspose2d, 16, 8, 2, 2), (2, 16, 3, 4)),
]


@pytest.mark.parametrize(("name", "layer", "shape"), LAYERS)
def test_convolutions_read_and_answer_in_channels_last(name, layer, shape):
    layer = layer()
    g = Captured(lambda x: layer(x) * 2, torch.randn(shape))
    assert g.apply(canonicalize, expose_qdq, fuse_conv, channels_last) == 1
    g.apply(restride)
    assert values(g)[name].movedim(1, -1).is_contiguous()
    g.check()


def test_one_request_for_a_whole_chain_with_dense_convolutions_in_it():
    first, depthwise, last = (
        conv(nn.Conv2d, 16, 32, 3),
        nn.Conv2d(32, 32, 3, groups=32),
        conv(nn.Conv2d, 32, 8, 2),
    )
    g = Captured(lambda x: last(depthwise(first(x)).relu()), torch.randn(2, 16, 7, 6))
    assert g.apply(canonicalize, fuse_conv, channels_last) == 3
    g.apply(restride)
    assert g.count("aten.contiguous") == 2  # the input, and the result as it was captured
    assert values(g)["aten.conv2d"].is_contiguous(memory_format=torch.channels_last)
    g.check()


def test_what_has_no_image_is_left_alone():
    for layer, shape in (
        (linear(), (3, 32)),
        (conv(nn.Conv1d, 16, 8, 3), (2, 16, 9)),
        (nn.Conv2d(3, 4, 3), (1, 3, 8, 8)),
    ):
        g = Captured(layer, torch.randn(shape))
        assert g.apply(canonicalize, fuse_linear, fuse_conv, channels_last, restride) == 0
        g.check(0)


def test_an_image_without_a_batch_has_one_while_it_is_convolved():
    layer = conv(nn.Conv2d, 16, 8, 3)
    g = Captured(lambda x: layer(x) * 2, torch.randn(16, 7, 6))
    assert g.apply(canonicalize, fuse_conv, channels_last) == 1
    g.apply(restride)
    g.check()


def test_where_gradients_flow_nothing_is_asked_for():
    layer = conv(nn.Conv2d, 16, 8, 3)
    g = Captured(layer, torch.randn(2, 16, 7, 6, requires_grad=True), grad=True)
    assert g.apply(canonicalize, fuse_conv, channels_last) == 0
