"""Static activation scales: what is measured, and what headroom, percentiles and the squared error do."""

import pytest
import torch
from torch import nn

import fp4fx
from fp4fx import nvfp4
from fp4fx.calibration import StaticScales, calibration_of
from fp4fx.packed import plan_of
from tests.models import ConvNet

W4A4 = fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0, min_channels=1, activations="nvfp4")


def test_the_largest_value_of_all_batches_with_headroom():
    torch.manual_seed(0)
    model = ConvNet().eval()
    qmodel, largest = fp4fx.quantize(model, W4A4), {}
    batches = [k * torch.randn(4, 3, 8, 8) for k in (1, 3, 2)]
    fp4fx.calibrate(qmodel, batches, methods=["static_scales"])
    for name in ("stem", "body", "grouped", "head"):

        def look(_, args, name=name):
            largest[name] = max(largest.get(name, 0.0), args[0].abs().max().item())

        # Of what the layer gets with dynamic scales ahead of it, as then.
        fresh = fp4fx.quantize(model, W4A4)
        fresh.get_submodule(name).register_forward_pre_hook(look)
        with torch.no_grad():
            for batch in batches:
                fresh(batch)
        scale = qmodel.get_submodule(name).input_global_scale
        assert scale.item() == pytest.approx(16 * largest[name] / 2688, rel=1e-5)
        assert qmodel.get_submodule(name).nvfp4_activations == "nvfp4-static"
    assert {d.spec.activations for d in plan_of(qmodel).quantized} == {"nvfp4-static"}
    assert all(s.changed and s.after == pytest.approx(s.before, rel=1e-2) for s in calibration_of(qmodel).steps)
    kept = qmodel.body.input_global_scale
    fp4fx.calibrate(qmodel, [10 * batches[0]], methods=["static_scales"], again=True)
    assert qmodel.body.input_global_scale is kept  # in place: a compiled graph sees it
    assert kept.item() > 2 * 16 * largest["body"] / 2688


def heavy(shape):
    """Student's t with 5 degrees of freedom."""
    return torch.distributions.StudentT(5.0).sample(shape)


def test_what_the_rules_do_to_heavy_tails():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(256, 32)).eval(), [heavy((512, 256)) for _ in range(8)]
    errors, scales = {}, {}
    for rule in ("max", "percentile", "mse"):
        qmodel = fp4fx.quantize(model, W4A4)
        fp4fx.calibrate(qmodel, batches, methods=[StaticScales(rule=rule)])
        scales[rule] = qmodel[0].input_global_scale
        fresh = heavy((4096, 256))
        rounded = nvfp4.dequantize_rows(*nvfp4.quantize_rows(fresh, scales[rule]), 256, torch.float32)
        errors[rule] = float((fresh - rounded).square().sum() / fresh.square().sum())
    dynamic = nvfp4.dequantize_rows(*nvfp4.quantize_rows(fresh), 256, torch.float32)
    plain = float((fresh - dynamic).square().sum() / fresh.square().sum())
    assert errors["max"] == pytest.approx(plain, rel=0.01) and errors["mse"] < 1.01 * plain
    assert errors["percentile"] > 1.3 * plain
    magnitudes = torch.cat(batches).abs().flatten()
    exact = torch.sort(magnitudes).values[int(0.999 * len(magnitudes))]
    assert scales["percentile"].item() == pytest.approx(exact.item() / 2688, rel=0.1)


def test_layers_that_stay_as_they_are():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.a(x) if x.shape[0] > 1 else self.b(x)

    model = Branch().eval()
    qmodel = fp4fx.quantize(model, W4A4)
    fp4fx.calibrate(qmodel, [torch.randn(4, 32)], methods=["static_scales"])
    done = {s.parameter: s for s in calibration_of(qmodel).steps}
    assert done["b.weight"].reason == "kept: never reached by the data, which leaves it its dynamic scale"
    assert qmodel.b.nvfp4_activations == "nvfp4" and qmodel.a.nvfp4_activations == "nvfp4-static"
    qmodel = fp4fx.quantize(model, fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0))
    fp4fx.calibrate(qmodel, [torch.randn(4, 32)], methods=["static_scales"])
    assert {s.reason for s in calibration_of(qmodel).steps} == {"kept: its input is not quantized"}
