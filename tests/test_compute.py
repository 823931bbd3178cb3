"""The precision that kernels may compute in, on its way from the policy to the op."""

import copy

import pytest
import torch
from torch import nn

import fp4fx
from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.fold_weights import fold_weights
from fp4fx.passes.fuse_conv import fuse_conv
from fp4fx.passes.fuse_linear import fuse_linear
from fp4fx.passes.insert_qdq import insert_qdq
from fp4fx.passes.narrow import narrow
from fp4fx.plan import Plan
from tests.models import ConvNet, Tied
from tests.passes.graphs import Captured

POLICY = fp4fx.Policy(skip_first=0, skip_last=0, compute="int8", overrides={"head": {"compute": "fp32"}})
IMAGE = torch.randn(1, 3, 8, 8)


def computes(graph):
    """The last argument of every fused op, in the order of the graph."""
    return [n.args[-1] for n in graph.gm.graph.nodes if str(n.target).startswith(("fp4fx.conv", "fp4fx.linear"))]


def test_from_the_packed_module_to_the_op():
    model = fp4fx.quantize(ConvNet().eval(), POLICY)
    assert (model.body.nvfp4["weight"].compute, model.head.nvfp4["weight"].compute) == ("int8", "fp32")
    g = Captured(model, IMAGE)
    g.apply(canonicalize, expose_qdq, fuse_linear, fuse_conv)
    assert computes(g) == ["int8", "int8", "int8", "fp32"]
    g.check()


def test_from_the_policy_of_a_compile_to_the_op():
    g = Captured(ConvNet().eval(), IMAGE, policy=POLICY)
    g.apply(canonicalize, insert_qdq, expose_qdq, fold_weights, fuse_linear, fuse_conv)
    assert computes(g) == ["int8", "int8", "int8", "fp32"]


def test_it_is_saved_and_a_file_from_before_it_was_there_loads(tmp_path):
    model = fp4fx.quantize(ConvNet().eval(), POLICY)
    fp4fx.save(model, tmp_path / "m.safetensors")
    again = fp4fx.load(ConvNet(), tmp_path / "m.safetensors")
    assert (again.body.nvfp4["weight"].compute, again.head.nvfp4["weight"].compute) == ("int8", "fp32")

    old = fp4fx.plan(ConvNet()).to_dict()
    del old["policy"]["compute"]
    for decision in old["decisions"]:
        if decision["spec"]:
            del decision["spec"]["compute"]
    assert Plan.from_dict(old).decision_for("body.weight").spec.compute == "bf16"


def test_it_survives_copies_and_casts_and_assignment():
    model = copy.deepcopy(fp4fx.quantize(ConvNet().eval(), POLICY)).bfloat16()
    model.body.weight = torch.randn_like(model.body.weight)
    assert model.body.nvfp4["weight"].compute == "int8"


def test_plan_and_report_show_it_where_it_is_not_the_default():
    model = fp4fx.quantize(ConvNet().eval(), POLICY)
    labels = {r.parameter: r.decision for r in fp4fx.report(model).rows}
    assert (labels["body.weight"], labels["head.weight"]) == ("W4A16 in int8", "W4A16 in fp32")
    assert "W4A16 in int8" in str(fp4fx.plan(ConvNet(), POLICY))
    assert " in " not in fp4fx.plan(ConvNet()).decision_for("body.weight").label


def test_what_is_refused():
    with pytest.raises(
        fp4fx.PolicyError, match="compute: found 'fp8', expected 'bf16' or 'bf16_operands' or 'fp32' or 'int8'"
    ):
        fp4fx.Policy(compute="fp8")
    policy = fp4fx.Policy(embeddings=True, skip_first=0, skip_last=0, overrides={"op:linear": {"compute": "int8"}})
    with pytest.raises(fp4fx.PolicyError, match="expected one scale_rule, block and compute per tensor"):
        fp4fx.quantize(Tied(), policy)


def test_bf16_for_operands_alone_travels_too(tmp_path):
    fp4fx.save(fp4fx.quantize(ConvNet().eval(), fp4fx.Policy(compute="bf16_operands")), tmp_path / "m.safetensors")
    again = fp4fx.load(ConvNet(), tmp_path / "m.safetensors").eval()
    g = Captured(again, IMAGE)
    g.apply(canonicalize, expose_qdq, fuse_linear, fuse_conv, narrow)
    assert set(computes(g)) == {"bf16_operands"}
    assert set(g.ctx.between.values()) == {"compute='bf16_operands'"}


def test_the_body_ignores_it():
    layer = nn.Linear(40, 8)
    a, b = (fp4fx.quantize(layer, fp4fx.Policy(skip_first=0, skip_last=0, compute=c)) for c in ("bf16", "fp32"))
    assert torch.equal(a(torch.ones(2, 40)), b(torch.ones(2, 40)))
