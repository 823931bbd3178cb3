import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fp4fx.canonical import canonical

aten = torch.ops.aten


def image(*shape):
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape).cos()


x1, x2, x3 = image(2, 4, 9), image(2, 4, 9, 9), image(1, 4, 5, 5, 5)
w1, w2, w3 = image(6, 4, 3), image(6, 4, 3, 3), image(6, 4, 3, 3, 3)
t2 = image(4, 3, 3, 3)
table, ids = image(10, 6), torch.tensor([[1, 2], [9, 0]])
mean, var, scale, shift = image(4), image(4).square() + 1, image(4) + 2, image(4)

CALLS = [
    (F.linear, (image(3, 5), image(2, 5)), {"bias": image(2)}, aten.linear.default),
    (torch._C._nn.linear, (image(3, 5), image(2, 5)), {}, aten.linear.default),
    (F.conv1d, (x1, w1, None, 2, 1), {}, aten.conv1d.default),
    (torch.conv1d, (x1, w1), {"padding": "same"}, aten.conv1d.padding),
    (F.conv2d, (x2, w2), {"bias": image(6), "stride": (2, 1), "padding": [1]}, aten.conv2d.default),
    (torch.conv2d, (x2, w2, image(6), (1,), "valid", 2), {}, aten.conv2d.padding),
    (F.conv2d, (x2, image(4, 1, 3, 3)), {"groups": 4}, aten.conv2d.default),
    (F.conv3d, (x3, w3, None, 1, (0, 1, 2)), {}, aten.conv3d.default),
    (F.conv_transpose1d, (x1, image(4, 2, 3), None, 2), {"output_padding": 1}, aten.conv_transpose1d.default),
    (F.conv_transpose2d, (x2, t2, None, 2, 1, 1, 2, 2), {}, aten.conv_transpose2d.input),
    (F.conv_transpose3d, (x3, image(4, 2, 2, 2, 2)), {"stride": 2}, aten.conv_transpose3d.input),
    (F.embedding, (ids, table), {}, aten.embedding.default),
    (F.embedding, (ids, table, 3, None, 2.0, False, False), {}, aten.embedding.default),
    (F.layer_norm, (x2, (9, 9)), {"weight": image(9, 9), "eps": 0.1}, aten.layer_norm.default),
    (F.group_norm, (x2, 2, scale, shift), {}, aten.group_norm.default),
    (F.rms_norm, (x2, (9,), image(9)), {}, aten.rms_norm.default),
    (F.batch_norm, (x2, mean, var, scale, shift), {"eps": 0.1}, aten.batch_norm.default),
    (F.batch_norm, (x2, None, None), {"training": True}, aten.batch_norm.default),
    (F.instance_norm, (x2,), {"weight": scale, "bias": shift}, aten.instance_norm.default),
    (torch.flatten, (x2, 1), {}, aten.flatten.using_ints),
    (torch.reshape, (x2, (8, -1)), {}, aten.reshape.default),
    (torch.transpose, (x2, 1, 2), {}, aten.transpose.int),
    ("view", (x2, 8, 81), {}, aten.view.default),
    ("reshape", (x2, (-1,)), {}, aten.reshape.default),
    ("permute", (x2, 0, 2, 3, 1), {}, aten.permute.default),
    ("t", (table,), {}, aten.t.default),
]


@pytest.mark.parametrize(("function", "args", "kwargs", "op"), CALLS)
def test_spells_the_same_call(function, args, kwargs, op):
    target, aten_args, aten_kwargs = canonical(function, args, kwargs)
    expected = (
        getattr(args[0], function)(*args[1:], **kwargs) if isinstance(function, str) else function(*args, **kwargs)
    )
    assert target is op
    assert not aten_kwargs
    torch.testing.assert_close(target(*aten_args), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("function", "args", "op"),
    [
        (torch.split, (x1, 2, 1), aten.split.Tensor),
        (torch.split, (x1, [1, 3], 1), aten.split_with_sizes.default),
        ("split", (x1, [1, 3], 1), aten.split_with_sizes.default),
        ("chunk", (x1, 2), aten.chunk.default),
        (torch.unbind, (x1, 2), aten.unbind.int),
    ],
)
def test_spells_the_same_split(function, args, op):
    target, aten_args, _ = canonical(function, args, {})
    expected = getattr(args[0], function)(*args[1:]) if isinstance(function, str) else function(*args)
    assert target is op
    for part, other in zip(target(*aten_args), expected, strict=True):
        assert torch.equal(part, other)


def test_widens_integers_and_fills_defaults():
    _, args, _ = canonical(F.conv2d, (x2, w2), {"padding": 1})
    assert args[2:] == (None, [1, 1], [1, 1], [1, 1], 1)
    _, args, _ = canonical(F.conv3d, (x3, w3, None, 2, "same"), {})
    assert args[3:] == ([2, 2, 2], "same", [1, 1, 1], 1)


def test_takes_nodes():
    graph = fx.Graph()
    x, w, n = graph.placeholder("x"), graph.placeholder("w"), graph.placeholder("n")
    _, args, _ = canonical(F.conv2d, (x, w, None, n), {})
    assert args[:4] == (x, w, None, [n, n])
    _, args, _ = canonical("view", (x, n, -1), {})
    assert args == (x, [n, -1])


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (torch.add, (x1, x1), {}),
        (operator.getitem, (x1, 0), {}),
        ("relu", (x1,), {}),
        (F.embedding, (ids, table), {"max_norm": 1.0}),  # writes to the table
        (F.embedding, (ids, table, -2), {}),  # counts from the table's end
        (F.linear, (x1,), {}),  # a weight is missing
        (F.linear, (x1, table), {"out": None}),
        ("view", (x1, torch.int32), {}),  # reinterprets bytes
        ("view", (x1, fx.Graph().placeholder("shape")), {}),  # one size, or a whole shape
        ("contiguous", (x2, torch.channels_last), {}),
        ("transpose", (x1, "N", "C"), {}),
    ],
)
def test_leaves_alone(function, args, kwargs):
    assert canonical(function, args, kwargs) is None
