import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fp4fx import nvfp4
from fp4fx.errors import NonFiniteWeightError, PlanError, PolicyError
from fp4fx.plan import Plan, decide, plan, weight_sqnr
from fp4fx.policy import Policy
from fp4fx.site import Note, Site
from fp4fx.trace import Trace

ORDERS = {"linear": "rows", "embedding": "rows", "norm": "rows", "conv2d": "conv", "conv_transpose2d": "conv_transpose"}


def site(parameter, op, shape, **changes):
    fields = {
        "order": ORDERS[op],
        "numel": math.prod(shape),
        "kurtosis": 0.0,
        "own_input": op not in ("norm", "embedding"),
    }
    return Site(parameter=f"{parameter}.weight", op=op, shape=shape, **{"called_in": parameter, **fields, **changes})


def trace_of(*sites, **notes):
    return Trace(
        sites=tuple(replace(s, index=i) for i, s in enumerate(sites)), **{"unreached": (), "opaque": (), **notes}
    )


def net(**notes):
    """A small net with one site of each kind."""
    return trace_of(
        site("embed", "embedding", (100, 32)),
        site("stem", "conv2d", (8, 3, 3, 3)),
        site("bn", "norm", (8,)),
        site("conv", "conv2d", (32, 16, 3, 3), kurtosis=5.0),
        site("dw", "conv2d", (32, 1, 3, 3), groups=32),
        site("up", "conv_transpose2d", (32, 8, 2, 2), groups=2),
        site("mid", "linear", (24, 40)),
        site("head", "linear", (10, 24)),
        **notes,
    )


def rules(found):
    return {d.site.module: d.rule if d.spec is None else "quantized" for d in found.decisions}


def test_the_default_policy_on_one_site_of_each_kind():
    found = decide(net())
    assert rules(found) == {
        "embed": "embeddings",
        "stem": "skip_first",
        "bn": "skip_norms",
        "conv": "quantized",
        "dw": "depthwise",
        "up": "quantized",
        "mid": "quantized",
        "head": "skip_last",
    }
    assert found.decision_for("stem.weight").reason == "first of 6"  # the embedding and the norm are not counted
    assert found.decision_for("head.weight").reason == "last of 6"
    assert [d.site.module for d in found.quantized] == ["conv", "up", "mid"]
    assert len(found.kept) + len(found.quantized) == len(found.decisions) == 8
    assert all(d.reason for d in found.decisions)


@pytest.mark.parametrize(
    ("fields", "module", "rule", "reason"),
    [
        ({"skip_first": 0}, "stem", "quantized", "no rule keeps it"),
        ({"skip_last": 0}, "head", "quantized", "no rule keeps it"),
        ({"skip_first": 2}, "conv", "skip_first", "2 of 6, skip_first=2"),
        ({"skip_first": 2}, "dw", "depthwise", ""),
        ({"skip_last": 3}, "up", "skip_last", "4 of 6, skip_last=3"),
        ({"skip_last": 3}, "conv", "quantized", ""),
        ({"skip_norms": False}, "bn", "quantized", ""),
        ({"embeddings": True}, "embed", "quantized", ""),
        ({"depthwise": True}, "dw", "quantized", ""),
        ({"weights": None}, "mid", "weights", "weights=None"),
        ({"exclude": "mid"}, "mid", "exclude", "matches 'mid'"),
        ({"keep": {"mid": "costs 9 dB"}}, "mid", "keep", "costs 9 dB"),
        ({"keep": {"conv": "costs 9 dB"}}, "mid", "quantized", ""),
        ({"include": "conv"}, "mid", "include", "matches no pattern of include"),
        ({"include": "*"}, "embed", "embeddings", ""),
        ({"min_numel": 961}, "mid", "min_numel", "960 values < 961"),
        ({"min_numel": 960}, "mid", "quantized", ""),
        ({"min_channels": 17}, "conv", "min_channels", "16 input channels per group < 17"),
        ({"min_channels": 16}, "conv", "quantized", ""),
        ({"min_channels": 16}, "up", "quantized", ""),
        ({"min_channels": 17}, "up", "min_channels", "16 input channels per group < 17"),
        ({"max_kurtosis": 4.9}, "conv", "max_kurtosis", "kurtosis 5.00 > 4.9"),
        ({"max_kurtosis": 5.0}, "conv", "quantized", ""),
        ({"overrides": {"op:embedding": {"embeddings": True}}}, "embed", "quantized", "override 'op:embedding'"),
        ({"overrides": {"mid": {"weights": None}}}, "mid", "weights", "weights=None (override 'mid')"),
    ],
)
def test_each_rule_and_its_near_miss(fields, module, rule, reason):
    found = decide(net(), Policy(**fields))
    assert rules(found)[module] == rule
    assert reason in found.decision_for(f"{module}.weight").reason


