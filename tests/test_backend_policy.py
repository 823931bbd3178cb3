"""The backend on a model that was never quantized: `options={"policy": ...}`."""

import importlib

import pytest
import timm
import torch
from torch import nn

import fp4fx
from tests.machine import first_kernel
from tests.models import ConvNet, Tied

ALL = fp4fx.Policy(skip_first=0, skip_last=0, compute="fp32")
W4A4 = fp4fx.Policy.w4a4(skip_first=0, skip_last=0, compute="fp32")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def by_policy(model, policy=ALL, **options):
    return torch.compile(model, backend="fp4fx", options={"policy": policy, **options})


def check(model, policy, *inputs, compiled=None):
    """The compiled model gives what `quantize` gives."""
    compiled = by_policy(model, policy) if compiled is None else compiled
    with torch.no_grad():
        expected = fp4fx.quantize(model, policy)(*inputs)
        torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_it_gives_what_quantize_gives():
    model = ConvNet().eval()
    x = torch.randn(2, 3, 8, 8)
    for policy in (fp4fx.Policy(compute="fp32"), W4A4):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="fp4fx", fullgraph=True, options={"policy": policy})
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), fp4fx.quantize(model, policy)(x), rtol=1e-5, atol=1e-5)


def test_the_report_is_there_too():
    model = ConvNet().eval()
    compiled = torch.compile(model, backend="fp4fx", options={"policy": fp4fx.Policy()})
    with torch.no_grad():
        compiled(torch.randn(2, 3, 8, 8))
    text = str(fp4fx.report(compiled))
    assert "body.weight" in text and "first of 4" in text and f"conv: {first_kernel()}" in text


def test_a_changed_parameter_is_encoded_anew():
    model = nn.Sequential(nn.Linear(32, 8)).eval()
    compiled = torch.compile(model, backend="fp4fx", options={"policy": ALL})
    x = torch.randn(3, 32)
    with torch.no_grad():
        compiled(x)
        model[0].weight.mul_(-3.0)
        torch.testing.assert_close(compiled(x), fp4fx.quantize(model, ALL)(x), rtol=1e-5, atol=1e-5)


def test_a_parameter_is_encoded_once_until_it_changes(monkeypatch):
    fold_weights = importlib.import_module("fp4fx.passes.fold_weights")
    model, x, calls = nn.Sequential(nn.Linear(32, 8)).eval(), torch.randn(3, 32), []
    encode = fold_weights._encode
    monkeypatch.setattr(fold_weights, "_encode", lambda *a, **k: (calls.append(1), encode(*a, **k))[1])
    compiled = by_policy(model)
    with torch.no_grad():
        compiled(x)
        compiled(x)
        assert len(calls) == 1
        model[0].weight.mul_(2)
        compiled(x)
        compiled(x)
        assert len(calls) == 2


def test_trainable_weights_are_fake_quantized_straight_through():
    model = nn.Sequential(nn.Linear(32, 8))
    compiled = torch.compile(model, backend="fp4fx", options={"policy": ALL})
    x = torch.randn(3, 32)
    y = compiled(x)
    torch.testing.assert_close(y, fp4fx.quantize(model, ALL)(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(model[0].weight.grad, x.sum(0).expand(8, 32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("freezing", [False, True])
def test_freezing_keeps_it_packed(freezing):
    model = ConvNet().eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        compiled = torch.compile(model, backend="fp4fx", options={"policy": ALL})
        torch.testing.assert_close(compiled(x), fp4fx.quantize(model, ALL)(x), rtol=1e-5, atol=1e-5)


def test_two_models_of_one_shape_do_not_share_their_codes():
    """Dynamo takes parameters as inputs and does not ask which they are."""
    x = torch.randn(3, 32)
    for _ in range(2):
        check(nn.Sequential(nn.Linear(32, 8)).eval(), ALL, x)


def test_blocks_compiled_one_by_one_keep_their_own_codes():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32)) for _ in range(3)).eval()
    expected = [fp4fx.quantize(block, ALL) for block in blocks]
    x = torch.randn(3, 32)
    for block in blocks:
        block.compile(backend="fp4fx", options={"policy": ALL})
    with torch.no_grad():
        for _ in range(2):
            for block, q in zip(blocks, expected, strict=True):
                torch.testing.assert_close(block(x), q(x), rtol=1e-5, atol=1e-5)


def test_a_replaced_parameter_is_seen():
    model, x = nn.Sequential(nn.Linear(32, 8)).eval(), torch.randn(3, 32)
    compiled = by_policy(model)
    check(model, ALL, x, compiled=compiled)
    model[0].weight = nn.Parameter(5 * torch.randn(8, 32))
    check(model, ALL, x, compiled=compiled)
    model.load_state_dict({k: 3 * v for k, v in model.state_dict().items()}, assign=True)
    check(model, ALL, x, compiled=compiled)
    with torch.inference_mode():
        compiled(x)


def test_a_gradient_survives_a_first_use_without_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x):
            with torch.no_grad():
                a = self.layer(x)
            return self.layer(x + a)

    for policy in (ALL, W4A4):
        torch._dynamo.reset()
        model = Twice()
        by_policy(model, policy)(torch.randn(3, 32)).square().sum().backward()
        assert model.layer.weight.grad is not None and model.layer.weight.grad.abs().sum() > 0


