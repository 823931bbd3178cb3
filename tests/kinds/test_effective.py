"""Weights computed from parameters alone: in evaluation what they come to is packed, and the computation is gone."""

import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fp4fx
from fp4fx.plan import Plan
from fp4fx.quantize import apply
from tests.kinds.reference import EVERY, check_compiled, packed_names, rounded

X = torch.randn(3, 32)


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).t()


class Noisy(nn.Module):
    def forward(self, w):
        return w + torch.rand_like(w)


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(32, 4)), nn.Parameter(torch.randn(4, 32))

    def forward(self, w):
        return w + self.a @ self.b


def parametrized(kind):
    layer = nn.Linear(32, 32)
    parametrize.register_parametrization(layer, "weight", kind())
    return layer


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(32, 32))


COMPUTED = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(32, 32)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(32, 32)),
    "symmetric": lambda: parametrized(Symmetric),
    "low rank": lambda: parametrized(LowRank),
    "weight norm by a hook": old_weight_norm,
    "spectral norm by a hook": lambda: torch.nn.utils.spectral_norm(nn.Linear(32, 32)),
}


def computed(name):
    torch.manual_seed(0)
    model = nn.Sequential(COMPUTED[name]())
    model.train()(X)  # spectral norm estimates
    return model.eval()


@pytest.mark.parametrize("name", COMPUTED)
def test_the_weight_that_comes_out_is_packed(name, tmp_path):
    model = computed(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        dense = model(X)
        weight = rounded(model[0].weight, 1)
    plan = fp4fx.plan(model, EVERY)
    (decision,) = plan.decisions
    assert (decision.site.parameter, decision.label, decision.site.transform) == ("0.weight", "W4A16 in fp32", None)
    named = {decision.site.parameter, *(n.name for n in plan.unreached)}
    assert {n for n, p in model.named_parameters() if p.dim() > 1} <= named
    assert all(n.reason == "computed once into 0.weight" for n in plan.unreached)
    quantized = fp4fx.quantize(model, fp4fx.Policy.from_dict({**EVERY.to_dict(), "on_fallback": "raise"}))
    assert packed_names(quantized) == ["0.weight"]
    assert isinstance(quantized[0], nn.Linear)
    with torch.no_grad():
        expected = F.linear(X, weight, model[0].bias)
        assert torch.equal(quantized(X), expected)
        assert torch.equal(model(X), dense)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    check_compiled(quantized, X, fullgraph=True)
    fp4fx.save(quantized, tmp_path / "it.safetensors")
    torch.manual_seed(1)
    again = fp4fx.load(nn.Sequential(COMPUTED[name]()).eval(), tmp_path / "it.safetensors")
    clone = pickle.loads(pickle.dumps(quantized))
    with torch.no_grad():
        assert torch.equal(again(X), expected)
        assert torch.equal(clone(X), expected)


@pytest.mark.parametrize("name", COMPUTED)
def test_a_dense_model_compiled_by_a_policy_does_the_same(name):
    model = computed(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fp4fx", options={"policy": EVERY})
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), fp4fx.quantize(model, EVERY)(X), rtol=1e-4, atol=1e-4)
        (row,) = fp4fx.report(model).rows
        assert [kernel.partition(":")[0] for kernel in row.kernels] == ["linear"]
        model[0].get_parameter(row.parameter.removeprefix("0.")).mul_(-3)
        torch.testing.assert_close(compiled(X), fp4fx.quantize(model, EVERY)(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["weight norm", "spectral norm by a hook"])
def test_in_training_the_parameter_is_packed_and_the_computation_stays(name):
    model = nn.Sequential(COMPUTED[name]()).train()
    (decision,) = fp4fx.plan(model, EVERY).decisions
    assert decision.site.transform is not None
    assert decision.site.parameter != "0.weight"


def test_a_weight_that_changes_from_call_to_call_or_is_shared_stays_computed():
    noisy = nn.Sequential(parametrized(Noisy)).eval()
    (decision,) = fp4fx.plan(noisy, EVERY).decisions
    assert decision.site.transform is not None
    shared = nn.Sequential(parametrized(Symmetric), nn.Linear(32, 32)).eval()
    shared[1].weight = shared[0].parametrizations.weight.original
    assert "0.weight" not in {d.site.parameter for d in fp4fx.plan(shared, EVERY).decisions}


def test_a_computed_weight_that_is_kept_stays_computed():
    model = nn.Sequential(computed("weight norm")[0], nn.Linear(32, 8)).eval()
    quantized = fp4fx.quantize(model, fp4fx.Policy(skip_first=1, skip_last=0))
    assert parametrize.is_parametrized(quantized[0])
    assert [row.decision for row in fp4fx.report(quantized).rows] == ["kept", "W4A16"]


def test_a_plan_of_before_packs_the_parameter():
    model = computed("weight norm").train()
    plan = Plan.from_dict(fp4fx.plan(model, EVERY).to_dict())
    quantized = apply(model.eval(), plan)
    assert packed_names(quantized) == ["0.parametrizations.weight.original1"]
    assert quantized(X).isfinite().all()


def test_a_standardised_weight_keeps_its_zero_mean():
    torch.manual_seed(0)
    model = timm.create_model("nf_resnet26", num_classes=4).eval()
    plan = fp4fx.plan(model)
    convolutions = [d.site for d in plan.quantized if d.site.op == "conv2d"]
    assert len(convolutions) > 25
    assert {site.transform for site in convolutions} == {"batch_norm"}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(images), fp4fx.quantize(model)(images)
    assert (found - expected).norm() < 0.4 * expected.norm()
