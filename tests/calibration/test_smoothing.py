"""Channels scaled between a norm and what reads it: exactness, gain, and what stands in the way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp4fx
from fp4fx import nvfp4
from fp4fx.calibration import calibration_of
from tests.calibration.test_gptq import error

ALL = fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0, min_channels=1)


def steps(qmodel):
    return {s.parameter: s for s in calibration_of(qmodel).steps}


class Mixed(nn.Module):
    """A LayerNorm that q and v read, a BatchNorm ahead of a grouped convolution, and near misses."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.bn = nn.BatchNorm2d(32)
        self.conv = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.ln = nn.LayerNorm(32)
        self.q, self.v = nn.Linear(32, 32), nn.Linear(32, 32)
        self.ln2 = nn.LayerNorm(32)
        self.mlp, self.head = nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = self.conv(F.relu(self.bn(self.first(x))))
        x = x.flatten(2).transpose(1, 2)
        x = self.ln(x)
        x = self.q(x) * self.v(x)
        y = self.ln2(x)
        return self.head(F.gelu(self.mlp(y))) + y.mean(-1, keepdim=True)


def outliers(seed):
    """A model some of whose channels are large, as transformers' are."""
    torch.manual_seed(seed)
    model = Mixed().eval()
    for norm in (model.bn, model.ln, model.ln2):
        with torch.no_grad():
            norm.weight.copy_(torch.exp(1.5 * torch.randn(32)))
            norm.bias.normal_()
    return model


def test_a_smoothed_weight_is_encoded_by_its_own_rule():
    model = outliers(0)
    policy = fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0, min_channels=1)
    qmodel = fp4fx.quantize(model, policy)
    fp4fx.calibrate(qmodel, [torch.randn(8, 3, 8, 8) for _ in range(4)], reference=model, methods=["smoothing"])
    assert steps(qmodel)["conv.weight"].changed and qmodel.conv.nvfp4["weight"].scale_rule == "unbiased"
    factors = model.bn.weight.detach() / qmodel.bn.weight.detach()
    own = factors.view(2, 16).repeat_interleave(16, 0)  # the inputs of each result's group
    smoothed = model.conv.weight.detach() * own[:, :, None, None]

    def distance(rule):
        q = nvfp4.dequantize(nvfp4.quantize(smoothed, scale_rule=rule, order="conv", groups=model.conv.groups))
        return float((qmodel.conv.weight - q).norm() / q.norm())

    assert distance("unbiased") < 0.01 < distance("search")


@pytest.mark.parametrize("activations", [None, "nvfp4"])
def test_groups_are_smoothed_where_it_helps(activations):
    model = outliers(0)
    policy = fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0, min_channels=1, activations=activations)
    qmodel = fp4fx.quantize(model, policy)
    batches, fresh = [torch.randn(8, 3, 8, 8) for _ in range(4)], torch.randn(8, 3, 8, 8)
    before = error(qmodel, model, fresh)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fp4fx.calibrate(qmodel, batches, reference=model, methods=["smoothing"])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    done = steps(qmodel)
    if activations is None:
        assert done["conv.weight"].changed and done["q.weight"].changed and done["v.weight"].changed
        assert error(qmodel, model, fresh) < 0.9 * before
    assert all(s.after < s.before for s in done.values() if s.changed)
    assert "comes from x, not from a norm" in done["first.weight"].reason
    assert "mean reads the norm too" in done["mlp.weight"].reason
    assert "comes from gelu" in done["head.weight"].reason


def test_nothing_changes_in_exact_arithmetic():
    model = outliers(1)
    qmodel = fp4fx.quantize(model, ALL)
    fp4fx.calibrate(qmodel, [torch.randn(8, 3, 8, 8)], reference=model, methods=["smoothing"])
    from fp4fx.calibration.job import Job

    job, dense, x = Job(qmodel, model, None), outliers(1), torch.randn(4, 3, 8, 8)
    smoothed = [s for s in job.sites if job.smoothing(s) is not None]
    assert {s.parameter for s in smoothed} >= {"conv.weight", "q.weight", "v.weight"}
    for norm in ("bn", "ln"):
        setattr(dense, norm, qmodel.get_submodule(norm))
    for site in smoothed:
        rows = job.weight(site)
        weight = fp4fx.nvfp4.from_rows(rows, site.shape, site.order, site.groups)
        dense.get_submodule(site.module).weight = nn.Parameter(weight)
    with torch.no_grad():
        torch.testing.assert_close(dense(x), model(x), atol=1e-4, rtol=1e-4)


def test_what_comes_after_knows_of_it(tmp_path):
    model = outliers(2)
    batches, fresh = [torch.randn(8, 3, 8, 8) for _ in range(4)], torch.randn(8, 3, 8, 8)
    qmodel = fp4fx.quantize(model, ALL)
    fp4fx.calibrate(qmodel, batches, reference=model, methods=["smoothing"])
    smoothed = error(qmodel, model, fresh)
    fp4fx.calibrate(qmodel, batches, reference=model, methods=["gptq", "bias_correction"])
    assert error(qmodel, model, fresh) < 0.7 * smoothed
    fp4fx.save(qmodel, tmp_path / "m.safetensors")
    loaded = fp4fx.load(model, tmp_path / "m.safetensors")
    assert error(loaded, model, fresh) == error(qmodel, model, fresh)
    with pytest.raises(fp4fx.CalibrationError, match=r"conv\.weight: found it smoothed, and its factors gone"):
        fp4fx.calibrate(loaded, batches, reference=model, methods=["gptq"], again=True)
    assert [s.changed for s in calibration_of(qmodel).steps if s.parameter == "q.weight"][:2] == [True, True]


def test_uniform_channels_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32)).eval()
    qmodel = fp4fx.quantize(model, ALL)
    fp4fx.calibrate(qmodel, [torch.randn(256, 64)], reference=model, methods=["smoothing"])
    assert steps(qmodel)["1.weight"].reason.startswith("kept: the best power")
    assert qmodel[0].weight is not None and torch.equal(qmodel[0].weight, model[0].weight)