def test_w4a4_trains():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(3, 32)
    y = by_policy(model, W4A4)(x)
    torch.testing.assert_close(y, fp4fx.quantize(model, W4A4)(x), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_names_of_two_models_in_one_function_are_kept_apart():
    a, b = nn.Linear(32, 32).eval(), nn.Linear(32, 32).eval()
    x = torch.randn(3, 32)
    with torch.no_grad():
        found = by_policy(lambda x: b(a(x)))(x)
        torch.testing.assert_close(found, fp4fx.quantize(b, ALL)(fp4fx.quantize(a, ALL)(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", [ALL, W4A4], ids=["w4a16", "w4a4"])
def test_weights_that_are_computed(policy):
    make = (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 16)),
        lambda: timm.layers.StdConv2d(16, 8, 3),
    )
    for build, x in zip(make, (torch.randn(3, 32), torch.randn(2, 16, 6, 6)), strict=True):
        torch._dynamo.reset()
        check(nn.Sequential(build()).eval(), policy, x)


def test_a_view_after_a_convolution():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(16, 8, 3), nn.Linear(8 * 16, 4)

        def forward(self, x):
            y = self.conv(x).relu()
            return self.head(y.view(y.shape[0], -1))

    for policy in (ALL, W4A4):
        torch._dynamo.reset()
        model = Viewing().eval()
        check(model, policy, torch.randn(2, 16, 6, 6))
        torch._dynamo.reset()
        q = fp4fx.quantize(model, policy)
        with torch.no_grad():
            x = torch.randn(2, 16, 6, 6)
            torch.testing.assert_close(torch.compile(q, backend="fp4fx")(x), q(x), rtol=1e-5, atol=1e-5)


def test_a_parameter_written_to_in_the_graph_is_kept_and_says_so():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 8)

        def forward(self, x):
            self.layer.weight.mul_(0.5)
            return self.layer(x)

    model, x = Writing().eval(), torch.randn(3, 32)
    compiled = by_policy(model)
    with torch.no_grad():
        compiled(x)
        torch.testing.assert_close(compiled(x), nn.functional.linear(x, model.layer.weight, model.layer.bias))
    assert "written to" in str(fp4fx.report(model))


def test_what_no_site_eats_is_a_fallback():
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    with (
        torch.no_grad(),
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="_transformer_encoder_layer_fwd"),
    ):
        by_policy(model, on_fallback="raise")(torch.randn(2, 5, 32))


def test_a_quantized_model_needs_no_policy():
    q = fp4fx.quantize(nn.Sequential(nn.Linear(32, 8)), ALL)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="quantized already; compile it without"):
        by_policy(q)(torch.randn(2, 32))


def test_an_embedding_tied_to_its_head():
    check(
        Tied().eval(),
        fp4fx.Policy(embeddings=True, skip_first=0, skip_last=0, compute="fp32"),
        torch.tensor([[1, 2, 39]]),
    )