def test_the_segmentation_preset_takes_convolutions_but_the_last():
    sites = [s for s in net().sites if s.op not in ("linear", "embedding")]
    found = rules(decide(trace_of(*sites, site("out", "conv2d", (2, 16, 1, 1))), Policy.segmentation()))
    assert found == {
        "stem": "quantized",
        "bn": "skip_norms",
        "conv": "quantized",
        "dw": "depthwise",
        "up": "quantized",
        "out": "skip_last",
    }


def test_the_first_override_that_matches_wins():
    policy = Policy(overrides=[("mid", {"block": (16, 16)}), ("op:*", {"skip_norms": False, "min_numel": 10**6})])
    found = decide(net(), policy)
    assert found.decision_for("mid.weight").spec.block == (16, 16)
    assert found.decision_for("conv.weight").rule == "min_numel"


def test_min_sqnr_asks_only_for_sites_that_nothing_else_keeps():
    asked = []

    def sqnr(s, policy):
        asked.append((s.module, policy.block))
        return {"conv": 19.94, "up": 20.0, "mid": 25.0}[s.module]

    policy = Policy(min_sqnr=20, overrides={"mid": {"block": (16, 16)}})
    found = decide(net(), policy, sqnr)
    assert asked == [("conv", (1, 16)), ("up", (1, 16)), ("mid", (16, 16))]
    assert found.decision_for("conv.weight").reason == "19.94 dB < 20"
    assert found.decision_for("up.weight").spec is not None
    with pytest.raises(PlanError, match=r"conv.weight: Policy.min_sqnr=20 looks at the values"):
        decide(net(), policy)


def test_a_site_without_values_or_refused_by_the_trace_is_kept():
    found = decide(
        trace_of(
            site("a", "linear", (4, 4), refusal="cat of two parameters"),
            site("b", "linear", (0, 4)),
            site("c", "linear", (4, 4), kurtosis=None),
        ),
        Policy(skip_first=0, skip_last=0),
    )
    assert [(d.rule, d.reason) for d in found.decisions[:2]] == [
        ("refusal", "cat of two parameters"),
        ("refusal", "it has no values"),
    ]
    assert found.decisions[2].spec is not None
    assert "it has no values" in str(found)
    with pytest.raises(PlanError, match=r"c.weight: Policy.max_kurtosis=3 .*meta device.*max_kurtosis=None"):
        decide(trace_of(site("c", "linear", (4, 4), kurtosis=None)), Policy(max_kurtosis=3, skip_first=0, skip_last=0))


