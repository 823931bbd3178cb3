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


def test_a_parameter_is_quantized_once_and_read_no_more():
    net = nn.Sequential(nn.Linear(32, 16, bias=False))
    g = Captured(net, torch.randn(3, 32), policy=ALL)
    before = g.gm(*g.inputs)[0]
    assert g.apply(canonicalize, insert_qdq, expose_qdq, fold_weights) == 1
    assert g.count("fp4fx.quantize") == 0
    assert [b.dtype for b in g.gm.buffers()] == [torch.uint8, torch.uint8, torch.float32]
    weight = next(n for n, t in g.ctx.real.items() if isinstance(t, nn.Parameter) and n.op == "placeholder")
    assert not weight.users
    quantized = torch.ops.fp4fx.fake_quantize(net[0].weight.detach())
    torch.testing.assert_close(g.gm(*g.inputs)[0], g.inputs[-1] @ quantized.T)
    assert not torch.equal(before, g.gm(*g.inputs)[0])


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
