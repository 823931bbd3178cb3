import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fp4fx import nvfp4
from fp4fx.errors import PlanError
from fp4fx.lowering import Lowering
from fp4fx.plan import plan
from fp4fx.policy import Policy
from fp4fx.quantize import quantize
from fp4fx.report import Report, report


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.fc1 = nn.Linear(32, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.fc2 = nn.Linear(64, 40)
        self.head = nn.Linear(40, 10)
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.fc2(self.norm(self.fc1(self.embed(x)))).relu())


def net():
    torch.manual_seed(0)
    return Net().eval()


def bytes_of(model):
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_every_site_of_a_quantized_model_has_its_row():
    model = net()
    found = report(quantize(model))
    assert [(r.parameter, r.decision, r.rule) for r in found.rows] == [
        ("embed.weight", "kept", "embeddings"),
        ("fc1.weight", "kept", "skip_first"),
        ("norm.weight", "kept", "skip_norms"),
        ("fc2.weight", "W4A16", "weights"),
        ("head.weight", "kept", "skip_last"),
    ]
    fc2 = found.rows[3]
    q = nvfp4.quantize(model.fc2.weight, scale_rule="unbiased")
    assert fc2.sqnr == pytest.approx(nvfp4.sqnr(model.fc2.weight, nvfp4.dequantize(q)), abs=1e-9)
    assert fc2.kurtosis == pytest.approx(nvfp4.excess_kurtosis(model.fc2.weight), abs=1e-9)
    assert (fc2.op, fc2.shape) == ("linear", (40, 64))
    assert fc2.bits == (40 * 64 * 4.5 + 32) / (40 * 64)
    assert (found.rows[0].bits, found.rows[0].sqnr) == (32.0, None)
    assert len(found.notes) == 2
    assert "unused.weight" in found.notes[1]


def test_the_sums_are_those_of_the_tensors():
    model = net()
    qmodel = quantize(model, Policy(skip_first=0, skip_last=0, embeddings=True))
    found = report(qmodel)
    assert found.resident == bytes_of(qmodel)
    assert found.dense == bytes_of(model)
    assert found.numel == sum(p.numel() for p in model.parameters())
    assert found.quantized == 50 * 32 + 64 * 32 + 40 * 64 + 10 * 40
    packed = sum(b.nbytes for b in qmodel.buffers())
    assert found.bits == packed * 8 / found.quantized
    assert found.resident / found.dense < 0.4


def test_half_precision_and_meta_are_counted_as_they_are():
    half = report(quantize(net().bfloat16(), Policy(skip_first=0)))
    assert half.dense == bytes_of(net()) // 2
    assert half.rows[0].bits == 16.0
    meta = report(quantize(net().to("meta"), Policy(skip_first=0)))
    assert meta.dense == bytes_of(net())
    assert meta.rows[1].sqnr is None


def test_a_tied_weight_is_counted_once():
    model = net()
    model.head = nn.Linear(32, 50, bias=False)
    model.fc2 = nn.Linear(64, 32)
    model.head.weight = model.embed.weight
    found = report(quantize(model, Policy(embeddings=True, skip_first=0, skip_last=0)))
    assert found.dense == sum(p.nbytes for p in model.parameters())
    assert [r.parameter for r in found.rows].count("embed.weight") == 2
    assert found.quantized == 50 * 32 + 64 * 32 + 32 * 64


def test_it_prints_and_goes_through_json():
    qmodel = quantize(net(), Policy.w4a4())
    found = report(qmodel)
    lines = str(found).splitlines()
    assert lines[0].split() == [
        "parameter",
        "op",
        "shape",
        "decision",
        "reason",
        "bits",
        "kurtosis",
        "SQNR",
        "dB",
        "kernel",
    ]
    assert [line.split()[0] for line in lines[2 : lines.index("")]] == [
        "embed.weight",
        "fc1.weight",
        "fc2.weight",
        "head.weight",
    ]
    fc2 = next(line for line in lines if line.startswith("fc2"))
    assert "W4A4" in fc2
    assert fc2.endswith("not compiled yet")
    assert lines[lines.index("") + 1] == "1 normalisation kept (skip_norms)"
    assert f"resident {found.resident:,} bytes, dense {found.dense:,} bytes" in lines[-1]
    data = json.loads(found.to_json())
    assert data == found.to_dict()
    assert data["rows"][3]["activations"] == "nvfp4"
    assert data["resident"] == found.resident


def test_an_exact_weight_has_an_infinite_sqnr_that_json_can_hold():
    model = net()
    nn.init.constant_(model.fc2.weight, 0.0)
    found = report(quantize(model))
    assert found.rows[3].sqnr == math.inf
    assert json.loads(found.to_json())["rows"][3]["sqnr"] == "inf"


def test_after_compiling_it_names_kernels_and_refusals():
    qmodel = quantize(net(), Policy(skip_last=0))
    qmodel.fc2.weight_packed.fp4fx_lowering = (
        Lowering("linear", "reference", ("triton: no CUDA device", "cpu: no AVX-512")),
        Lowering("linear", "reference", ("triton: no CUDA device",)),
    )
    rows = {r.parameter: r for r in report(qmodel).rows}
    assert rows["fc2.weight"].kernels == ("linear: reference",)
    assert rows["fc2.weight"].refusals == ("triton: no CUDA device", "cpu: no AVX-512")
    lines = {line.split()[0]: line for line in str(report(qmodel)).splitlines() if line}
    assert lines["parameter"].endswith("refused")
    assert lines["fc2.weight"].endswith("triton: no CUDA device; cpu: no AVX-512")
    assert "not compiled yet" in lines["head.weight"]
    assert "not compiled yet" not in lines["fc1.weight"]