def test_activations_are_quantized_only_where_a_layer_reads_its_own_input():
    found = decide(
        trace_of(
            site("embed", "embedding", (8, 16)),
            site("qkv", "linear", (48, 16), own_input=False, called_in="attn"),
            site("fc", "linear", (16, 16)),
        ),
        Policy.w4a4(skip_first=0, skip_last=0, embeddings=True),
    )
    embed, qkv, fc = (d.spec for d in found.decisions)
    assert (fc.activations, fc.weight_only_reason) == ("nvfp4", None)
    assert qkv.activations is None
    assert qkv.weight_only_reason == "linear in attn reads an activation that is not the input of qkv"
    assert embed.weight_only_reason == "embedding multiplies no matrix"
    assert [d.label for d in found.decisions] == ["W4A16", "W4A16", "W4A4"]
    assert found.decisions[1].reason == f"weight only: {qkv.weight_only_reason}"
    plain = decide(net(), Policy()).decision_for("mid.weight").spec
    assert (plain.activations, plain.weight_only_reason) == (None, None)  # nothing was asked, nothing to explain


def test_a_tied_head_is_kept_because_the_embedding_is():
    embed = site("embed", "embedding", (100, 32), tied=("head.weight",))
    head = site("embed", "linear", (100, 32), called_in="head", tied=("head.weight",))
    tied = trace_of(embed, site("fc", "linear", (32, 32)), site("mlp", "linear", (32, 32)), head)
    found = decide(tied, Policy(skip_last=0))
    assert rules(found) == {"embed": "embeddings", "fc": "skip_first", "mlp": "quantized"}
    assert found.decisions[3].reason == "the same tensor as in embedding of embed, which is kept: embedding table"
    assert found.decision_for("head.weight") == found.decisions[0]

    for fields in ({"embeddings": True}, {"embeddings": True, "exclude": "head", "skip_last": 0}):
        found = decide(tied, Policy(**fields))
        assert found.decisions[0].spec is None
        assert found.decisions[3].spec is None
    found = decide(tied, Policy(embeddings=True, skip_last=0))
    assert found.decisions[0].spec is not None
    assert found.decisions[3].spec is not None


def test_every_use_of_a_layer_counts_and_all_are_kept_with_one():
    twice = trace_of(site("fc", "linear", (16, 16)), site("mid", "linear", (16, 16)), site("fc", "linear", (16, 16)))
    found = decide(twice, Policy(skip_first=0))
    assert [d.spec is None for d in found.decisions] == [True, False, True]
    assert found.decisions[0].reason == "the same tensor as in linear of fc, which is kept: last of 3"
    assert found.decisions[0].rule == "skip_last"


def test_uses_that_want_the_same_bytes_in_another_order_or_format():
    linear, conv = site("w", "linear", (16, 16)), site("w", "conv2d", (16, 16, 1, 1))
    free = Policy(skip_first=0, skip_last=0)
    found = decide(trace_of(linear, conv), free)
    assert [d.rule for d in found.decisions] == ["refusal", "refusal"]
    assert "another axis" in found.decisions[0].reason
    embed = site("w", "embedding", (16, 16))
    policy = Policy(skip_last=0, skip_first=0, embeddings=True, overrides={"op:linear": {"block": (16, 16)}})
    with pytest.raises(PolicyError, match=r"w.weight: overrides give its uses different formats"):
        decide(trace_of(embed, linear), policy)


def test_in_a_fragment_of_a_model_the_reasons_say_that_it_is_one():
    graph = trace_of(site("fc", "linear", (16, 16)), site("head", "linear", (16, 16)))
    found = decide(graph, fragment=True)
    assert [(d.rule, d.reason) for d in found.decisions] == [
        ("skip_first", "first of 2 in this graph"),
        ("skip_last", "last of 2 in this graph"),
    ]
    found = decide(net(), Policy(skip_first=2, skip_last=3), fragment=True)
    assert found.decision_for("conv.weight").reason == "2 of 6 in this graph, skip_first=2"
    assert found.decision_for("up.weight").reason == "4 of 6 in this graph, skip_last=3"


def test_patterns_must_match_except_in_a_fragment_of_a_model():
    with pytest.raises(PolicyError, match=r"Policy.exclude: pattern 'hed' .*near names: head"):
        decide(net(), Policy(exclude="hed"))
    found = decide(net(), fragment=True).decisions
    assert decide(net(), Policy(exclude="hed"), fragment=True) == Plan(found, Policy(exclude="hed"))
    assert decide(net(unreached=(Note("aux.weight", "never called"),)), Policy(exclude="aux.weight")).quantized


