"""Inputs as rows: their product with the weight's rows is what the op gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp4fx
from fp4fx.calibration.inputs import input_rows, weight_rows
from fp4fx.observe import observe
from tests.models import Attention

ALL = fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0, min_channels=1, depthwise=True)

LAYERS = {
    "conv2d": (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 6, 9, 8)),
    "same": (nn.Conv2d(6, 8, 3, padding="same"), (2, 6, 5, 5)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "conv3d": (nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)), (2, 2, 4, 4, 5)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (2, 6, 5, 4)),
    "transposed grouped": (nn.ConvTranspose2d(6, 9, (2, 3), groups=3, dilation=(2, 1)), (2, 6, 5, 4)),
    "transposed, cropped": (nn.ConvTranspose1d(4, 6, 2, stride=3, padding=2, output_padding=2), (2, 4, 7)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (1, 2, 3, 2, 3)),
    "linear": (nn.Linear(20, 7), (2, 3, 20)),
}


class Products(nn.Module):
    """A right factor, a stack as a whole, one of a stack, a convolution that is run as a linear."""

    def __init__(self):
        super().__init__()
        self.right = nn.Parameter(torch.randn(16, 24))
        self.stack = nn.Parameter(torch.randn(3, 24, 8))
        self.conv = nn.Conv2d(2, 6, 2)

    def forward(self, x):
        x = torch.bmm((x @ self.right).expand(3, -1, -1), self.stack)
        return F.linear(x, self.conv.weight.flatten(1)), x[0] @ self.stack[2].t()


def calls_of(model, x):
    found = []
    with torch.no_grad(), observe(model, [d.site for d in fp4fx.plan(model, ALL, (x,)).decisions], found.append):
        model(x)
    return found


def check(call):
    rows = weight_rows(call).float()
    y = (input_rows(call, 10**9) @ rows.mT).transpose(0, 1).flatten(1)  # [P, N]
    bias = call.again(torch.zeros_like(call.weight))
    expected = call.output - bias
    if call.site.op.startswith("conv"):
        expected = expected.movedim(1, -1)
    elif call.weight.dim() == 3:
        expected = expected.movedim(0, 1)
        y = y.unflatten(1, (len(rows), -1))
    torch.testing.assert_close(y.reshape(expected.shape), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_layers(name):
    layer, shape = LAYERS[name]
    calls = calls_of(nn.Sequential(layer).eval(), torch.randn(shape))
    assert len(calls) == 1
    check(calls[0])


@pytest.mark.parametrize(("model", "shape", "count"), [(Products, (5, 16), 4), (Attention, (2, 6, 8), 4)])
def test_rows_of_products(model, shape, count):
    torch.manual_seed(0)
    calls = calls_of(model().eval(), torch.randn(shape))
    assert len(calls) == count
    for call in calls:
        if call.site.parameter == "stack" and call.weight.dim() == 2:
            continue  # read along its other axis
        check(call)


def test_some_places_are_taken_from_everywhere():
    layer = nn.Conv2d(1, 4, 1, bias=False).eval()
    call = calls_of(nn.Sequential(layer), torch.arange(200.0).view(8, 1, 5, 5))[0]
    some = input_rows(call, 20)
    assert some.shape == (1, 20, 1)
    assert some.flatten().tolist() == list(range(0, 200, 10))
