"""What follows a product inside an op: against plain PyTorch in fp64, one rounding, fakes, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from fp4fx import GradientError, ops
from fp4fx.ops.epilogue import ACTIVATIONS

fp4 = torch.ops.fp4fx
REFERENCE = {
    "none": lambda y: y,
    "relu": lambda y: y.clamp_min(0),
    "relu6": lambda y: y.clamp(0, 6),
    "silu": lambda y: y * y.sigmoid(),
    "gelu": lambda y: y * (1 + (y / 2**0.5).erf()) / 2,
    "gelu_tanh": lambda y: y * (1 + ((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)).tanh()) / 2,
    "hardswish": lambda y: y * (y + 3).clamp(0, 6) / 6,
    "hardsigmoid": lambda y: (y + 3).clamp(0, 6) / 6,
    "sigmoid": lambda y: 1 / (1 + (-y).exp()),
}


def packed(shape, order="rows", groups=1):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = ops.quantize(w, None, order, groups)
    return parts, ops.dequantize(*parts, shape, torch.float64, order, groups)


def cases(dtype):
    """op -> (its arguments up to the epilogue, the product in fp64, axis of the channels)."""
    linear, w = packed((7, 40))
    conv, wc = packed((6, 8, 3, 3), "conv", 2)
    transposed, wt = packed((8, 3, 3, 3), "conv_transpose", 2)
    x, image = torch.randn(3, 5, 40).to(dtype), torch.randn(2, 16, 6, 5).to(dtype)
    up = torch.randn(2, 8, 5, 4).to(dtype)
    none = (None, None, None)

    def rounded(weight):
        return weight.to(dtype).double()

    return {
        "linear": ((x, *linear, None, 40, *none), F.linear(x.double(), rounded(w)), -1),
        "conv": (
            (image, *conv, None, 16, (3, 3), [2, 1], [1, 1], [1, 1], 2, *none),
            F.conv2d(image.double(), rounded(wc), None, [2, 1], [1, 1], [1, 1], 2),
            1,
        ),
        "conv_transpose": (
            (up, *transposed, None, 8, (3, 3), [2, 2], [1, 1], [1, 1], [1, 1], 2, *none),
            F.conv_transpose2d(up.double(), rounded(wt), None, [2, 2], [1, 1], [1, 1], 2, [1, 1]),
            1,
        ),
    }


def test_the_reference_knows_every_activation():
    assert REFERENCE.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", list(REFERENCE))
@pytest.mark.parametrize("op", ["linear", "conv", "conv_transpose"])
def test_the_epilogue_is_what_it_says(op, activation):
    (args, product, axis) = cases(torch.float32)[op]
    n = product.shape[axis]
    scale, bias, residual = torch.randn(n).bfloat16(), torch.randn(n), torch.randn(product.shape)
    args = [*args[:4], bias, *args[5:]]
    y = getattr(fp4, op)(*args, scale, residual, activation, "int8")

    def along(v):
        return v.double() if axis == -1 else v.double()[:, None, None]

    expected = REFERENCE[activation](along(scale) * product + along(bias) + residual.double())
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
    assert y.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["linear", "conv", "conv_transpose"])
def test_there_is_one_rounding(op, dtype):
    """A bf16 product rounded before the subtraction of a residual close to it would be off by whole units."""
    args, product, axis = cases(dtype)[op]
    residual = -product.to(dtype)
    y = getattr(fp4, op)(*args, None, residual)
    torch.testing.assert_close(y.double(), product + residual.double(), rtol=1e-2, atol=1e-5)
    fast = getattr(ops, op)(*args, None, residual, widen=False)
    assert fast.dtype == dtype and not torch.equal(fast, y)  # the difference that the test is about

    bias = torch.randn(product.shape[axis])  # fp32 under a 16-bit product
    y = getattr(fp4, op)(*args[:4], bias, *args[5:])
    expected = product + (bias.double() if axis == -1 else bias.double()[:, None, None])
    torch.testing.assert_close(y, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-6)


def test_channels_last_stays():
    args, product, _ = cases(torch.float32)["conv"]
    x = args[0].to(memory_format=torch.channels_last)
    y = fp4.conv(x, *args[1:], None, torch.randn(product.shape), "relu")
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()


def test_a_packed_activation_has_an_epilogue_too():
    parts, _ = packed((7, 40))
    x = torch.randn(4, 40)
    xp, xs, xg = fp4.quantize(x)
    after = (torch.randn(7), torch.randn(4, 7), "silu")
    y = fp4.linear(xp, *parts, None, 40, xs, xg, torch.float32, *after)
    assert torch.equal(y, fp4.linear(fp4.fake_quantize(x), *parts, None, 40, None, None, None, *after))


@pytest.mark.parametrize("op", ["linear", "conv", "conv_transpose"])
def test_opcheck(op):
    args, product, axis = cases(torch.bfloat16)[op]
    after = (torch.randn(product.shape[axis]), torch.randn(product.shape).bfloat16(), "gelu", "fp32")
    opcheck(getattr(fp4, op).default, (*args, *after))


def test_what_does_not_fit_is_refused():
    args, product, _ = cases(torch.float32)["linear"]
    for after, message in (
        ((None, None, "tanh"), "activation: found 'tanh'"),
        ((None, None, "none", "fp8"), "compute: found 'fp8'"),
        ((None, product), "residual: found torch.float64"),
        ((None, torch.randn(5, 7)), r"residual: found \[5, 7\], expected the result's \[3, 5, 7\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fp4.linear(*args, *after)


def test_there_is_no_gradient_through_an_epilogue():
    for op in ("linear", "conv", "conv_transpose"):
        args, product, _ = cases(torch.float32)[op]
        x = args[0].requires_grad_()
        y = getattr(fp4, op)(x, *args[1:], None, torch.randn(product.shape), "relu")
        with pytest.raises(GradientError, match="no gradient with residual, relu; apply these after the op"):
            y.sum().backward()
