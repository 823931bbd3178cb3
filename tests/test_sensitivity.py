import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp4fx
from fp4fx import Policy, nvfp4, sensitivity
from fp4fx.errors import CalibrationError, MissingPackageError, PlanError
from tests.models import Attention, ConvNet, Tied, UNet

ALL = Policy(skip_first=0, skip_last=0)


def rows(found):
    return {row.parameter: row for row in found.rows}


def rounded(weight, order="rows", groups=1, rule="unbiased"):
    """The weight that NVFP4 holds, by the definition of the format."""
    q = nvfp4.quantize(weight.detach(), scale_rule=rule, order=order, groups=groups)
    return nvfp4.dequantize(q, torch.float32)


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make().eval()


def images(batch=4, size=10):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def inputs_of(model, x):
    """What each leaf module is called with."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach().clone()))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_output_sqnr_is_that_of_each_layer_on_its_real_input():
    model, x = seeded(ConvNet), images()
    found = rows(sensitivity(model, [x[:2], x[2:]]))
    seen = inputs_of(model, x)
    for name, groups in (("stem", 1), ("body", 1), ("grouped", 2)):
        layer = getattr(model, name)
        y = layer(seen[name])
        again = F.conv2d(seen[name], rounded(layer.weight, "conv", groups), layer.bias, padding=1, groups=groups)
        assert found[f"{name}.weight"].output_sqnr == pytest.approx(nvfp4.sqnr(y, again), abs=0.02)
    head = F.linear(seen["head"], rounded(model.head.weight), model.head.bias)
    assert found["head.weight"].output_sqnr == pytest.approx(nvfp4.sqnr(model.head(seen["head"]), head), abs=0.02)
    assert found["head.weight"].weight_sqnr == pytest.approx(nvfp4.sqnr(model.head.weight, rounded(model.head.weight)))
    assert {row.inputs for row in found.values()} == {"data"}


def test_a_policy_that_quantizes_activations_adds_their_error():
    model, x = seeded(ConvNet), images()
    policy = Policy.w4a4(skip_first=0, skip_last=0)
    found, seen = rows(sensitivity(model, [x], policy=policy)), inputs_of(model, x)
    x = torch.ops.fp4fx.fake_quantize.default(seen["body"], None, "channels")
    y = F.conv2d(x, rounded(model.body.weight, "conv"), model.body.bias, padding=1)
    assert found["body.weight"].decision == "W4A4"
    assert found["body.weight"].output_sqnr == pytest.approx(nvfp4.sqnr(model.body(seen["body"]), y), abs=0.02)
    weight_only = rows(sensitivity(model, [images()]))
    assert all(found[name].output_sqnr < weight_only[name].output_sqnr - 0.5 for name in found)


class InPlace(nn.Module):
    """Two linears; what the first gives is overwritten."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(32, 48), nn.Linear(48, 4)

    def forward(self, x):
        return self.last(self.first(x).relu_())


@pytest.mark.parametrize("trained", [True, False])
def test_fisher_score_is_gradient_times_change_at_the_output_of_the_op(trained):
    model = seeded(InPlace).requires_grad_(trained)
    x, target = torch.randn(8, 32), torch.randint(4, (8,))
    found = rows(sensitivity(model, [(x, target)], loss=F.cross_entropy))
    y = model.first(x).detach().requires_grad_()
    z = model.last(y.relu())
    g_y, g_z = torch.autograd.grad(F.cross_entropy(z, target), [y, z])
    change_y = x @ (rounded(model.first.weight) - model.first.weight.detach()).T
    change_z = y.detach().relu() @ (rounded(model.last.weight) - model.last.weight.detach()).T
    assert found["first.weight"].fisher == pytest.approx(float((g_y * change_y).square().sum()), rel=1e-4)
    assert found["last.weight"].fisher == pytest.approx(float((g_z * change_z).square().sum()), rel=1e-4)
    assert all(p.grad is None and p.requires_grad == trained for p in model.parameters())


def test_scores_tell_a_layer_that_matters_from_one_that_does_not():
    model = seeded(ConvNet)
    with torch.no_grad():
        model.body.weight.mul_(1e-3)  # what it adds to its input is next to nothing
        model.body.bias.zero_()
    found = rows(sensitivity(model, [(images(), torch.arange(4))], loss=F.cross_entropy))
    assert found["body.weight"].fisher < 1e-3 * min(found[n].fisher for n in ("stem.weight", "head.weight"))
    assert abs(found["body.weight"].output_sqnr - found["stem.weight"].output_sqnr) < 3


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w.to(x), self.bias, self.stride, self.padding)


