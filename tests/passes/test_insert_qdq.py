import torch
from torch import nn

from fp4fx import Policy
from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.insert_qdq import insert_qdq
from tests.passes.graphs import Captured


def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10)
    ).eval()


def test_the_policy_chooses_the_sites():
    model = net()
    g = Captured(model, torch.randn(1, 3, 8, 8), policy=Policy())
    assert g.apply(canonicalize, insert_qdq) == 1  # the first and the last are kept
    (node,) = [n for n in g.gm.graph.nodes if n.target is torch.ops.fp4fx.fake_quantize.default]
    assert node.args[2] == "conv" and node.args[0].meta["example_value"].shape == (16, 16, 3, 3)
    rules = {d.site.parameter.split(".")[-2]: d.rule for _, d in g.ctx.decisions}
    assert rules == {"0": "skip_first", "1": "skip_norms", "3": "weights", "5": "skip_last"}


def test_activations_are_quantized_where_the_policy_says_so():
    model = net()
    policy = Policy(activations="nvfp4", skip_first=0, skip_last=0)
    g = Captured(model, torch.randn(1, 3, 8, 8), policy=policy)
    assert g.apply(canonicalize, insert_qdq) == 3
    assert g.count("fp4fx.fake_quantize") == 6
    calls = [n.args for n in g.gm.graph.nodes if n.target is torch.ops.fp4fx.fake_quantize.default]
    assert sorted(args[2] for args in calls) == ["channels", "channels", "conv", "conv", "rows", "rows"]


def test_scales_of_activations_have_a_rule_of_their_own():
    policy = Policy.w4a4(activation_scale_rule="four_over_six", scale_rule="max", skip_first=0, skip_last=0)
    g = Captured(net(), torch.randn(1, 3, 8, 8), policy=policy)
    g.apply(canonicalize, insert_qdq)
    rules = [n.args[4] for n in g.gm.graph.nodes if n.target is torch.ops.fp4fx.fake_quantize.default]
    assert sorted(rules) == ["four_over_six"] * 3 + ["max"] * 3
    g = Captured(net()[0], torch.randn(3, 8, 8), policy=policy)  # an image without a batch axis
    assert g.apply(canonicalize, insert_qdq) == 1
    rules = [n.args[4] for n in g.gm.graph.nodes if n.target is torch.ops.fp4fx.fake_quantize.default]
    assert sorted(rules) == ["four_over_six", "max"]


def test_without_a_policy_nothing_happens():
    model = net()
    g = Captured(model, torch.randn(1, 3, 8, 8))
    assert g.apply(canonicalize, insert_qdq) == 0
    g.check(0)


def test_a_parameter_used_twice_is_quantized_once():
    layer = nn.Linear(16, 16)
    policy = Policy(skip_first=0, skip_last=0)
    g = Captured(lambda x: layer(layer(x)), torch.randn(2, 16), policy=policy)
    assert g.apply(canonicalize, insert_qdq) == 1
    assert g.count("fp4fx.fake_quantize") == 1
