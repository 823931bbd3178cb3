import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.channels_last import channels_last
from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.fuse_conv import fuse_conv
from fp4fx.passes.fuse_epilogue import fuse_epilogue
from fp4fx.passes.fuse_linear import fuse_linear
from fp4fx.passes.restride import restride
from tests.passes.graphs import Captured, assert_true_strides, conv, copies, linear

SHAPE = (2, 16, 6, 4)


@torch.library.custom_op("fp4fx_test::flat", mutates_args=())
def flat(x: torch.Tensor) -> torch.Tensor:
    """The values in the order of memory, which depends on strides as only a custom op can."""
    return x.as_strided((x.numel(),), (1,)).clone()


@flat.register_fake
def _(x):
    return x.new_empty(x.numel())


def restrided(function, *inputs, tolerance=1e-5):
    """The graph after all passes that concern strides, checked: values, strides of every node, strides of results."""
    g = Captured(function, *inputs)
    g.apply(canonicalize, expose_qdq, fuse_linear, fuse_conv, fuse_epilogue, channels_last, restride)
    g.check(tolerance)
    assert_true_strides(g)
    return g


def block():
    return conv(nn.Conv2d, 16, 16, 3, padding=1)


def test_a_view_becomes_a_reshape_and_the_results_have_the_strides_of_the_capture():
    layer = block()
    g = restrided(lambda x: (layer(x).view(2, -1), layer(x).exp()), torch.randn(SHAPE))
    assert g.count("aten.view") == 0 and g.count("aten.reshape") == 1


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y.view(y.shape[0], -1),
        lambda y: y.view_as(torch.empty(2, 64, 6)),
        lambda y: torch.ops.aten._unsafe_view(y, [2, 384]),
        lambda y: y.flatten(1),
        lambda y: y.reshape(-1),
        lambda y: y.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2),
        lambda y: F.pixel_shuffle(y, 2),
        lambda y: y.permute(0, 2, 3, 1).contiguous().view(-1, 16),
        lambda y: y.chunk(2, 1)[1].contiguous().view(-1),
        lambda y: y.unsqueeze(0).squeeze(0).mT,
    ],
)
def test_every_view(view):
    layer = block()
    restrided(lambda x: view(layer(x).cos()).sin(), torch.randn(SHAPE))


def test_a_request_for_what_was_there_goes_away():
    layer = block()
    g = restrided(lambda x: layer(layer(x).contiguous()).mean((2, 3)), torch.randn(SHAPE))
    assert len(copies(g)) == 1  # of the input


def test_a_convnext_block_has_no_copies():
    """Depthwise convolution, rows for norm and linears, an image again, layer scale and residual."""
    stem, depthwise, norm = block(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.LayerNorm(16)
    up, down, gamma = linear(16, 64), linear(64, 16), nn.Parameter(torch.randn(16))

    def f(x):
        x = stem(x)
        for _ in range(2):
            y = down(F.gelu(up(norm(depthwise(x).permute(0, 2, 3, 1)))))
            x = x + y.permute(0, 3, 1, 2) * gamma.reshape(1, -1, 1, 1)
        return stem(x).mean((2, 3))

    assert len(copies(restrided(f, torch.randn(SHAPE)))) == 1


@pytest.mark.parametrize("view", [lambda y: y.view(-1), lambda y: y.flatten(1), lambda y: y.contiguous()])
def test_a_view_of_what_is_written_to_later_stays_a_view(view):
    layer = block()

    def f(x):
        y = layer(x)
        v = view(y)
        y.mul_(2)
        v.add_(1)
        return v * 2, y * 3

    restrided(f, torch.randn(SHAPE))


def test_a_write_before_the_view_is_no_obstacle():
    layer, other = block(), nn.Conv2d(16, 16, 1)
    g = restrided(lambda x: F.relu(other(layer(x)), inplace=True).flatten(1).sum(1), torch.randn(SHAPE))
    assert len(copies(g)) == 2  # of the input, and by flatten


def test_as_strided_and_custom_ops_read_what_was_captured():
    layer = block()
    restrided(lambda x: layer(x).as_strided((5,), (3,)) * 2, torch.randn(SHAPE))
    restrided(lambda x: flat(layer(x)), torch.randn(SHAPE))
    restrided(lambda x: layer(x).view(torch.int32) + 1, torch.randn(SHAPE))


def test_other_strides_than_the_two_formats_are_restored_too():
    layer = linear(16, 8)

    def f(x, shortcut):
        return shortcut + layer(x).transpose(1, 2)

    x, shortcut = torch.randn(2, 5, 16), torch.randn(2, 8, 5)
    restrided(f, x, shortcut)
    restrided(lambda x, s: f(x, s).transpose(0, 1), x, shortcut)
    restrided(f, x, torch.randn(8, 2, 5).transpose(0, 1))


def test_under_autocast_dtypes_stay():
    layer, other = block(), nn.Conv2d(16, 16, 1)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = other(layer(x)).view(2, -1)
        return y.float() * 2

    g = restrided(f, torch.randn(SHAPE), tolerance=5e-2)
    assert not torch.is_autocast_enabled("cpu")
    assert any(
        n.meta["example_value"].dtype == torch.bfloat16
        for n in g.gm.graph.nodes
        if n.op == "call_function" and isinstance(n.meta.get("example_value"), torch.Tensor)
    )


def test_a_gradient_is_still_seen_where_strides_have_changed():
    layer, other = block(), nn.Conv2d(16, 16, 1)

    def f(x, z):
        with torch.no_grad():
            y = layer(x)
        return (other(y) * z).view(2, -1)

    g = Captured(f, torch.randn(SHAPE), torch.randn(SHAPE, requires_grad=True), grad=True)
    g.apply(canonicalize, fuse_conv, channels_last, restride)
    result = g.gm.graph.output_node().args[0][0]
    assert result.meta["example_value"].requires_grad
    g.check()


def test_a_dynamic_batch_stays_dynamic():
    layer, x = block(), torch.randn(6, 16, 6, 4)
    torch._dynamo.mark_dynamic(x, 0)
    g = restrided(lambda x: layer(layer(x).cos()).view(x.shape[0], -1), x)
    assert isinstance(
        next(iter(g.gm.graph.find_nodes(op="output"))).args[0][0].meta["example_value"].shape[0], torch.SymInt
    )
