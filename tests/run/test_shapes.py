"""One artifact for many shapes, and no more compiles than shapes and modes ask for."""

import pytest
import torch
from torch import nn

import fp4fx
from fp4fx.backend import fp4fx as backend
from tests.models import Attention, ConvNet, UNet

ALL = fp4fx.Policy(skip_first=0, skip_last=0, compute="fp32")
W4A4 = fp4fx.Policy.w4a4(skip_first=0, skip_last=0, compute="fp32")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Counting:
    """The backend, and the number of graphs it was given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, gm, inputs, **kwargs):
        self.graphs += 1
        return backend(gm, inputs, **kwargs)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


SIZES = {
    "batch and image": (UNet, [(2, 3, 16, 16), (3, 3, 32, 24), (5, 3, 8, 40)], [0, 2, 3]),
    "batch and sequence": (Attention, [(2, 5, 8), (3, 9, 8), (7, 6, 8)], [0, 1]),
}


@pytest.mark.parametrize("policy", [ALL, W4A4], ids=["w4a16", "w4a4"])
@pytest.mark.parametrize("name", list(SIZES))
def test_marked_sizes_share_one_graph(name, policy):
    make, shapes, dynamic = SIZES[name]
    q, counting = fp4fx.quantize(make().eval(), policy), Counting()
    compiled = torch.compile(q, backend=counting, fullgraph=True)
    with torch.no_grad():
        for shape in shapes:
            x = torch.randn(shape)
            for dim in dynamic:
                torch._dynamo.mark_dynamic(x, dim)
            close(compiled(x), q(x))
    assert counting.graphs == 1


def mlp():
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval()


def test_without_a_mark_the_second_shape_makes_it_dynamic():
    q, counting = fp4fx.quantize(mlp(), ALL), Counting()
    compiled = torch.compile(q, backend=counting)
    with torch.no_grad():
        for batch in (2, 3, 4, 5, 6):
            x = torch.randn(batch, 32)
            close(compiled(x), q(x))
    assert counting.graphs == 2


def test_each_mode_is_compiled_once():
    q, counting = fp4fx.quantize(mlp(), ALL), Counting()
    compiled, x = torch.compile(q, backend=counting), torch.randn(2, 32)
    for _ in range(3):
        with torch.no_grad():
            compiled(x)
        with torch.inference_mode():
            compiled(x)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            compiled(x)
        compiled(x).sum().backward()
    assert counting.graphs == 4


def test_new_values_do_not_compile_anew():
    q, counting = fp4fx.quantize(mlp(), ALL), Counting()
    compiled, x = torch.compile(q, backend=counting), torch.randn(2, 32)
    with torch.no_grad():
        compiled(x)
        q.load_state_dict(fp4fx.quantize(mlp(), ALL).state_dict())
        close(compiled(x), q(x))
        q[2].weight = torch.randn(16, 48)
        close(compiled(x), q(x))
    assert counting.graphs == 1


def test_layers_of_one_kind_share_a_graph_when_compiled_one_by_one():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    q, counting = fp4fx.quantize(nn.Sequential(*(Block() for _ in range(4))).eval(), ALL), Counting()
    x = torch.randn(3, 32)
    with torch.no_grad():
        expected = q(x)
        for block in q:
            block.compile(backend=counting)
        close(q(x), expected)
    assert counting.graphs == 1


def test_a_block_is_compiled_by_name_inside_a_model_that_is_not():
    q, x = fp4fx.quantize(ConvNet().eval(), ALL), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = q(x)
        q.body.compile(backend="fp4fx")
        close(q(x), expected)
    rows = {row.parameter: row.kernels for row in fp4fx.report(q).rows}
    assert rows["body.weight"] and not rows["head.weight"]


def test_several_models_in_one_process():
    policies = (ALL, W4A4, ALL)  # two of one structure, with other weights
    models = [fp4fx.quantize(ConvNet().eval(), policy) for policy in policies]
    compiled = [torch.compile(q, backend="fp4fx", fullgraph=True) for q in models]
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for _ in range(2):
            for q, c in zip(models, compiled, strict=True):
                close(c(x), q(x))
