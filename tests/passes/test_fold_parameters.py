"""What depends on parameters alone is computed once, and anew when one of them changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp4fx import capture, folding
from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.fold_parameters import fold_parameters
from fp4fx.passes.fuse_conv import fuse_conv
from fp4fx.passes.fuse_epilogue import fuse_epilogue
from tests.passes.graphs import Captured, conv

X = torch.randn(2, 16, 7, 6)
FUSION = (canonicalize, expose_qdq, fuse_conv, fuse_epilogue)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Block(nn.Module):
    """A packed convolution and one that stays dense, each with a norm whose every number matters."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.dense = conv(nn.Conv2d, 16, 16, 3), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm1, self.norm2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        for norm in (self.norm1, self.norm2):
            for tensor in (norm.running_mean, norm.running_var, *norm.parameters()):
                tensor.data.uniform_(0.5, 2)

    def forward(self, x):
        return F.hardswish(self.norm2(self.dense(F.relu(self.norm1(self.conv(x))))))


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def captured(function, *inputs, expect, **kwargs):
    g = Captured(function, *inputs, **kwargs)
    assert g.apply(*FUSION, fold_parameters) == expect
    g.inputs += [part for folded in g.ctx.folded for part in folded.parts]
    return g


def arithmetic(g):
    return [n for n in g.gm.graph.nodes if n.op == "call_function" and capture.value(n).dim() == 1]


def test_scale_and_bias_of_a_norm_become_inputs():
    block = Block().eval()
    g = captured(lambda x: F.relu(block.norm1(block.conv(x))), X, expect=2)
    assert not arithmetic(g) and len(g.ctx.folded) == 1
    tensors = {id(leaf.tensor) for leaf in g.ctx.folded[0].leaves}
    norm = block.norm1
    assert tensors == {id(t) for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var, block.conv.bias)}
    assert all(g.inputs[leaf.position] is leaf.tensor for leaf in g.ctx.folded[0].leaves)
    g.check()


def test_what_needs_a_gradient_stays():
    block = Block().eval()
    norm = block.norm1
    calls = lambda x: block.conv(x) * torch.ops.aten.rsqrt(norm.weight).view(-1, 1, 1)  # noqa: E731
    assert captured(calls, X, expect=0, grad=True).ctx.folded == []

    def inside(x):
        with torch.enable_grad():
            return torch.ops.aten.mul.Tensor(torch.ops.aten.neg.default(norm.weight), x[0, 0, 0, 0])

    g = captured(inside, X, expect=0)
    assert g.ctx.folded == []


def test_what_the_graph_writes_to_stays():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.ones(16))

        def forward(self, x):
            self.state.add_(1)
            return x[0, 0, 0, 0] * torch.ops.aten.neg.default(self.state)

    assert captured(Counting(), X, expect=0).ctx.folded == []


def test_statistics_that_a_norm_in_training_writes_to_stay():
    norm = nn.BatchNorm2d(16)

    def f(x):
        return norm(x) * torch.ops.aten.neg.default(norm.running_mean).view(1, -1, 1, 1)

    assert captured(f, X, expect=0).ctx.folded == []


def test_freezing_leaves_it_to_inductor():
    block = Block().eval()
    g = Captured(lambda x: block.norm1(block.conv(x)), X, freezing=True)
    assert g.apply(*FUSION, fold_parameters) == 0


def test_large_results_stay():
    table = nn.Parameter(torch.randn(1 << 9, 1 << 10))
    captured(lambda x: x[0, 0, 0, 0] * torch.ops.aten.neg.default(table), X, expect=0)


CHANGES = {
    "a running mean": lambda m: m.norm1.running_mean.add_(1),
    "a running variance": lambda m: m.norm2.running_var.mul_(3),
    "a scale": lambda m: m.norm2.weight.neg_(),
    "a dense weight": lambda m: m.dense.weight.mul_(-2),
    "a bias": lambda m: m.conv.bias.add_(1),
    "the data of a shift": lambda m: setattr(m.norm1.bias, "data", torch.randn(16)),
    "a replaced parameter": lambda m: setattr(m.norm2, "weight", nn.Parameter(torch.randn(16))),
    "a replaced buffer": lambda m: setattr(m.norm1, "running_var", torch.rand(16) + 0.5),
    "a state dict": lambda m: m.load_state_dict(Block(1).state_dict()),
    "an assigned state dict": lambda m: m.load_state_dict(Block(1).state_dict(), assign=True),
    "a step in training": lambda m: (m.train()(X), m.eval()),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_change_takes_effect(change):
    model = Block().eval()
    compiled = torch.compile(model, backend="fp4fx", fullgraph=True)
    with torch.no_grad():
        before = compiled(X)
        CHANGES[change](model)
        expected = model(X)
        assert (expected - before).norm() > 0.05 * before.norm()
        close(compiled(X), expected, 2e-2)
        close(compiled(X), expected, 2e-2)


def test_two_models_through_one_artifact():
    models, x = [Block(seed).eval() for seed in range(2)], X
    artifacts = []

    def backend(gm, inputs):
        artifacts.append(gm)
        return torch._dynamo.lookup_backend("fp4fx")(gm, inputs)

    def call(model, x):
        return model(x)

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            for model in models:
                close(compiled(model, x), model(x), 2e-2)
        models[0].norm1.weight.mul_(2)
        for model in models:
            close(compiled(model, x), model(x), 2e-2)
    assert len(artifacts) == 1


@pytest.mark.parametrize("training", [True, False])
def test_training_and_gradients_are_as_in_eager(training):
    model = Block().train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fp4fx", fullgraph=True)
    for _ in range(2):
        found, expected = compiled(X), twin(X)
        close(found, expected, 1e-4)
        found.sum().backward()
        expected.sum().backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        close(mine, theirs, 1e-4)


def test_no_grad_then_grad_then_no_grad():
    model = Block().eval()
    compiled = torch.compile(model, backend="fp4fx", fullgraph=True)
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            found = compiled(X)
            close(found, model(X), 2e-2)
            assert found.requires_grad == grad
            if grad:
                found.sum().backward()
                assert model.norm1.weight.grad is not None and model.dense.weight.grad is not None


def test_parts_are_computed_once_for_every_state(monkeypatch):
    calls = []
    compute = folding.computed
    monkeypatch.setattr(folding, "computed", lambda *a: (calls.append(1), compute(*a))[1])
    model = Block().eval()
    compiled = torch.compile(model, backend="fp4fx", fullgraph=True)
    with torch.no_grad():
        compiled(X)
        at_first = len(calls)
        compiled(X)
        assert len(calls) == at_first
        model.norm1.weight.mul_(2)
        compiled(X)
        changed = len(calls)
        compiled(X)
        assert changed > at_first and len(calls) == changed


def test_an_inference_tensor_does_not_tell_and_is_read_on_every_call():
    with torch.inference_mode():
        model = Block().eval()
        compiled = torch.compile(model, backend="fp4fx", fullgraph=True)
        compiled(X)
        model.norm1.weight.mul_(-2)
        close(compiled(X), model(X), 2e-2)


def test_parts_live_as_long_as_their_leaves():
    leaf = folding.Leaf(0, nn.Parameter(torch.randn(3)))
    memory = folding._Memory(lambda t: (t + 1,), [leaf])
    tensor = nn.Parameter(torch.randn(3))
    assert torch.equal(memory.parts([tensor])[0], tensor + 1)
    assert len(memory._seen) == 1
    del tensor
    assert not memory._seen
