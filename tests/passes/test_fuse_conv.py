import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.fuse_conv import fuse_conv
from tests.passes.graphs import Captured, conv

CASES = {
    "1d": (lambda a: conv(nn.Conv1d, 16, 8, 3, padding=1, activations=a), (2, 16, 9)),
    "2d strided": (lambda a: conv(nn.Conv2d, 16, 8, 3, 2, 1, activations=a), (2, 16, 9, 9)),
    "2d grouped": (lambda a: conv(nn.Conv2d, 16, 8, 3, groups=4, bias=False, activations=a), (2, 16, 9, 9)),
    "2d same": (lambda a: conv(nn.Conv2d, 16, 8, 5, padding="same", dilation=2, activations=a), (2, 16, 9, 9)),
    "2d valid": (lambda a: conv(nn.Conv2d, 16, 8, 3, padding="valid", activations=a), (2, 16, 9, 9)),
    "2d without a batch": (lambda a: conv(nn.Conv2d, 16, 8, 3, activations=a), (16, 9, 9)),
    "3d": (lambda a: conv(nn.Conv3d, 4, 8, 2, activations=a), (2, 4, 5, 5, 5)),
    "transposed 1d": (lambda a: conv(nn.ConvTranspose1d, 16, 8, 2, 2, activations=a), (2, 16, 5)),
    "transposed 2d": (lambda a: conv(nn.ConvTranspose2d, 16, 8, 3, 2, 1, 1, groups=2, activations=a), (2, 16, 5, 5)),
    "transposed 3d": (lambda a: conv(nn.ConvTranspose3d, 4, 2, 2, 2, activations=a), (1, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("activations", [None, "nvfp4"])
@pytest.mark.parametrize("case", list(CASES))
def test_every_kind_of_convolution_is_fused(case, activations):
    make, shape = CASES[case]
    layer = make(activations)
    g = Captured(layer, torch.randn(shape))
    assert g.apply(canonicalize, expose_qdq, fuse_conv) == 1
    assert g.count("fp4fx.conv_transpose" if layer.transposed else "fp4fx.conv") == 1
    batched = case != "2d without a batch"  # its quantized activation is squeezed in between
    assert g.count("fp4fx.dequantize") == (0 if batched or activations is None else 1)
    g.check()


def test_uneven_same_padding_puts_the_odd_zero_last():
    layer = conv(nn.Conv2d, 16, 8, (2, 4), padding="same")
    g = Captured(layer, torch.randn(2, 16, 9, 9))
    assert g.apply(canonicalize, fuse_conv) == 1
    g.check()


def test_uneven_same_padding_of_a_packed_activation_is_refused_with_the_reason():
    layer = conv(nn.Conv2d, 16, 8, 2, padding="same", activations="nvfp4")
    g = Captured(layer, torch.randn(2, 16, 9, 9))
    assert g.apply(canonicalize, expose_qdq, fuse_conv) == 0
    assert "uneven" in next(iter(g.ctx.refusals.values()))
    g.check()


def test_a_standardised_weight_is_left_alone():
    layer = conv(nn.Conv2d, 16, 8, 3)
    g = Captured(lambda x: F.conv2d(x, layer.weight - layer.weight.mean()), torch.randn(2, 16, 9, 9))
    assert g.apply(canonicalize, fuse_conv) == 0
    g.check(0)


def test_a_weight_packed_in_rows_is_no_convolution_weight():
    """A linear's weight viewed as a 1x1 kernel has its blocks along another order."""
    from tests.passes.graphs import linear

    layer = linear(16, 8)
    g = Captured(lambda x: F.conv2d(x, layer.weight[:, :, None, None]), torch.randn(2, 16, 5, 5))
    assert g.apply(canonicalize, fuse_conv) == 0
    g.check(0)