def test_a_policy_of_another_type_is_an_error():
    for policy in ({"skip_first": 0}, "w4a4", False):
        with pytest.raises(PolicyError, match=r"expected a Policy"):
            decide(net(), policy)


def test_decision_for_an_unknown_name_says_what_is_near():
    found = decide(net(unreached=(Note("aux.weight", "never called"),)))
    with pytest.raises(PlanError, match=r"'con.weight': no site of the plan; near names: .*conv.weight"):
        found.decision_for("con.weight")
    with pytest.raises(PlanError, match=r"aux.weight: never called"):
        found.decision_for("aux.weight")


def test_it_prints_every_site_once_with_norms_folded():
    notes = {"unreached": (Note("aux.weight", "never called"),), "opaque": (Note("rope", "data-dependent Python"),)}
    lines = str(decide(net(**notes))).splitlines()
    table = lines[: lines.index("")]
    assert table[0].split() == ["parameter", "op", "N", "x", "K", "groups", "kurtosis", "decision", "reason"]
    assert [line.split()[0] for line in table[2:]] == [f"{s.parameter}" for s in net().sites if s.op != "norm"]
    up = next(line for line in table if line.startswith("up."))
    assert up.split()[:6] == ["up.weight", "conv_transpose2d", "16x64", "2", "0.00", "W4A16"]
    assert lines[lines.index("") + 1 :][:3] == [
        "1 normalisation kept (skip_norms)",
        "not looked into: rope: data-dependent Python",
        "left alone: aux.weight: never called",
    ]
    assert "bn.weight" in str(decide(net(), Policy(skip_norms=False)))


@pytest.mark.parametrize(
    ("op", "shape", "groups"),
    [
        ("linear", (5, 17), 1),
        ("norm", (40,), 1),
        ("conv2d", (6, 4, 3, 3), 1),
        ("conv2d", (6, 4, 3, 3), 2),
        ("conv_transpose2d", (6, 4, 3, 3), 1),
        ("conv_transpose2d", (6, 4, 3, 3), 2),
    ],
)
def test_the_bytes_are_those_of_the_real_tensors(op, shape, groups):
    s = site("w", op, shape, groups=groups)
    q = nvfp4.quantize(torch.randn(shape), order=s.order, groups=groups)
    found = decide(trace_of(s), Policy(skip_first=0, skip_last=0, skip_norms=False)).decisions[0]
    assert found.nbytes == q.packed.nbytes + q.scale.nbytes + q.global_scale.nbytes


def test_round_trip_through_json():
    notes = {"unreached": (Note("aux.weight", "never called"),), "opaque": (Note("", "data-dependent Python"),)}
    policy = Policy.w4a4(exclude=lambda s: s.op == "norm", overrides={"mid": {"block": (16, 16)}}, max_kurtosis=8)
    found = decide(net(**notes), policy)
    again = Plan.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert hash(again) == hash(found)
    assert str(again) == str(found)


def test_a_plan_from_before_activations_had_scale_rules():
    found = decide(net(), Policy.w4a4(activation_scale_rule="four_over_six"))
    data = json.loads(json.dumps(found.to_dict()))
    assert Plan.from_dict(data) == found
    assert {d.spec.activation_scale_rule for d in found.quantized} == {"four_over_six"}
    for owner in (data["policy"], *filter(None, (d["spec"] for d in data["decisions"]))):
        del owner["activation_scale_rule"]
    assert Plan.from_dict(data) == decide(net(), Policy.w4a4())


