import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.fuse_conv import fuse_conv
from fp4fx.passes.fuse_epilogue import fuse_epilogue
from fp4fx.passes.fuse_linear import fuse_linear
from tests.passes.graphs import Captured, conv, linear

IMAGE = (2, 16, 7, 6)


def norm(n=8, cls=nn.BatchNorm2d, **kwargs):
    """A normalisation whose every number matters."""
    bn = cls(n, **kwargs).eval()
    for tensor in (bn.running_mean, bn.running_var, *bn.parameters()):
        tensor.data.uniform_(0.5, 2)
    return bn


def fused(function, *inputs, expect=1, **kwargs):
    g = Captured(function, *inputs, **kwargs)
    assert g.apply(canonicalize, expose_qdq, fuse_linear, fuse_conv, fuse_epilogue) == expect
    return g


def epilogue(g, index=0):
    """Of the index-th fused op: whether it scales, has a bias, adds, and its activation."""
    ops = [n for n in g.gm.graph.nodes if str(n.target).startswith(("fp4fx.conv", "fp4fx.linear"))]
    scale, residual, activation, _ = ops[index].args[-4:]
    return scale is not None, ops[index].args[4] is not None, residual is not None, activation


def left(g):
    """Calls of the graph that are neither fp4fx ops nor on vectors of channels."""
    calls = [n for n in g.gm.graph.nodes if n.op in ("call_function", "call_method")]
    calls = [n for n in calls if not str(n.target).startswith("fp4fx.") and n.target is not operator.getitem]
    return [n for n in calls if n.meta["example_value"].dim() > 1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_residual_and_activation_become_one_op(bias, affine, dtype):
    layer, bn = conv(nn.Conv2d, 16, 8, 3, padding=1, bias=bias).to(dtype), norm(affine=affine).to(dtype)

    def f(x, identity):
        y = bn(layer(x))
        y += identity
        return F.relu(y, inplace=True)

    g = fused(f, torch.randn(IMAGE).to(dtype), torch.randn(2, 8, 7, 6).to(dtype))
    assert epilogue(g) == (True, True, True, "relu") and left(g) == []
    g.check(1e-5 if dtype == torch.float32 else 4e-2)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: (conv(nn.Conv1d, 16, 8, 3), norm(cls=nn.BatchNorm1d), (2, 16, 9)),
        lambda: (conv(nn.Conv3d, 4, 8, 2), norm(cls=nn.BatchNorm3d), (2, 4, 3, 3, 3)),
        lambda: (conv(nn.ConvTranspose2d, 16, 8, 2, 2), norm(), (2, 16, 3, 4)),
        lambda: (conv(nn.Conv2d, 16, 8, 1, activations="nvfp4"), norm(), (2, 16, 3, 4)),
        lambda: (linear(), norm(cls=nn.BatchNorm1d), (4, 32)),
    ],
)
def test_every_kind_of_layer(layer):
    layer, bn, shape = layer()
    g = fused(lambda x: F.silu(bn(layer(x))), torch.randn(shape))
    assert epilogue(g) == (True, True, False, "silu") and not left(g)
    g.check()


ACTIVATIONS = {
    "relu": [F.relu, torch.relu, lambda y: y.relu(), lambda y: y.relu_(), lambda y: y.clamp(min=0), torch.relu_],
    "relu6": [F.relu6, nn.ReLU6(inplace=True), lambda y: y.clamp_(0, 6), lambda y: torch.clamp(y, max=6, min=0)],
    "silu": [F.silu, nn.SiLU(inplace=True)],
    "gelu": [F.gelu, nn.GELU()],
    "gelu_tanh": [lambda y: F.gelu(y, approximate="tanh"), nn.GELU("tanh")],
    "hardswish": [F.hardswish, nn.Hardswish(inplace=True)],
    "hardsigmoid": [F.hardsigmoid, nn.Hardsigmoid(inplace=True)],
    "sigmoid": [torch.sigmoid, lambda y: y.sigmoid_(), F.sigmoid],
}


@pytest.mark.parametrize(("name", "spelling"), [(k, f) for k, fs in ACTIVATIONS.items() for f in fs])
def test_every_spelling_of_an_activation(name, spelling):
    layer = linear()
    g = fused(lambda x: spelling(layer(x)), torch.randn(3, 32))
    assert epilogue(g) == (False, True, False, name) and not left(g)
    g.check()


@pytest.mark.parametrize(
    "spelling", [lambda y: y.clamp(-1, 6), lambda y: y.clamp(0, 5), F.leaky_relu, torch.tanh, F.mish]
)
def test_other_activations_stay(spelling):
    layer = linear()
    fused(lambda x: spelling(layer(x)), torch.randn(3, 32), expect=0).check(0)


def test_layer_scale_through_a_permutation():
    """A ConvNeXt block: rows, permuted to an image, scaled per channel, added to the image."""
    layer, gamma = linear(8, 16), nn.Parameter(torch.randn(16))

    def f(x, shortcut):
        y = F.dropout(layer(x), 0.5, False).permute(0, 3, 1, 2)
        return shortcut + y.mul(gamma.reshape(1, -1, 1, 1))

    g = fused(f, torch.randn(2, 5, 4, 8), torch.randn(2, 16, 5, 4))
    assert epilogue(g) == (True, True, True, "none")
    assert [str(n.target) for n in left(g) if "reshape" not in str(n.target)] == ["aten.permute.default"] * 2
    g.check()


