"""Convolutions by Triton against the bodies of the ops in fp64."""

import itertools
import math
import sys
import types

import pytest
import torch

from fp4fx import ops
from fp4fx.errors import LayoutError
from fp4fx.kernels.triton import conv as kernels
from fp4fx.kernels.triton.conv_geometry import geometry
from tests.kernels.triton.compiling import compile_variants
from tests.kernels.triton.launches import far_apart

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

CONV = [  # x, weight, stride, padding, dilation, groups
    # whole blocks of channels: tap by tap
    ((2, 32, 5, 5), (36, 32, 3, 3), [1, 1], [1, 1], [1, 1], 1),  # two tiles of everything
    ((1, 48, 7, 6), (17, 48, 3, 2), [2, 1], [2, 0], [2, 1], 1),
    ((2, 96, 4, 3), (36, 32, 2, 2), [1, 1], [0, 1], [1, 1], 3),
    ((1, 64, 3, 3), (5, 64, 2, 3), [1, 1], [0, 1], [1, 1], 1),  # scales four at a time
    ((2, 128, 5, 5), (18, 64, 1, 1), [2, 2], [0, 0], [1, 1], 2),
    ((1, 32, 9), (16, 32, 4), [3], [5], [1], 1),
    ((1, 32, 3, 2, 4), (16, 32, 2, 1, 3), [1, 2, 1], [1, 0, 1], [1, 1, 2], 1),
    # K flat
    ((1, 3, 9, 9), (18, 3, 5, 5), [2, 2], [2, 2], [1, 1], 1),
    ((2, 6, 5, 4), (8, 6, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    ((1, 48, 3, 3), (34, 24, 3, 2), [1, 1], [1, 1], [1, 1], 2),
    ((1, 15, 4, 4), (48, 5, 2, 2), [1, 1], [1, 1], [2, 1], 3),
    ((3, 5, 7), (4, 5, 3), [2], [1], [2], 1),
    ((1, 2, 3, 4, 5), (3, 2, 3, 2, 2), [1, 1, 2], [1, 0, 1], [1, 1, 1], 1),
    ((1, 16, 4, 4), (4, 16, 3, 3), [1, 1], [1, 1], [1, 1], 1),
]
TRANSPOSED = [  # x, weight, stride, padding, output_padding, dilation, groups
    ((1, 32, 2, 3), (32, 18, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1], 1),
    ((2, 64, 2, 2), (64, 17, 3, 2), [2, 3], [1, 0], [1, 2], [1, 1], 2),
    ((1, 64, 4), (64, 18, 8), [4], [2], [0], [1], 1),
    ((1, 32, 4), (32, 20, 3), [4], [0], [0], [3], 1),
    ((1, 32, 4), (32, 5, 5), [6], [1], [3], [4], 1),  # stride and dilation have a common divisor
    ((1, 32, 5, 4), (32, 4, 3, 3), [1, 1], [1, 0], [0, 0], [1, 2], 1),
    ((1, 32, 2, 3, 2), (32, 3, 2, 3, 1), [1, 2, 1], [0, 1, 0], [0, 1, 0], [1, 1, 2], 1),
    ((1, 32, 1, 2), (32, 3, 1, 1), [1, 1], [0, 0], [1, 0], [2, 1], 1),  # an output past every input
    ((1, 5, 4, 4), (5, 7, 3, 2), [3, 1], [0, 0], [2, 0], [2, 2], 1),
    ((1, 12, 3, 3), (12, 18, 3, 3), [2, 2], [1, 1], [1, 1], [1, 1], 2),
    ((2, 3, 4), (3, 4, 4), [2], [3], [0], [1], 1),
    ((1, 4, 2, 2, 3), (4, 3, 2, 2, 3), [2, 1, 2], [0, 0, 1], [0, 0, 0], [1, 1, 1], 1),
]
CASES = [("conv", *case) for case in CONV] + [("conv_transpose", *case) for case in TRANSPOSED]
LIMIT = {torch.float16: 1e-3, torch.float32: 1e-5, torch.bfloat16: 4e-3}


def operands(name, weight, geometry, device):
    """Packed weight and a bias."""
    groups = geometry[-1]
    packed = ops.quantize(torch.randn(weight) / 3, None, name, groups)
    return [p.to(device) for p in packed], torch.randn(packed[0].shape[0], device=device)


def double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() else value


def body(name, x, packed, scale, g, bias, *rest, **epilogue):
    """The op on the same device in fp64."""
    epilogue = {key: double(value) for key, value in epilogue.items()}
    return getattr(ops, name)(double(x), packed, scale, g, double(bias), *rest, **epilogue)


def strides(y):
    """Those that matter."""
    return [s for s, n in zip(y.stride(), y.shape, strict=True) if n > 1] if y.numel() else []


def agree(y, reference, dtype, limit=None):
    assert y.shape == reference.shape and y.dtype == dtype and strides(y) == strides(reference)
    error = (y.double() - reference).norm() / reference.norm()
    assert error < (limit or LIMIT[dtype]), error


def check(name, args, limit=None, parts=None, **epilogue):
    y = getattr(kernels, name)(*args, **epilogue, compute="fp32", parts=parts)
    agree(y, body(name, *args, **epilogue), args[0].dtype, limit)
    return y


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_body_in_fp64(case, device, dtypes):
    name, shape, weight, *geometry = case
    packed, bias = operands(name, weight, geometry, device)
    for dtype in dtypes:
        x = torch.randn(shape, device=device).to(dtype)
        if len(shape) in LAST:
            x = x.to(memory_format=LAST[len(shape)])
        check(name, (x, *packed, bias, shape[1], weight[2:], *geometry), parts=2 if dtype == torch.float16 else 1)


PACKED = [
    ("conv", *CONV[2]),
    ("conv", *CONV[3]),
    ("conv", (1, 12, 3, 4), (8, 12, 3, 3), [1, 1], [1, 1], [1, 1], 1),  # K flat
    ("conv", (2, 15, 5), (48, 5, 3), [2], [1], [2], 3),
    ("conv_transpose", *TRANSPOSED[2]),
    ("conv_transpose", (1, 10, 2, 3), (10, 3, 3, 2), [2, 1], [1, 0], [1, 0], [1, 1], 2),
]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_a_packed_activation(case, device, dtypes):
    name, shape, weight, *geometry = case
    packed, bias = operands(name, weight, geometry, device)
    x, x_scale, x_g = (q.to(device) for q in ops.quantize(torch.randn(shape) * 5, None, "channels"))
    args = (*packed, bias, shape[1], weight[2:], *geometry, x_scale, x_g)
    reference = body(name, x, *args, torch.float64)
    for dtype, parts in zip(dtypes, (1, 3, 1), strict=False):
        agree(getattr(kernels, name)(x, *args, dtype, parts=parts), reference, dtype)


@pytest.mark.parametrize("case", [("conv", *CONV[5]), ("conv", *CONV[8]), ("conv_transpose", *TRANSPOSED[2])], ids=str)
def test_epilogues(case, device, dtypes):
    name, shape, weight, *geometry = case
    packed, bias = operands(name, weight, geometry, device)
    for dtype, parts in itertools.product(dtypes, (1, 2)):
        x = torch.randn(shape, device=device).to(dtype)
        if len(shape) == 4:
            x = x.to(memory_format=torch.channels_last)
        args = (x, *packed, bias.to(dtype), shape[1], weight[2:], *geometry)
        y = check(name, args, parts=parts, activation="relu")
        residual = torch.randn(y.shape, device=device).to(dtype)  # of other strides than y
        scale = torch.rand(bias.shape, device=device) + 0.5
        check(name, args, parts=parts, channel_scale=scale, residual=residual, activation="silu")
        args = (x, *packed, None, *args[5:])
        check(name, args, parts=parts, residual=residual, activation="hardswish")


def test_x_of_any_strides(device):
    for weight, dtype in (
        ((16, 32, 2, 3), torch.float16),
        ((16, 6, 2, 3), torch.float16),
        ((16, 6, 2, 3), torch.float32),
    ):
        c = weight[1]
        packed, bias = operands("conv", weight, (1,), device)
        whole = torch.randn(2, 4, 5, c + 8, device=device).to(dtype).movedim(-1, 1)
        for x in (
            whole[:, :c],  # pixels apart
            whole[:, 1 : c + 1],  # and not aligned
            whole[:, :c, ::2, 1:4],
            whole[:, :c].contiguous(),
            whole[:1, :c].expand(2, c, 4, 5),
            whole[:, :c].transpose(2, 3),
            whole[:, : 2 * c : 2] if c == 6 else whole[:, :c].flip(1),
            torch.randn(1 + 20 * c, device=device).to(dtype)[1:].view(1, 4, 5, c).movedim(-1, 1),
        ):
            args = (x, *packed, bias, c, (2, 3), [1, 1], [0, 1], [1, 1], 1)
            y = kernels.conv(*args, compute="fp32")
            expected = ops.conv(*args)  # not in fp64: a conversion of x changes its strides
            assert strides(y) == strides(expected)
            assert (y.double() - body("conv", *args)).norm() < LIMIT[dtype] * y.double().norm()


@pytest.mark.parametrize("c", [32, 6])
def test_pixels_further_apart_than_32_bits(c, device, tmp_path):
    if device == "cuda":
        pytest.skip("its values are in a file")
    packed, bias = operands("conv", (4, c, 3), (1,), device)
    for stride in (2**30 + 1, 2**29 - 1):  # too far for one output, and near enough
        x = far_apart(tmp_path, (1, c, 5), (1, 1, stride), torch.float16)
        check("conv", (x, *packed, bias, c, (3,), [1], [0], [1], 1))
    huge = torch.empty((1, 2, 2, 2**29, 4), device="meta")
    with pytest.raises(LayoutError, match="away from another"):
        geometry((2, 2, 2**29), (2, 2, 1), (1,) * 3, (0,) * 3, (1,) * 3).near(huge)


def test_nothing_and_one_of_everything(device):
    packed, bias = operands("conv", (1, 32, 3, 3), (1,), device)
    geometry = (32, (3, 3), [1, 1], [1, 1], [1, 1], 1)
    y = kernels.conv(torch.randn(0, 32, 4, 5, device=device), *packed, bias, *geometry)
    assert y.shape == (0, 1, 4, 5)
    check("conv", (torch.randn(1, 32, 1, 1, device=device), *packed, bias, *geometry))
    packed, _ = operands("conv", (2, 1, 2, 2), (1,), device)
    check("conv", (torch.randn(3, 1, 4, 4, device=device), *packed, None, 1, (2, 2), [1, 1], [0, 0], [1, 1], 1))


@pytest.mark.parametrize("c", [32, 6])
def test_what_is_not_a_number_stays_where_it_is_read(c, device):
    packed, bias = operands("conv", (16, c, 3, 3), (1,), device)
    x = torch.randn(1, c, 6, 6, device=device).to(memory_format=torch.channels_last)
    x[0, 1, 1, 1] = float("nan")
    y = kernels.conv(x, *packed, bias, c, (3, 3), [1, 1], [1, 1], [1, 1], 1)
    expected = torch.zeros(6, 6, dtype=torch.bool, device=device)
    expected[:3, :3] = True
    assert torch.equal(y[0].isnan().all(0), expected) and torch.equal(y[0].isnan().any(0), expected)


def test_the_result_is_the_same_every_time_whatever_was_in_memory(device):
    packed, bias = operands("conv", (16, 96, 3, 3), (1,), device)
    x = torch.randn(1, 96, 3, 3, device=device)
    args = (x, *packed, bias, 96, (3, 3), [1, 1], [1, 1], [1, 1], 1)
    first = kernels.conv(*args, compute="fp32", parts=16)  # more than there is work for
    poison = torch.full((16 * first.numel(),), math.nan, device=device)
    del poison
    assert torch.equal(kernels.conv(*args, compute="fp32", parts=16), first)
    agree(first, body("conv", *args), torch.float32)


def test_every_pixel_by_itself_is_a_linear(monkeypatch, device):
    seen = []

    def linear(x, *args, family):
        assert family is None  # that of the device
        seen.append(x)
        return ops.linear(x, *args)

    monkeypatch.setitem(sys.modules, "fp4fx.kernels.triton.linear", types.SimpleNamespace(linear=linear))
    packed, bias = operands("conv", (18, 40, 1, 1), (1,), device)
    geometry = (40, (1, 1), [1, 1], [0, 0], [1, 1], 1)
    x = torch.randn(2, 40, 3, 4, device=device)
    epilogue = {"channel_scale": torch.rand(18, device=device), "residual": torch.randn(2, 18, 3, 4, device=device)}
    check("conv", (x, *packed, bias, *geometry), **epilogue)  # contiguous: its result is, too
    assert not seen
    check("conv", (x.to(memory_format=torch.channels_last), *packed, bias, *geometry), **epilogue, activation="gelu")
    assert seen[-1].is_contiguous()
    check("conv", (x[:, :, :1, :1].contiguous(), *packed, bias, *geometry))
    q = [p.to(device) for p in ops.quantize(x, None, "channels")]
    args = (*packed, bias, *geometry, *q[1:])
    agree(kernels.conv(q[0], *args, torch.float32), body("conv", q[0], *args, torch.float64), torch.float32)
    assert len(seen) == 3
    check("conv", (x, *operands("conv", (36, 20, 1, 1), (2,), device)[0], None, *geometry[:-1], 2))
    assert len(seen) == 3


def test_a_phase_lists_every_tap_once():
    """The taps of all phases are those of the kernel, by the definition of a transposed convolution."""
    for kernel, stride, padding, dilation in itertools.product((1, 3, 5), (1, 2, 4, 6), (0, 1), (1, 2, 3, 4)):
        if dilation * (kernel - 1) < 2 * padding:
            continue
        g = geometry((7,), (kernel,), (stride,), (padding,), (dilation,), (0,))
        common, inverse = g.common[2], g.inverse[2]
        for phase in range(g.phases[2]):
            reach, step = phase + padding, stride // common
            first = reach // common * inverse % step
            found = range(first, kernel, step) if reach % common == 0 else range(0)
            assert list(found) == [t for t in range(kernel) if (reach - t * dilation) % stride == 0]


def test_it_compiles_ahead_of_time():
    compile_variants("conv", ["3x3, bfloat16, 64x64x64, sm_90", "7x7 by 2 of 3 channels, bfloat16, 64x64x32, sm_90"])


def test_refusals(device):
    assert kernels.refuse(1, 3, (0, 1)) is None and kernels.refuse(4, 64, ()) is None
    assert "64 groups of 1 results" in kernels.refuse(64, 64, (1, 1))
    assert "negative padding (-1, 0)" in kernels.refuse(1, 64, [-1, 0])
    packed, bias = operands("conv", (6, 8, 3, 3), (1,), device)
    image = torch.randn(1, 8, 5, 5, device=device)

    def convolve(x=image, channels=8, stride=(1, 1), padding=(1, 1), groups=1, kernel=(3, 3), bias=bias, **rest):
        return kernels.conv(x, *packed, bias, channels, kernel, stride, padding, [1, 1], groups, **rest)

    for arguments, message in (
        ({"padding": (-1, 0)}, "padding not negative"),
        ({"x": image[..., :2], "padding": (0, 0)}, "does not fit into x"),
        ({"stride": (0, 1)}, "must be positive"),
        ({"channels": 9}, "K=81"),
        ({"groups": 3}, "do not form 3 groups"),
        ({"x": image[0]}, "one to three spatial axes"),
        ({"stride": (1,)}, "one to three spatial axes"),
        ({"x": image.double()}, "found torch.float64"),
        ({"bias": bias[:5]}, "bias must have 6 values"),
        ({"activation": "tanh"}, "found 'tanh'"),
        ({"residual": torch.randn(1, 6, 5, 4, device=device)}, r"residual: found \[1, 6, 5, 4\]"),
    ):
        with pytest.raises((LayoutError, RuntimeError), match=message):
            convolve(**arguments)
