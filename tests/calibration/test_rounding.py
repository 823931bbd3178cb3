"""Learned rounding: between which values, towards what, and when it is kept."""

import pytest
import torch
from torch import nn

import fp4fx
from fp4fx import nvfp4
from fp4fx.calibration import AdaRound, calibration_of
from fp4fx.calibration.rounding import Choice
from tests.calibration.test_gptq import correlated, error
from tests.models import Attention, ConvNet

ALL = fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0, min_channels=1)


def steps(qmodel):
    return {s.parameter: s for s in calibration_of(qmodel).steps}


def test_a_choice_is_between_the_neighbours():
    torch.manual_seed(0)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    weight, scale = 3 * torch.randn(50, 40), torch.rand(50, 3) + 0.1
    weight[0, :3] = torch.tensor([0.0, 100.0, -100.0])
    choice, s = Choice(weight, scale), scale.repeat_interleave(16, -1)[:, :40]
    clipped = weight.clamp(-6 * s, 6 * s)
    torch.testing.assert_close(choice(), clipped, atol=1e-4, rtol=1e-4)  # begins at the weight
    low, high = choice.base / s, (choice.base + choice.span) / s
    for value in (low, high):
        assert torch.isclose(value.abs().unsqueeze(-1), grid).any(-1).all()
    width = torch.searchsorted(grid, high.abs() - 1e-3) - torch.searchsorted(grid, low.abs() - 1e-3)
    assert (width == 1).all()
    torch.testing.assert_close(
        (choice.nearest() - clipped).abs(), torch.minimum((low * s - clipped).abs(), (high * s - clipped).abs())
    )
    with torch.no_grad():
        choice.logit.copy_(torch.where(torch.rand(50, 40) < 0.5, 9.0, -9.0))
    torch.testing.assert_close(nvfp4.decode_e2m1(choice.codes()) * s, choice.final())
    torch.testing.assert_close(choice(), choice.final())


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_sites_one_by_one(rho):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 32, bias=False)).eval()
    nn.init.normal_(model[0].weight)
    qmodel = fp4fx.quantize(model, fp4fx.Policy(skip_first=0, skip_last=0, scale_rule="search"))
    fresh = correlated(2048, 128, rho)
    before = error(qmodel, model, fresh)
    fp4fx.calibrate(qmodel, list(correlated(2048, 128, rho).split(512)), reference=model, methods=["adaround"])
    assert error(qmodel, model, fresh) <= (0.5 if rho else 1) * before
    assert steps(qmodel)["0.weight"].changed == (rho > 0)


@pytest.mark.parametrize(
    ("make", "shape", "block", "names", "activations"),
    [
        (ConvNet, (16, 3, 8, 8), "", {"stem", "body", "grouped", "head"}, "nvfp4"),
        (Attention, (32, 6, 8), "attention", {"attention.out_proj", "attention.in_proj"}, None),
    ],
)
def test_a_block_learns_from_the_output_of_the_original(make, shape, block, names, activations):
    torch.manual_seed(0)
    model = make().eval()
    policy = fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0, min_channels=1, activations=activations)
    qmodel, batches = fp4fx.quantize(model, policy), [torch.randn(shape) for _ in range(8)]
    fresh = torch.randn(shape)
    before = error(qmodel, model, fresh)
    method = AdaRound(blocks=(block,), steps=100)
    fp4fx.calibrate(qmodel, batches, reference=model, methods=[method])
    learned = {s.parameter for s in steps(qmodel).values() if s.reason.startswith("learned with")}
    assert {name.removesuffix(".weight").removesuffix("_weight") for name in learned} == names
    assert error(qmodel, model, fresh) < 0.97 * before
    assert all(s.after < s.before for s in steps(qmodel).values() if s.changed)


def test_what_is_learned_from_is_what_the_block_computes():
    """The loss of the block with the weights that are packed is the error of the quantized block itself."""
    from fp4fx.calibration.data import Batches
    from fp4fx.calibration.job import Job
    from fp4fx.calibration.rounding import Block

    torch.manual_seed(0)
    model = ConvNet().eval()
    policy = fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0, min_channels=1, activations="nvfp4")
    qmodel, x = fp4fx.quantize(model, policy), torch.randn(4, 3, 8, 8)
    qmodel.head.bias = nn.Parameter(qmodel.head.bias + 0.1)  # as a correction leaves it
    job = Job(qmodel, model, Batches([x], qmodel))
    sites = [s for s in job.sites if s.parameter != "body.weight"]
    weights = {s.parameter: job.decoded(s) for s in sites}
    data = AdaRound()._data(job, "")
    assert Block(job, "", sites).error(weights, data) == pytest.approx(error(qmodel, model, x), rel=1e-3)


def test_reasons_to_keep_a_block():
    torch.manual_seed(0)
    model = ConvNet().eval()
    qmodel = fp4fx.quantize(model, ALL)
    method = AdaRound(blocks=("body",), steps=0)
    fp4fx.calibrate(qmodel, [torch.randn(64, 3, 8, 8)], reference=model, methods=[method])
    assert "expected two or more" in steps(qmodel)["body.weight"].reason
    qmodel = fp4fx.quantize(model, ALL)
    method = AdaRound(blocks=("body",), steps=0)
    fp4fx.calibrate(qmodel, [torch.randn(8, 3, 8, 8)] * 3, reference=model, methods=["gptq", method])
    assert steps(qmodel)["body.weight"].reason.startswith("kept: body has an error")