class Elsewhere(nn.Module):
    """A weight that its parent reads, and one that is standardised on the way."""

    def __init__(self):
        super().__init__()
        self.conv, self.other, self.raw = Standardised(3, 16, 3), nn.Linear(16, 32), nn.Parameter(torch.randn(32, 8))

    def forward(self, x):
        return F.linear(self.conv(x).mean((2, 3)), self.other.weight) @ self.raw


def test_weights_are_followed_wherever_they_go():
    model, x = seeded(Elsewhere), images()
    found = rows(sensitivity(model, [x]))
    assert set(found) == {"conv.weight", "other.weight", "raw"}
    y, w = model.conv(x), rounded(model.conv.weight, "conv")
    w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
    assert found["conv.weight"].output_sqnr == pytest.approx(nvfp4.sqnr(y, F.conv2d(x, w, model.conv.bias)), abs=0.02)
    z = F.linear(y.mean((2, 3)), model.other.weight)
    other = F.linear(y.mean((2, 3)), rounded(model.other.weight))
    assert found["other.weight"].output_sqnr == pytest.approx(nvfp4.sqnr(z, other), abs=0.02)
    raw = z @ rounded(model.raw, "columns")
    assert found["raw"].output_sqnr == pytest.approx(nvfp4.sqnr(z @ model.raw, raw), abs=0.02)


def test_attention_and_tied_tables_are_reached():
    attention = sensitivity(seeded(Attention), [torch.randn(2, 5, 8)])
    assert {r.parameter for r in attention.rows} > {"attention.in_proj_weight", "attention.out_proj.weight"}
    tied = sensitivity(seeded(Tied), [torch.randint(40, (3, 7))])
    assert [r.parameter for r in tied.rows] == ["embed.weight", "body.weight"]
    assert all(15 < r.output_sqnr < 30 for r in (*attention.rows, *tied.rows))


def test_without_data_inputs_have_the_statistics_of_the_norm_ahead():
    """Compared with the layers run on images drawn here."""
    model = seeded(UNet)
    with torch.no_grad():
        for norm in (model.norm, model.norm2):
            norm.weight.copy_(torch.rand(norm.weight.shape) + 0.2)
            norm.bias.normal_()
        model.deep.weight.mul_(torch.logspace(0, 1, 16)[None, :, None, None])  # channels that are not alike
    found = rows(sensitivity(model))
    assert found["down.weight"].inputs == "unit normal"
    assert found["deep.weight"].inputs == "norm, ReLU"
    assert found["up.weight"].inputs == "norm2, ReLU"
    assert found["merge.weight"].inputs == "unit normal"
    x = torch.randn(64, 16, 20, 20, generator=torch.Generator().manual_seed(3))
    x = (x * model.norm.weight[:, None, None] + model.norm.bias[:, None, None]).relu()
    y, again = (F.conv2d(x, w, stride=2) for w in (model.deep.weight, rounded(model.deep.weight, "conv")))
    assert found["deep.weight"].output_sqnr == pytest.approx(nvfp4.sqnr(y, again), abs=0.3)
    plain = torch.randn(64, 16, 20, 20)
    y, again = (F.conv2d(plain, w, stride=2) for w in (model.deep.weight, rounded(model.deep.weight, "conv")))
    assert abs(found["deep.weight"].output_sqnr - nvfp4.sqnr(y, again)) > 0.5  # the statistics do matter here


def test_a_norm_of_other_channels_is_not_taken():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.whole, self.part = nn.LayerNorm(32), nn.Linear(32, 16), nn.Linear(16, 16)

        def forward(self, x):
            x = self.norm(x)
            return self.whole(x), self.part(x.chunk(2, -1)[0])

    found = rows(sensitivity(seeded(Net)))
    assert (found["whole.weight"].inputs, found["part.weight"].inputs) == ("norm", "unit normal")


