"""What the ops of a running model read and gave, against what hooks and plain formulas say."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp4fx
from fp4fx.observe import observe
from fp4fx.packed import plan_of
from tests.models import Attention, ConvNet, Tied, UNet

ALL = fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0, min_channels=1, embeddings=True, depthwise=True)


class Odd(nn.Module):
    """A raw product, a layer's weight read by its parent, a weight on the left, a stack, a standardised weight."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 48))
        self.stack = nn.Parameter(torch.randn(4, 32, 32))
        self.other = nn.Linear(48, 32)
        self.conv = nn.Conv1d(32, 16, 3)

    def forward(self, x):
        x = F.linear(x @ self.w, self.other.weight, self.other.bias)
        x = (self.stack[1].t() @ x.transpose(1, 2)).transpose(1, 2)
        x = torch.stack([x[0] @ self.stack[2], torch.mv(self.stack[3].t(), x[1, 0]).expand(x.shape[1:])])
        w = self.conv.weight
        w = (w - w.mean((1, 2), keepdim=True)) / w.std((1, 2), keepdim=True)
        return F.conv1d(x.transpose(1, 2), w, self.conv.bias)


MODELS = {
    "convnet": (ConvNet, (2, 3, 8, 8)),
    "unet": (UNet, (2, 3, 8, 8)),
    "attention": (Attention, (2, 6, 8)),
    "odd": (Odd, (2, 5, 32)),
}


def run(model, sites, x, seen=None):
    calls = []
    with torch.no_grad(), observe(model, sites, seen or calls.append):
        y = model(x)
    return calls, y


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_call_can_be_made_again(name, packed):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    qmodel = fp4fx.quantize(model, ALL, (x,))
    sites = [d.site for d in plan_of(qmodel).decisions if d.site.op != "norm"]
    calls, y = run(qmodel if packed else model, sites, x)
    assert {c.site.parameter for c in calls} == {s.parameter for s in sites}
    with torch.no_grad():
        torch.testing.assert_close(y, (qmodel if packed else model)(x))
    for call in calls:
        torch.testing.assert_close(call.again(call.weight), call.output)
        torch.testing.assert_close(call.again(2 * call.weight, call.x / 2), call.output)
        bias, atol = call.again(0 * call.weight), 1e-5 * float(call.output.abs().max())
        torch.testing.assert_close(bias, call.output - _product(call), atol=atol, rtol=0)


def _product(call):
    """The op without its bias, by its definition."""
    if call.site.op == "linear":
        return torch.einsum("...mk,...nk->...mn", call.x, call.weight)
    a = call.arguments
    op = getattr(F, call.site.op)
    keys = ("stride", "padding", "dilation", "groups") + (("output_padding",) if a["transposed"] else ())
    return op(call.x, call.weight, None, **{k: a[k] for k in keys})


def test_x_and_output_are_those_of_the_layers():
    model, x = ConvNet().eval(), torch.randn(2, 3, 8, 8)
    qmodel = fp4fx.quantize(model, ALL, (x,))
    expected = {}
    for name, module in qmodel.named_modules():
        if hasattr(module, "nvfp4"):
            module.register_forward_hook(lambda m, args, y, name=name: expected.update({name: (args[0], y)}))
    calls, _ = run(qmodel, [d.site for d in plan_of(qmodel).quantized], x)
    assert [c.site.module for c in calls] == list(expected) == ["stem", "body", "grouped", "head"]
    for call in calls:
        assert torch.equal(call.x, expected[call.site.module][0])
        assert torch.equal(call.output, expected[call.site.module][1])
        assert torch.equal(call.weight, qmodel.get_submodule(call.site.module).weight)


def test_activations_are_seen_as_quantized():
    model, x = ConvNet().eval(), torch.randn(2, 3, 8, 8)
    qmodel = fp4fx.quantize(model, fp4fx.Policy(skip_first=0, skip_last=0, activations="nvfp4", min_numel=0), (x,))
    inputs = {}
    qmodel.body.register_forward_pre_hook(lambda m, args: inputs.update(x=args[0]))
    calls, _ = run(qmodel, [plan_of(qmodel).decision_for("body.weight").site], x)
    assert torch.equal(calls[0].x, torch.ops.fp4fx.fake_quantize(inputs["x"], None, "channels"))


def test_rows_of_a_stack_and_the_kind_of_op():
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(2, 5, 32)
    sites = fp4fx.plan(model, ALL, (x,)).decisions
    calls, _ = run(model, [d.site for d in sites], x)
    stack = [c for c in calls if c.site.parameter == "stack"]
    assert [c.start for c in stack] == [32, 64, 96]
    for call in stack:
        assert torch.equal(call.weight, model.stack.mT.reshape(-1, 32)[call.start : call.start + 32])
    tied, i = Tied().eval(), torch.randint(40, (2, 5))
    calls, _ = run(tied, [d.site for d in fp4fx.plan(tied, ALL, (i,)).decisions], i)
    assert [c.site.op for c in calls] == ["embedding", "linear", "linear"]
    assert torch.equal(calls[0].x, i)
    assert calls[0].weight is not None and calls[2].site.parameter == "embed.weight"


def test_an_output_can_be_replaced_and_a_forward_ended():
    model, x = ConvNet().eval(), torch.randn(2, 3, 8, 8)
    site = fp4fx.plan(model, ALL, (x,)).decision_for("head.weight").site
    _, y = run(model, [site], x, lambda call: call.output + 1)
    with torch.no_grad():
        torch.testing.assert_close(y, model(x) + 1)

    class Enough(Exception):
        pass

    def stop(call):
        raise Enough

    body = fp4fx.plan(model, ALL, (x,)).decision_for("body.weight").site
    model.head.register_forward_pre_hook(lambda *_: pytest.fail("the forward went on"))
    with pytest.raises(Enough):
        run(model, [body], x, stop)


def test_what_is_no_weight_is_not_seen():
    class Near(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))
            self.table = nn.Parameter(torch.randn(16, 16))
            self.lin = nn.Linear(16, 16)

        def forward(self, x):
            x = x @ (self.w * x.mean())  # depends on data
            self.table @ self.w  # of constants
            return self.lin(x)

    model, x = Near().eval(), torch.randn(4, 16)
    sites = [d.site for d in fp4fx.plan(model, ALL, (x,)).decisions]
    calls, _ = run(model, sites, x)
    assert [c.site.parameter for c in calls] == ["lin.weight"]
    calls, _ = run(model, [], x)
    assert calls == []


def test_memory_that_is_used_again_is_not_mistaken():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    qmodel = fp4fx.quantize(UNet().eval(), ALL, (x,))
    sites = [d.site for d in plan_of(qmodel).quantized]
    with torch.no_grad():
        for _ in range(20):
            calls, _ = run(qmodel, sites, x)
            assert [c.site.module for c in calls] == ["down", "deep", "up", "merge", "out"]
