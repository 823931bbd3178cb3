import importlib
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp4fx
from fp4fx.capture import value
from fp4fx.kernels import cpu, reference
from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.channels_last import channels_last
from fp4fx.passes.fuse_conv import fuse_conv
from fp4fx.passes.fuse_epilogue import fuse_epilogue
from fp4fx.passes.fuse_linear import fuse_linear
from fp4fx.passes.narrow import narrow
from fp4fx.passes.restride import restride
from fp4fx.target import Target
from tests.passes.graphs import Captured, assert_true_strides, conv, linear

IMAGE = torch.randn(2, 16, 6, 5)
ROWS = torch.randn(4, 32)
BF16 = torch.bfloat16
MODULE = importlib.import_module("fp4fx.passes.narrow")  # behind the function of that name


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    """A processor with products of bf16, and kernels that use them."""
    monkeypatch.setattr(MODULE, "target_of", lambda _: Target("cpu", "a processor", frozenset({"amx_bf16"})))
    monkeypatch.setattr(MODULE, "choose", lambda node, ctx: (cpu.KERNEL, ()))
    monkeypatch.setattr(MODULE, "_FEW", 0)


def narrowed(function, *inputs, expect, tolerance=2e-2, **kwargs):
    """The graph after the pass, whose values and strides are checked."""
    g = Captured(function, *inputs, **kwargs)
    g.apply(canonicalize, fuse_linear, fuse_conv, fuse_epilogue, channels_last)
    assert g.apply(narrow) == expect
    g.apply(restride)
    g.check(tolerance)
    if not kwargs.get("grad"):
        assert_true_strides(g)
    return g


def dtypes(g):
    """Of x, residual and result of every fused op: b for bf16, f for fp32, - for none."""
    letters = {BF16: "b", torch.float32: "f"}
    ops = [n for n in g.gm.graph.nodes if str(n.target).startswith(("fp4fx.conv", "fp4fx.linear"))]
    return ["".join("-" if n is None else letters[value(n).dtype] for n in (o.args[0], o.args[-3], o)) for o in ops]


def casts(g):
    return g.count("aten.to")


def square():
    return linear(32, 32)


def block(**kwargs):
    return conv(nn.Conv2d, 16, 16, 3, padding=1, **kwargs)


def test_what_only_other_layers_read_is_stored_in_bf16():
    a, b, c = square(), square(), square()
    g = narrowed(lambda x: c(F.dropout(F.gelu(b(a(x).relu())), 0.5, False)), ROWS, expect=2)
    assert dtypes(g) == ["f-b", "b-b", "b-f"] and casts(g) == 0


