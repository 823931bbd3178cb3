import pytest
import torch
from torch import nn

from fp4fx import NonFiniteWeightError, Policy
from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.fold_weights import fold_weights
from fp4fx.passes.insert_qdq import insert_qdq
from tests.passes.graphs import Captured

ALL = Policy(skip_first=0, skip_last=0)


def test_the_codes_of_a_parameter_become_inputs_and_it_is_read_no_more():
    net = nn.Sequential(nn.Linear(32, 16, bias=False))
    g = Captured(net, torch.randn(3, 32), policy=ALL)
    given = len(g.gm.graph.find_nodes(op="placeholder"))
    assert g.apply(canonicalize, insert_qdq, expose_qdq, fold_weights) == 1
    assert g.count("fp4fx.quantize") == 0
    inputs = g.gm.graph.find_nodes(op="placeholder")
    assert [n.meta["example_value"].dtype for n in inputs[given:]] == [torch.uint8, torch.uint8, torch.float32]
    (folded,) = g.ctx.folded
    (leaf,) = folded.leaves
    assert leaf.tensor is net[0].weight and g.inputs[leaf.position] is net[0].weight
    assert not inputs[leaf.position].users
    codes = folded.compute(net[0].weight)
    quantized = torch.ops.fp4fx.fake_quantize(net[0].weight.detach(), scale_rule="unbiased")
    torch.testing.assert_close(g.gm(*g.inputs, *codes)[0], g.inputs[-1] @ quantized.T)


def test_a_buffer_may_change_and_is_not_folded():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.zeros(3, 32))

        def forward(self, x):
            self.state.copy_(x)
            return torch.ops.fp4fx.fake_quantize.default(self.state).relu()

    g = Captured(Stateful(), torch.randn(3, 32))
    assert g.apply(canonicalize, expose_qdq, fold_weights) == 0
    assert g.count("fp4fx.quantize") == 1


def test_an_activation_is_not_folded():
    net = nn.Sequential(nn.Linear(32, 16))
    policy = Policy(skip_first=0, skip_last=0, activations="nvfp4")
    g = Captured(net, torch.randn(3, 32), policy=policy)
    assert g.apply(canonicalize, insert_qdq, expose_qdq, fold_weights) == 1
    assert g.count("fp4fx.quantize") == 1


def test_a_trainable_weight_is_not_folded():
    net = nn.Sequential(nn.Linear(32, 16))
    g = Captured(net, torch.randn(3, 32), policy=ALL, grad=True)
    assert g.apply(canonicalize, insert_qdq, expose_qdq, fold_weights) == 0
    assert g.count("fp4fx.fake_quantize") == 1


def test_a_weight_with_nan_is_named():
    net = nn.Sequential(nn.Linear(32, 16))
    net[0].weight.data[3, 4] = float("nan")
    g = Captured(net, torch.randn(3, 32), policy=ALL)
    with pytest.raises(NonFiniteWeightError, match=r"0\.weight"):
        g.apply(canonicalize, insert_qdq, expose_qdq, fold_weights)
