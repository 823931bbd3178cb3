import torch
import torch.nn.functional as F
from torch import nn

from fp4fx.passes.canonicalize import canonicalize
from tests.passes.graphs import Captured


def test_functions_methods_and_modules_get_one_spelling():
    conv, lin = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Linear(4, 5)
    w = torch.randn(5, 4)

    def f(x):
        x = conv(x).mean((2, 3))
        return lin(x) + F.linear(x, w)

    g = Captured(f, torch.randn(2, 3, 8, 8))
    assert g.apply(canonicalize) >= 3
    assert (g.count("aten.conv2d"), g.count("aten.linear")) == (1, 2)
    node = next(n for n in g.gm.graph.nodes if n.target is torch.ops.aten.conv2d.default)
    assert list(node.args[3:]) == [[2, 2], [1, 1], [1, 1], 1]
    g.check(0)


def test_embedding_swaps_its_arguments():
    e = nn.Embedding(9, 4, padding_idx=2)
    g = Captured(e, torch.tensor([1, 2, 8]))
    g.apply(canonicalize)
    node = next(n for n in g.gm.graph.nodes if n.target is torch.ops.aten.embedding.default)
    assert node.args[0].meta["example_value"].shape == (9, 4) and node.args[2] == 2
    g.check(0)


def test_what_has_no_equal_is_left_alone():
    """max_norm rewrites the table in place, which aten.embedding does not."""
    w = torch.randn(9, 4)
    g = Captured(lambda i: F.embedding(i, w, max_norm=1.0), torch.tensor([1, 2]))
    g.apply(canonicalize)
    assert g.count("aten.embedding") == 0
    g.check(0)


def test_a_call_of_aten_gets_the_arguments_that_it_left_out():
    w, k = torch.randn(8, 4), torch.randn(8, 4, 3, 3)
    for call, x, given in (
        (lambda x: torch.ops.aten.linear.default(x, w), torch.randn(2, 4), [None]),
        (
            lambda x: torch.ops.aten.conv2d.default(x, k, padding=[1, 1]),
            torch.randn(1, 4, 5, 5),
            [None, [1, 1], [1, 1], [1, 1], 1],
        ),
    ):
        g = Captured(call, x)
        g.apply(canonicalize)
        (node,) = (n for n in g.gm.graph.nodes if n.op == "call_function")
        assert list(node.args[2:]) == given and not node.kwargs
        g.check(0)