def test_it_is_what_the_ops_give_with_that_dtype():
    a, b = square(), square()
    g = narrowed(lambda x: b(a(x)), ROWS, expect=1)
    parts = [[getattr(m, f"weight_{part}") for part in ("packed", "scale", "global_scale")] for m in (a, b)]
    between = torch.ops.fp4fx.linear(ROWS, *parts[0], a.bias, 32, dtype=BF16)
    expected = torch.ops.fp4fx.linear(between, *parts[1], b.bias, 32, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(g.gm(*g.inputs)[0], expected)


def test_residuals_have_the_dtype_of_what_they_are_added_to():
    layers = [block() for _ in range(4)]

    def f(x):
        y = layers[0](x).relu()
        y = (layers[2](layers[1](y).relu()) + y).relu()
        return layers[3](y)

    g = narrowed(f, IMAGE, expect=3)
    assert dtypes(g) == ["f-b", "b-b", "bbb", "b-f"] and casts(g) == 0


def test_a_residual_of_what_stays_in_fp32_stays_with_it():
    a, b = block(), block()
    g = narrowed(lambda x: b((y := a(x)).relu()) + y, IMAGE, expect=0)
    assert dtypes(g)[-1] == "bff"  # the activation is a loop of Inductor's, which may as well store bf16
    g = narrowed(lambda x: a(b(x) + x), IMAGE, expect=0)  # x is a residual that is fp32 in memory
    assert g.ctx.between[next(n for n in g.ctx.between if n.args[-3] is not None)] == "its residual is in fp32"


def test_loops_read_bf16_compute_in_fp32_and_end_in_it():
    gate, up, down = square(), square(), square()
    g = narrowed(lambda x: down(F.silu(gate(x)) * up(x).tanh()), ROWS, expect=2)
    assert dtypes(g) == ["f-b", "f-b", "b-f"] and casts(g) == 3
    (product,) = [n for n in g.gm.graph.nodes if n.target in (operator.mul, torch.mul)]
    assert value(product).dtype == torch.float32


def test_a_norm_in_front_of_layers_ends_in_bf16_once():
    norm, a, b, out = nn.LayerNorm(32), square(), square(), square()
    g = narrowed(lambda x: out(a(y := norm(x)) * b(y)), ROWS, expect=2)
    assert dtypes(g) == ["b-b", "b-b", "b-f"] and casts(g) == 4


def test_views_between_layers_have_the_dtype_of_what_they_view():
    a, b = conv(nn.Conv2d, 16, 16, 1), linear(16, 16)
    g = narrowed(lambda x: b(a(x).permute(0, 2, 3, 1).flatten(1, 2).chunk(2, 1)[1]), IMAGE, expect=1)
    assert dtypes(g) == ["f-b", "b-f"] and casts(g) == 0


def test_pooling_and_concatenation():
    a, b, c = block(), block(), conv(nn.Conv2d, 32, 8, 1)
    up = conv(nn.ConvTranspose2d, 16, 16, 2, 2)

    def unet(x):
        skip = a(x)
        return c(torch.cat([skip, up(b(F.max_pool2d(skip, 2)))], 1))

    g = narrowed(unet, torch.randn(1, 16, 8, 8), expect=3)
    assert dtypes(g) == ["f-b", "b-b", "b-b", "b-f"]


def test_strides_that_a_cast_changes_are_followed():
    a, b = block(), linear(32, 16)
    image = torch.randn(2, 6, 5, 40).permute(0, 3, 1, 2)
    g = narrowed(lambda x: b(a(x.exp()[:, 3:19]).flatten(1)[:, :32]), image, expect=1)
    assert dtypes(g) == ["b-b", "b-f"]


def test_the_stream_of_a_transformer_stays_in_fp32():
    """x + f(norm(x)), x the sum of all layers before: f alone works in bf16."""
    layers = [(nn.LayerNorm(32), square(), square()) for _ in range(3)]

    def f(x):
        for norm, up, down in layers:
            x = down(F.gelu(up(norm(x)))) + x
        return x * 2

    g = narrowed(f, ROWS, expect=3)
    assert dtypes(g) == ["b-b", "bff"] * 3


class Near:
    """Near misses: what is in between is read by something that takes fp32."""

    @staticmethod
    def a_result_of_the_graph(x, a, b):
        y = a(x)
        return b(y), y

    @staticmethod
    def a_view_that_is_a_result(x, a, b):
        y = a(x)
        return b(y), y.mT

    @staticmethod
    def read_by_matmul(x, a, b):
        y = a(x)
        return b(y), y @ y.mT

    @staticmethod
    def written_to_in_place(x, a, b):
        y = a(x)
        z = b(y)
        y.sin_()
        return z

    @staticmethod
    def a_copy_written_to_in_place(x, a, b):
        y = a(x).mT.reshape(-1)
        y += 1
        return b(y.view(4, 32))

    @staticmethod
    def read_as_bits(x, a, b):
        y = a(x)
        return b(y), y.view(torch.int32)


@pytest.mark.parametrize("name", [name for name in vars(Near) if not name.startswith("_")])
def test_near_misses(name):
    a, b = square(), square()
    g = narrowed(lambda x: getattr(Near, name)(x, a, b), ROWS, expect=0)
    first = next(iter(g.ctx.between.values()))
    assert first and not first.startswith("the")


def test_a_loop_whose_result_is_written_to_later_is_not_cast_before():
    a = square()

    def f(x):
        y = x + 1
        a(y)
        z = y.mul_(3)
        return a(z), a(y)

    narrowed(f, ROWS, expect=0)

    def added(x):
        y = x + 1
        z = b(a(x) + y)
        y.mul_(3)
        return z + y

    b = square()
    assert dtypes(narrowed(added, ROWS, expect=1)) == ["fff", "f-b"]


@pytest.mark.parametrize("compute", ["fp32", "bf16_operands"])
def test_the_policy_can_say_no(compute):
    layers = fp4fx.quantize(
        nn.Sequential(*[nn.Linear(32, 32) for _ in range(3)]),
        fp4fx.Policy(skip_first=0, skip_last=0, overrides={"1": {"compute": compute}}),
    )
    g = narrowed(layers, ROWS, expect=0)
    assert list(g.ctx.between.values())[1] == f"compute={compute!r}"


def test_what_is_small_stays(monkeypatch):
    a, b = square(), square()
    monkeypatch.setattr(MODULE, "_FEW", ROWS.numel())
    g = narrowed(lambda x: b(a(x + 1)), ROWS, expect=0)
    assert dtypes(g) == ["f-f", "f-f"] and set(g.ctx.between.values()) == {"small"}
    assert dtypes(narrowed(lambda x: b(a(x + 1)), torch.randn(5, 32), expect=1)) == ["b-b", "b-f"]


def test_int8_layers_take_part():
    layers = fp4fx.quantize(
        nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), fp4fx.Policy(skip_first=0, skip_last=0, compute="int8")
    )
    assert dtypes(narrowed(layers, ROWS, expect=1)) == ["f-b", "b-f"]


def test_other_processors_and_kernels_say_no(monkeypatch):
    a, b = square(), square()
    monkeypatch.setattr(MODULE, "choose", lambda node, ctx: (reference.KERNEL, ()))
    g = narrowed(lambda x: b(a(x)), ROWS, expect=0, tolerance=0)
    assert set(g.ctx.between.values()) == {"the kernel is reference"}
    monkeypatch.setattr(MODULE, "target_of", lambda _: Target("cpu", "old", frozenset({"avx2"})))
    g = narrowed(lambda x: b(a(x)), ROWS, expect=0, tolerance=0)
    assert set(g.ctx.between.values()) == {"the processor has no products of bf16"}


def test_models_of_other_dtypes_and_quantized_activations_are_left_alone():
    a, b = square().bfloat16(), square().bfloat16()
    assert narrowed(lambda x: b(a(x)), ROWS.bfloat16(), expect=0).ctx.between == {}


def test_a_dynamic_batch_stays_dynamic():
    a, b, x = square(), square(), torch.randn(6, 32)
    torch._dynamo.mark_dynamic(x, 0)
    assert dtypes(narrowed(lambda x: b(a(x).relu().view(-1, 2, 32)), x, expect=1)) == ["f-b", "b-f"]


def test_under_autocast_it_keeps_out_of_the_way():
    a, b, c = square(), square(), square()

    def f(x):
        y = a(x)
        with torch.autocast("cpu", BF16):
            y = b(y)
        return c(y.float())

    narrowed(f, ROWS, expect=0, tolerance=3e-2)