def test_it_counts_what_is_stored_in_bf16():
    qmodel = quantize(net(), Policy(skip_first=0, skip_last=0))
    assert "stored in bf16" not in str(report(qmodel))
    qmodel.fc1.weight_packed.fp4fx_lowering = (Lowering("linear", "cpu", (), ""), Lowering("linear", "cpu", (), ""))
    qmodel.fc2.weight_packed.fp4fx_lowering = (Lowering("linear", "cpu", (), "read by sin"),)
    qmodel.head.weight_packed.fp4fx_lowering = (Lowering("linear", "cpu"),)
    found = report(qmodel)
    assert {r.parameter: r.between for r in found.rows if r.kernels} == {
        "fc1.weight": ("", ""),
        "fc2.weight": ("read by sin",),
        "head.weight": (),
    }
    assert "2 of 3 fp32 results stored in bf16; not: 1 read by sin" in str(found).splitlines()


def test_a_compiled_model_is_unwrapped():
    qmodel = quantize(net())
    assert report(torch.compile(qmodel, backend="eager")) == report(qmodel)


def test_a_dense_model_that_was_compiled_with_a_policy():
    model = net()
    decided = plan(model)
    for decision in decided.decisions:
        site = replace(decision.site, parameter=f"self.{decision.site.parameter}", kurtosis=None)
        model.get_parameter(decision.site.parameter).fp4fx_decision = replace(decision, site=site)
    model.fc2.weight.fp4fx_lowering = (Lowering("linear", "reference"),)
    found = report(model)
    packed = report(quantize(net()))
    assert [replace(r, kernels=()) for r in found.rows] == list(packed.rows)
    assert found.notes[0] == packed.notes[0]
    assert found.notes[1].startswith("left alone: unused.weight: no compiled graph")
    assert found.rows[3].kernels == ("linear: reference",)
    assert (found.resident, found.dense, found.bits) == (bytes_of(model), bytes_of(model), packed.bits)
    assert "the packed weights are in its compiled graph" in str(found)


def test_a_kept_parameter_shows_nothing_of_an_earlier_compile():
    left = (Lowering("linear", "triton", ("cute: no SM100",)),)
    model, qmodel = net(), quantize(net())
    for decision in plan(model).decisions:
        model.get_parameter(decision.site.parameter).fp4fx_decision = decision
    for stale in (model.fc1.weight, model.fc2.weight, qmodel.fc1.weight, qmodel.fc2.weight_packed):
        stale.fp4fx_lowering = left
    for found in (report(model), report(qmodel)):
        rows = {r.parameter: r for r in found.rows}
        assert (rows["fc1.weight"].kernels, rows["fc1.weight"].refusals) == ((), ())
        assert (rows["fc2.weight"].kernels, rows["fc2.weight"].refusals) == (("linear: triton",), ("cute: no SM100",))
        line = next(line for line in str(found).splitlines() if line.startswith("fc1"))
        assert "triton" not in line
        assert "cute" not in line


def test_what_the_compiler_said_of_parameters_that_are_no_site():
    model = net()
    for decision in plan(model).decisions:
        if decision.site.parameter != "fc2.weight":
            model.get_parameter(decision.site.parameter).fp4fx_decision = decision
    model.fc2.weight.fp4fx_note = "used in aten.mul, which is not a linear, a convolution or an embedding"
    found = report(model)
    assert "fc2.weight" not in [r.parameter for r in found.rows]
    assert found.notes[1:] == (
        "left alone: unused.weight: no compiled graph has it as the weight of a known op",
        "not reached: fc2.weight: used in aten.mul, which is not a linear, a convolution or an embedding",
    )
    assert found.notes[2] in str(found).splitlines()


def test_a_model_of_which_the_compiler_found_nothing_is_reported():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.fp4fx_note = "used in aten.foo"
    found = report(model)
    assert (found.rows, found.notes) == ((), ("not reached: 0.weight: used in aten.foo",))
    assert (found.quantized, found.bits, found.numel, found.in_graph) == (0, 0, 72, True)
    assert "not reached: 0.weight: used in aten.foo" in str(found)
    assert json.loads(found.to_json())["notes"] == list(found.notes)


def test_a_model_without_a_plan_is_an_error_that_says_what_to_do():
    with pytest.raises(PlanError, match=r"found a Net that carries no plan.*fp4fx.quantize"):
        report(net())


def test_a_model_changed_after_quantization_is_an_error_that_names_the_layer():
    for name, layer in (("fc2", nn.Linear(64, 40)), ("head", nn.Identity())):
        qmodel = quantize(net())
        setattr(qmodel, name, layer)
        with pytest.raises(PlanError, match=rf"{name}.weight: the plan has it .*quantize it anew"):
            report(qmodel)


def test_a_copy_reports_the_same():
    qmodel = quantize(net())
    assert isinstance(report(copy.deepcopy(qmodel)), Report)
    assert report(copy.deepcopy(qmodel)) == report(qmodel)