def _broken(path, value):
    data = copy.deepcopy(decide(net()).to_dict())
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["format"], "onnx", "found format 'onnx', expected 'fp4fx.plan'"),
        (["version"], 99, "found version 99, expected 1"),
        (["surprise"], 1, "unknown fields ['surprise']"),
        (["policy"], None, "missing fields ['policy']"),
        (["decisions"], None, "missing fields ['decisions']"),
        (["decisions"], 3, "plan.decisions: found 3"),
        (["decisions", 3, "site", "op"], "matmul", "plan.decisions[3].site.op: found 'matmul'"),
        (["decisions", 3, "site", "shape"], [32, "16", 3, 3], "plan.decisions[3].site.shape[1]: found '16'"),
        (
            ["decisions", 3, "site", "shape"],
            [32, 16, 3],
            "plan.decisions[3].site: shape (32, 16, 3) does not hold 4608",
        ),
        (["decisions", 5, "site", "groups"], 3, "plan.decisions[5].site: order 'conv_transpose'"),
        (["decisions", 3, "site", "numel"], True, "plan.decisions[3].site.numel: found True"),
        (["decisions", 3, "spec", "block"], [1, 32], "plan.decisions[3].spec.block[1]: found 32"),
        (["decisions", 3, "spec", "scale_rule"], "mse", "plan.decisions[3].spec.scale_rule: found 'mse'"),
        (["decisions", 3, "reason"], None, "plan.decisions[3]: unknown fields [], missing fields ['reason']"),
        (["policy", "weights"], "int4", "plan.policy: Policy.weights: found 'int4'"),
        (["policy", "wights"], 1, "plan.policy: Policy: unknown field 'wights'"),
        (["opaque"], [{"name": 1, "reason": ""}], "plan.opaque[0].name: found 1"),
    ],
)
def test_a_damaged_dictionary_is_named(path, value, words):
    with pytest.raises(PlanError) as error:
        Plan.from_dict(_broken(path, value))
    assert words in str(error.value)


def test_anything_else_is_not_a_plan():
    for data in ([], None, {}, "plan"):
        with pytest.raises(PlanError, match=r"expected 'fp4fx\.plan'"):
            Plan.from_dict(data)


def test_weight_sqnr_is_that_of_the_rows_the_op_reads():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 32, 3, 3) * torch.rand(1, 32, 1, 1))
    conv = site("w", "conv2d", (64, 32, 3, 3))
    q = nvfp4.quantize(weight, order="conv")
    assert weight_sqnr(weight, conv, "max", (1, 16)) == nvfp4.sqnr(weight, nvfp4.dequantize(q))
    assert weight_sqnr(weight, conv, "max", (16, 16)) < weight_sqnr(weight, conv, "max", (1, 16))
    with pytest.raises(NonFiniteWeightError, match=r"w\.weight"):
        weight_sqnr(weight * math.nan, conv, "max", (1, 16))


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(128, 10)
    )


def test_plan_of_a_real_model_counts_all_bytes_and_changes_nothing():
    net = model()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = plan(net, None, (torch.randn(1, 3, 6, 6),))
    assert [d.site.parameter for d in found.quantized] == ["2.weight"]
    totals = found.totals
    assert totals.numel == sum(p.numel() for p in net.parameters())
    assert totals.before == totals.numel * 4
    assert totals.before - totals.after == 32 * 144 * 4 - (32 * 81 + 4)
    assert f"parameters {totals.before:,} bytes -> {totals.after:,} bytes" in str(found)
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training


def test_plan_with_min_sqnr_measures_the_weights():
    net = model()
    sqnr = weight_sqnr(net[2].weight, plan(net).decision_for("2.weight").site, "unbiased", (1, 16))
    assert len(plan(net, Policy(min_sqnr=sqnr - 0.01)).quantized) == 1
    found = plan(net, Policy(min_sqnr=sqnr + 0.01)).decision_for("2.weight")
    assert found.rule == "min_sqnr"
    assert found.reason == f"{sqnr:.2f} dB < {sqnr + 0.01}"
    with pytest.raises(PlanError, match=r"2.weight: Policy.min_sqnr=20"):
        plan(net.to("meta"), Policy(min_sqnr=20))