def test_a_permutation_at_the_end_stays_a_view():
    layer = linear(8, 16)
    g = fused(lambda x: F.gelu(layer(x)).transpose(1, 2), torch.randn(2, 5, 8))
    assert epilogue(g)[3] == "gelu" and [str(n.target) for n in left(g)] == ["aten.transpose.int"]
    g.check()
    layer = linear(8, 16)
    fused(lambda x: layer(x).transpose(1, 2), torch.randn(2, 5, 8), expect=0)


def test_factors_and_terms_per_channel_compose():
    layer, bn = conv(nn.Conv2d, 16, 8, 3), norm()
    a, b = torch.randn(8, 1, 1), torch.randn(1, 8, 1, 1)
    g = fused(lambda x: torch.sigmoid(bn(layer(x) * a + b) * b), torch.randn(IMAGE))
    assert epilogue(g) == (True, True, False, "sigmoid")
    g.check()


def test_what_comes_after_the_activation_stays():
    layer = linear(32, 32)
    g = fused(lambda x: x + layer(x).relu(), torch.randn(3, 32))
    assert epilogue(g) == (False, True, False, "relu")
    assert len(left(g)) == 1
    g.check()


def test_a_residual_comes_before_no_scale():
    layer, bn = conv(nn.Conv2d, 16, 8, 3, padding=1), norm()
    g = fused(lambda x, r: bn(layer(x) + r), torch.randn(IMAGE), torch.randn(2, 8, 7, 6))
    assert epilogue(g) == (False, True, True, "none") and len(left(g)) == 1
    g.check()


def test_two_branches_of_one_sum():
    a, b, n, m = conv(nn.Conv2d, 16, 8, 1), conv(nn.Conv2d, 16, 8, 1), norm(), norm()

    def f(x):
        y = n(a(x))
        y += m(b(x))
        return y.relu_()

    g = fused(f, torch.randn(IMAGE), expect=2)
    assert epilogue(g, 0) == (True, True, False, "none")  # the other branch, which has to come first
    assert epilogue(g, 1) == (True, True, True, "relu")
    g.check()


class Near:
    """Near misses: the value in between is read, written to or of another kind."""

    @staticmethod
    def read_twice(x, layer):
        y = layer(x)
        return y.relu() + y

    @staticmethod
    def residual_of_itself(x, layer):
        y = layer(x)
        return y + y

    @staticmethod
    def broadcast_residual(x, layer):
        return layer(x) + x[:, :1]

    @staticmethod
    def larger_residual(x, layer):
        return x + layer(x[:1])

    @staticmethod
    def residual_of_another_dtype(x, layer):
        return layer(x) + x.double()

    @staticmethod
    def writes_into_the_residual(x, layer):
        r = x.clone()
        r += layer(x)
        return r.exp() + r

    @staticmethod
    def input_is_written_to_in_between(x, layer):
        x = x.clone()
        y = layer(x)
        x.view(-1).mul_(2)
        return y.relu() * x

    @staticmethod
    def alpha(x, layer):
        return torch.add(layer(x), x, alpha=2)

    @staticmethod
    def training_dropout(x, layer):
        return F.dropout(layer(x), 0.0, True).tanh()

    @staticmethod
    def a_number(x, layer):
        return layer(x) * 2


@pytest.mark.parametrize("name", [n for n in vars(Near) if not n.startswith("_")])
def test_near_misses_stay_as_they_are(name):
    layer = linear(32, 32)
    fused(lambda x: getattr(Near, name)(x, layer), torch.randn(3, 32), expect=0).check(1e-6)


def test_a_write_after_the_last_call_is_no_obstacle():
    layer = linear(32, 32)

    def f(x):
        x = x.clone()
        y = layer(x).relu()
        x.add_(1)
        return x * y

    fused(f, torch.randn(3, 32)).check(1e-6)


def test_norm_in_training_stays():
    layer, bn = conv(nn.Conv2d, 16, 8, 3), norm().train()
    fused(lambda x: bn(layer(x)), torch.randn(IMAGE), expect=0)


def test_norm_along_another_axis_stays():
    layer, bn = linear(32, 8), norm(5, cls=nn.BatchNorm1d)
    fused(lambda x: bn(layer(x)), torch.randn(2, 5, 32), expect=0).check(0)


def test_fp64_stays():
    layer = linear().double()
    fused(lambda x: layer(x).relu(), torch.randn(3, 32).double(), expect=0).check(0)


def test_where_a_gradient_is_needed_nothing_is_fused():
    layer, bn = conv(nn.Conv2d, 16, 8, 3), norm()
    fused(lambda x: bn(layer(x)).relu(), torch.randn(IMAGE), grad=True, expect=0)


def test_autocast_is_not_crossed():
    layer = linear(32, 32)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return y.relu()

    fused(f, torch.randn(3, 32), expect=0).check(1e-2)


def test_a_dynamic_batch_stays_dynamic():
    layer, x = linear(32, 32), torch.randn(6, 32)
    torch._dynamo.mark_dynamic(x, 0)
    g = fused(lambda x: x + layer(x), x)
    assert epilogue(g) == (False, True, True, "none")
    g.check()