def test_kurtosis_is_ranked_against_the_errors():
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(*(nn.Linear(64, 64, bias=False) for _ in range(6)))
            for i, layer in enumerate(self):  # ever more of a row's energy in one value, which a block's scale follows
                nn.init.normal_(layer.weight)
                layer.weight.data[:, ::16] *= 1 + i

    found = sensitivity(seeded(Net))
    kurtosis = torch.tensor([r.kurtosis for r in found.rows])
    noise = torch.tensor([-r.weight_sqnr for r in found.rows])
    ranks = torch.stack([kurtosis.argsort().argsort(), noise.argsort().argsort()]).double()
    assert found.correlation["weight"] == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))
    assert "rank correlation of kurtosis" in str(found)
    assert "fisher" not in found.correlation


def test_table_json_and_kept_sites():
    found = sensitivity(seeded(ConvNet), policy=Policy())
    assert found.kept == {"stem.weight": "first of 4", "head.weight": "last of 4"}
    assert "kept: stem.weight: first of 4" in str(found)
    data = json.loads(found.to_json())
    assert [r["parameter"] for r in data["rows"]] == ["body.weight", "grouped.weight"]
    assert data["rows"][0]["fisher"] is None
    exact = nn.Sequential(nn.Linear(32, 16))
    nn.init.constant_(exact[0].weight, 0.5)
    assert json.loads(sensitivity(exact.eval()).to_json())["rows"][0]["weight_sqnr"] == "inf"


def test_plot_is_written_and_needs_matplotlib(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    found = sensitivity(seeded(ConvNet))
    found.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000

    def absent(name):
        raise ModuleNotFoundError(name, name="matplotlib")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingPackageError, match=r"fp4fx\[plots\]"):
        found.plot(tmp_path / "other.png")


def test_a_site_that_the_data_do_not_reach_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.left = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x):
            return self.used(x) if x.sum() < 1e9 else self.left(x)

    found = rows(sensitivity(seeded(Net), [torch.randn(2, 32)]))
    assert (found["left.weight"].output_sqnr, found["left.weight"].inputs) == (None, "not reached by the data")
    assert found["left.weight"].weight_sqnr > 15
    assert found["used.weight"].inputs == "data"


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], ["found none"]),
        (iter([]), ["found none"]),
        (3, ["found one int"]),
        (images(), ["found one Tensor", "list"]),
        ({"x": torch.ones(1)}, ["found one dict"]),
        (["images"], ["batch 0", "str", "does not run"]),
        ([images(), images(size=10)[:, :2]], ["batch 1", "(4, 2, 10, 10)", "does not run"]),
        ([images(), torch.full((1, 3, 8, 8), float("nan"))], ["batch 1", "192 NaN in 192"]),
        ([torch.zeros(0, 3, 8, 8)], ["batch 0", "(0, 3, 8, 8)", "expected values"]),
        ([()], ["batch 0", "does not run"]),
        ([torch.zeros(1, 3, 8, 8, device="meta")], ["on meta", "expected cpu"]),
        ([images().to(torch.float64)], ["batch 0", "does not run"]),
    ],
)
def test_bad_data_is_named(batches, words):
    with pytest.raises(CalibrationError) as error:
        sensitivity(seeded(ConvNet), batches)
    for word in words:
        assert word in str(error.value)


def test_bad_models_losses_and_policies_are_named():
    model, x = seeded(ConvNet), images()
    with pytest.raises(CalibrationError, match=r"call model\.eval\(\)"):
        sensitivity(ConvNet(), [x])
    with pytest.raises(CalibrationError, match="expected pairs"):
        sensitivity(model, loss=F.cross_entropy)
    with pytest.raises(CalibrationError, match="batch 0: found tuple of 1, expected a pair"):
        sensitivity(model, [(x,)], loss=F.cross_entropy)
    with pytest.raises(CalibrationError, match="no gradient"):
        sensitivity(model, [(x, 0)], loss=lambda output, _: output.detach().sum())
    with pytest.raises(CalibrationError, match="the loss gave"):
        sensitivity(model, [(x, 0)], loss=lambda output, _: output.sum() * float("nan"))
    with pytest.raises(PlanError, match="quantizes nothing"):
        sensitivity(model, policy=Policy(weights=None))
    with pytest.raises(PlanError, match="already quantized"):
        sensitivity(fp4fx.quantize(model, ALL))
    broken = seeded(ConvNet)
    broken.head.bias.data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="NaN in the model's output"):
        sensitivity(broken, [x])


def test_keyword_arguments_and_a_generator_do():
    found = sensitivity(seeded(ConvNet), ({"x": images()} for _ in range(2)))
    assert found.to_json() == sensitivity(seeded(ConvNet), [images(), images()]).to_json()
