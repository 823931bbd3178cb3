"""Bias correction by data and without, against means that are measured."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp4fx
from fp4fx.calibration import calibration_of
from fp4fx.calibration.moments import moments
from fp4fx.trace import symbolic_graph
from tests.models import Attention, ConvNet

ALL = fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0, min_channels=1)


def steps(qmodel):
    return {s.parameter: s for s in calibration_of(qmodel).steps}


class Chain(nn.Module):
    """Convolutions without biases ahead of BatchNorms, and a linear with one."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, groups=2, bias=False), nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 8, 1, bias=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.silu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3))), self.conv3(x).amax((1, 2, 3))


def trained(data):
    """With statistics as of training: norms that hold the moments of their inputs."""
    torch.manual_seed(0)
    model = Chain()
    for bn in (model.bn1, model.bn2):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.uniform_(bn.bias, -1, 1)
        bn.momentum = None
    with torch.no_grad():
        for x in data:
            model(x)
    return model.eval()


def mean_error(qmodel, model, x):
    with torch.no_grad():
        difference = (qmodel(x)[0] - model(x)[0]).mean(0)
    return float(difference.square().sum())


@pytest.mark.parametrize("by_data", [True, False])
def test_mean_outputs_come_back(by_data):
    torch.manual_seed(0)
    offset = 0.5 if by_data else 0.0  # without data the first layer is not corrected
    data = [torch.randn(32, 3, 8, 8) + offset for _ in range(8)]
    model = trained(data)
    qmodel = fp4fx.quantize(model, ALL)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = torch.randn(512, 3, 8, 8) + offset
    before = mean_error(qmodel, model, fresh)
    fp4fx.calibrate(qmodel, data if by_data else None, reference=model, methods=["bias_correction"])
    assert mean_error(qmodel, model, fresh) < (0.05 if by_data else 0.5) * before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    done = steps(qmodel)
    assert "no bias, and no BatchNorm" in done["conv3.weight"].reason
    assert done["head.weight"].changed and not torch.equal(qmodel.head.bias, model.head.bias)
    assert done["conv2.weight"].changed and not torch.equal(qmodel.bn2.running_mean, model.bn2.running_mean)
    assert done["conv1.weight"].changed == by_data
    if not by_data:
        assert "that of the model" in done["conv1.weight"].reason


def test_the_correction_is_the_mean_of_the_difference():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16)).eval()
    qmodel = fp4fx.quantize(model, ALL)
    batches = [torch.randn(n, 64) + 1 for n in (100, 50, 300)]
    x = torch.cat(batches)
    with torch.no_grad():
        expected = (model(x) - qmodel(x)).mean(0)
    fp4fx.calibrate(qmodel, batches, reference=model, methods=["bias_correction"])
    found = qmodel[0].bias - model[0].bias
    assert (found * expected >= 0).all() and (found.abs() <= expected.abs() + 1e-6).all()
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()  # less its sampling error


def test_noise_is_not_corrected():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16)).eval()
    qmodel = fp4fx.quantize(model, ALL)
    x = torch.randn(64, 64)
    fp4fx.calibrate(qmodel, [torch.cat([x, -x])], reference=model, methods=["bias_correction"])
    assert "no more than it varies" in steps(qmodel)["0.weight"].reason
    assert torch.equal(qmodel[0].bias, model[0].bias)
    qmodel = fp4fx.quantize(model, ALL)
    fp4fx.calibrate(qmodel, [torch.randn(8, 64)], reference=model, methods=["bias_correction"])
    assert "give more data" in steps(qmodel)["0.weight"].reason


def test_attention_and_a_bias_of_two_layers():
    torch.manual_seed(0)
    model = Attention().eval()
    nn.init.normal_(model.embed.bias)
    qmodel = fp4fx.quantize(model, ALL)
    old = model.attention.in_proj_bias.clone()
    fp4fx.calibrate(qmodel, [torch.randn(32, 6, 8) for _ in range(4)], reference=model, methods=["bias_correction"])
    assert steps(qmodel)["attention.in_proj_weight"].changed
    assert not torch.equal(qmodel.attention.in_proj_bias, old) and torch.equal(model.attention.in_proj_bias, old)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    model[1].bias = model[0].bias
    qmodel = fp4fx.quantize(model, ALL)
    fp4fx.calibrate(qmodel, [torch.randn(64, 32) + 1], reference=model, methods=["bias_correction"])
    assert "another layer's too" in steps(qmodel)["0.weight"].reason
    assert qmodel[0].bias is qmodel[1].bias


class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.out = nn.Conv2d(12, 4, 1)

    def forward(self, x, y):
        a, b = F.relu6(self.a(x)), self.b(y)
        return self.out(torch.cat([F.avg_pool2d(a + F.hardswish(b), 2), F.avg_pool2d(F.gelu(b), 2)], dim=1))


def test_moments_of_activations():
    torch.manual_seed(0)
    model = Functions().eval()
    for bn in (model.a, model.b):
        nn.init.uniform_(bn.weight, 0.5, 2)
        nn.init.uniform_(bn.bias, -2, 2)
    _, found = symbolic_graph(model)
    place = next(i for i, s in enumerate(found.sites) if s.parameter == "out.weight")
    expected = []
    model.out.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    with torch.no_grad():
        model(torch.randn(64, 6, 32, 32), torch.randn(64, 6, 32, 32))
    known = moments(found.activations[place])
    torch.testing.assert_close(known.mean, expected[0].mean((0, 2, 3)), atol=0.03, rtol=0.01)


def test_moments_that_are_not_known():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.out = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.out(F.max_pool2d(self.bn(x), 2))

    model = Unknown().eval()
    qmodel = fp4fx.quantize(model, ALL)
    fp4fx.calibrate(qmodel, reference=model, methods=["bias_correction"])
    assert "comes from max_pool2d" in steps(qmodel)["out.weight"].reason
    assert fp4fx.quantize(ConvNet().eval(), ALL)  # a model without such a chain is no error
