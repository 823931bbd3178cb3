"""The ops `fp4fx_cpu::*` at every tier: against the bodies in fp64, and what they refuse."""

import itertools
import threading

import pytest
import torch
from torch.library import opcheck

from fp4fx import nvfp4, ops
from fp4fx.kernels import encoding

ACTIVATIONS = ("relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "hardsigmoid", "sigmoid")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

LINEAR = [  # m, k, n
    *[(1, 1, 1), (1, 15, 3), (1, 40, 7), (1, 256, 96), (2, 17, 1), (3, 16, 33), (4, 130, 64), (7, 64, 5)],
    *[(1, 400, 18), (2, 600, 9), (3, 272, 6), (13, 530, 18)],
    *[(16, 200, 50), (17, 48, 130), (33, 72, 17), (70, 31, 40), (130, 320, 66)],
]
CONV = [  # x, weight, stride, padding, dilation, groups
    ((2, 6, 20), (8, 6, 3), [1], [1], [1], 1),
    ((2, 8, 9), (4, 4, 4), [3], [2], [2], 2),
    ((2, 8, 9, 11), (12, 8, 3, 3), [2, 2], [1, 1], [1, 1], 1),
    ((2, 8, 9, 9), (12, 4, 3, 3), [1, 1], [2, 2], [2, 2], 2),
    ((1, 3, 8, 8), (5, 3, 1, 1), [1, 1], [0, 0], [1, 1], 1),
    ((3, 32, 7, 5), (17, 32, 1, 1), [2, 1], [0, 0], [1, 1], 1),
    ((1, 2, 9, 9), (3, 2, 2, 2), [4, 3], [0, 0], [1, 1], 1),
    ((1, 16, 6, 6), (16, 1, 3, 3), [1, 1], [1, 1], [1, 1], 16),
    ((2, 48, 5, 5), (40, 48, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    ((1, 3, 12, 12), (8, 3, 7, 7), [2, 2], [3, 3], [1, 1], 1),
    ((1, 4, 5, 6, 7), (6, 4, 2, 3, 2), [1, 2, 1], [0, 1, 0], [1, 1, 1], 1),
]
TRANSPOSED = [  # x, weight, stride, padding, output_padding, dilation, groups
    ((2, 8, 5), (8, 6, 3), [2], [1], [1], [1], 1),
    ((2, 8, 5, 5), (8, 3, 3, 3), [2, 2], [1, 1], [1, 1], [1, 1], 2),
    ((1, 16, 4, 6), (16, 8, 2, 2), [2, 2], [0, 0], [0, 0], [1, 1], 1),
    ((1, 5, 4, 4), (5, 7, 3, 2), [3, 1], [0, 0], [2, 0], [2, 2], 1),
    ((1, 8, 3, 4, 3), (8, 3, 2, 3, 3), [1, 2, 3], [0, 1, 1], [0, 1, 0], [1, 1, 1], 2),
]


def packed(shape, order="rows", groups=1):
    return ops.quantize(torch.randn(shape) / 3, None, order, groups)


def limit(dtype, compute):
    """Largest relative error: of the operands, and of one rounding of the result."""
    operands = {"bf16": 4e-3, "fp32": 1e-5, "int8": 2e-2}[compute]
    return operands + {torch.float32: 0, torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]


def error(y, reference):
    return ((y.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def strides(y):
    """Those that matter."""
    return [s for s, n in zip(y.stride(), y.shape, strict=True) if n > 1] if y.numel() else []


def double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() else value


def check(name, tier, args, compute="bf16", dtype=None, **epilogue):
    """One call against the body of the op, which gets x and the epilogue in fp64 and answers in it."""
    y = getattr(torch.ops.fp4fx_cpu, name)(*args, **epilogue, dtype=dtype, compute=compute, tier=tier)
    x, packed, scale, global_scale, bias, *rest = args
    reference = getattr(ops, name)(
        double(x), packed, scale, global_scale, double(bias), *rest, **{k: double(v) for k, v in epilogue.items()}
    )
    dtype = dtype or x.dtype
    assert y.shape == reference.shape and y.dtype == dtype
    assert strides(y) == strides(reference)
    assert y.numel() == 0 or error(y, reference) < limit(dtype, compute), (name, tier, x.shape, epilogue.keys())


@pytest.mark.parametrize("compute", ["bf16", "fp32", "int8"])
def test_linear_is_the_body_in_fp64(tier, compute):
    for (m, k, n), dtype in itertools.product(LINEAR, DTYPES):
        if compute == "fp32" and dtype != torch.float32:
            continue
        check("linear", tier, (torch.randn(m, k).to(dtype), *packed((n, k)), torch.randn(n), k), compute)


def test_linear_takes_any_strides_and_leading_axes(tier):
    w = packed((9, 40))
    whole = torch.randn(6, 4, 100)
    for x in (
        whole[0, 0, 3:43],
        whole[..., 5:45],  # rows apart, one stride
        whole[:, 1:3, 7:47],  # two strides
        whole[::2, :, :80:2],
        whole.transpose(0, 1)[..., :40],
        whole[:1, :1, :40].expand(3, 2, 40),
        torch.randn(40, 5).t(),
        torch.randn(2, 0, 40),
        torch.randn(0, 40),
        torch.randn(1, 3, 1, 40),
    ):
        check("linear", tier, (x, *w, None, 40))
    misaligned = torch.randn(3 * 40 + 1)[1:].view(3, 40)
    check("linear", tier, (misaligned, *w, torch.randn(10)[1:].bfloat16(), 40))
    shifted = [torch.cat([p.flatten()[:1], p.flatten()])[1:].view(p.shape) for p in w[:2]]
    check("linear", tier, (misaligned, *shifted, w[2], None, 40))
    apart = [torch.stack([p, p], 1)[:, 0] for p in w[:2]]
    check("linear", tier, (misaligned, *apart, w[2], None, 40))


@pytest.mark.parametrize(
    ("rule", "compute"),
    [("max", "bf16"), ("max", "fp32"), ("max", "int8"), ("four_over_six", "fp32"), ("search", "bf16")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_quantizes_x_as_quantize_does(cpu_ops, tier, dtype, rule, compute):
    """The same bits by one op as by two, the encoding by the definition in Python."""
    for m, k, n in LINEAR:
        w, bias = packed((n, k)), torch.randn(n)
        x = torch.randn(m, 2 * k)[:, :k] * 10.0 ** torch.randint(-6, 4, (m, 1))
        x[x.abs() < 1e-7] = -0.0
        ruined = x.clone()
        ruined[0, 0], ruined[-1, -1] = float("nan"), float("-inf")
        for values, g in itertools.product((x.to(dtype), ruined.to(dtype)), (None, torch.tensor(0.37))):
            codes, scales, used = nvfp4.quantize_rows(values, g, scale_rule=rule)
            two = cpu_ops.linear(codes, *w, bias, k, scales, used, dtype, compute=compute, tier=tier)
            one = cpu_ops.linear(values, *w, bias, k, None, g, compute=compute, quantize_x=rule, tier=tier)
            assert one.dtype == dtype and torch.equal(one.nan_to_num(1e9), two.nan_to_num(1e9)), (m, k, n, g)
    assert not torch.equal(one, cpu_ops.linear(values, *w, bias, k, compute=compute, tier=tier))


def test_what_quantizes_x_refuses(cpu_ops):
    x, w = torch.randn(3, 40), packed((5, 40))
    with pytest.raises(RuntimeError, match="quantize_x is for an x of values, found codes"):
        codes, scales, g = ops.quantize(x)
        cpu_ops.linear(codes, *w, None, 40, scales, g, x.dtype, quantize_x="max")
    with pytest.raises(ValueError, match="x_global_scale must be positive, is 0"):
        cpu_ops.linear(x, *w, None, 40, None, torch.tensor(0.0), quantize_x="max")
    with pytest.raises(ValueError, match="unknown scale rule 'min'"):
        cpu_ops.linear(x, *w, None, 40, quantize_x="min")
    opcheck(cpu_ops.linear.default, (x, *w, None, 40), {"quantize_x": "four_over_six"})


@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues(tier, dtype):
    for m, activation in itertools.product((1, 5, 40), ("none", *ACTIVATIONS)):
        x, w, scale, residual = torch.randn(m, 48).to(dtype), packed((37, 48)), torch.rand(37) + 0.5, torch.randn(m, 37)
        args = (x, *w, torch.randn(37), 48)
        check("linear", tier, args, activation=activation)
        given = {"channel_scale": scale.to(dtype), "residual": residual.to(dtype)}
        check("linear", tier, args, **given, activation=activation)
    for shape, weight, *geometry in CONV:
        x = torch.randn(shape).to(dtype)
        args = (x, *packed(weight, "conv", geometry[-1]), torch.randn(weight[0]), shape[1], weight[2:], *geometry)
        out = ops.conv(*args).shape
        given = {"channel_scale": torch.rand(weight[0]) + 0.5, "residual": torch.randn(out).to(dtype)}
        check("conv", tier, args, **given, activation="silu")
    x, w = torch.randn(2, 8, 5, 5).to(dtype), packed((8, 6, 2, 2), "conv_transpose")
    args = (x, *w, torch.randn(6), 8, (2, 2), [2, 2], [0, 0], [0, 0], [1, 1], 1)
    check("conv_transpose", tier, args, residual=torch.randn(2, 6, 10, 10).to(dtype), activation="relu")


@pytest.mark.parametrize(("dtype", "result"), itertools.permutations(DTYPES, 2), ids=str)
def test_x_and_y_may_differ_in_dtype(tier, dtype, result):
    """At every way through a kernel: few rows and many, tails, x read in place or brought to operands."""
    for m, k, n in LINEAR:
        x, given = torch.randn(m, k).to(dtype), {"residual": torch.randn(m, n).to(result), "activation": "silu"}
        for compute in ("bf16", "fp32", "int8"):
            check("linear", tier, (x, *packed((n, k)), torch.randn(n), k), compute, result, **given)
    for shape, weight, *geometry in CONV:
        args = (*packed(weight, "conv", geometry[-1]), torch.randn(weight[0]), shape[1], weight[2:], *geometry)
        x = torch.randn(shape).to(dtype)
        given = {"residual": torch.randn(ops.conv(x, *args).shape).to(result), "activation": "relu"}
        for compute in ("bf16", "fp32"):
            check("conv", tier, (x, *args), compute, result, **given)
        if x.dim() in LAST:
            check("conv", tier, (x.to(memory_format=LAST[x.dim()]), *args), "bf16", result, **given)
    for shape, weight, *geometry in TRANSPOSED:
        w, bias = packed(weight, "conv_transpose", geometry[-1]), torch.randn(weight[1] * geometry[-1])
        x = torch.randn(shape).to(dtype)
        check("conv_transpose", tier, (x, *w, bias, shape[1], weight[2:], *geometry), "bf16", result)


@pytest.mark.parametrize("case", CONV, ids=str)
def test_conv_is_the_body_in_fp64(tier, case):
    shape, weight, *geometry = case
    w, bias = packed(weight, "conv", geometry[-1]), torch.randn(weight[0])
    for dtype, compute in (
        (torch.float32, "bf16"),
        (torch.float32, "fp32"),
        (torch.bfloat16, "bf16"),
        (torch.float16, "int8"),
    ):
        x = torch.randn(shape).to(dtype)
        args = (*w, bias, shape[1], weight[2:], *geometry)
        check("conv", tier, (x, *args), compute)
        check("conv", tier, (x[:0], *args), compute)
        if x.dim() in LAST:
            check("conv", tier, (x.to(memory_format=LAST[x.dim()]), *args), compute)
        wider = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., 1:-2]
        check("conv", tier, (wider, *args), compute)


@pytest.mark.parametrize("case", TRANSPOSED, ids=str)
def test_conv_transpose_is_the_body_in_fp64(tier, case):
    shape, weight, *geometry = case
    w = packed(weight, "conv_transpose", geometry[-1])
    bias = torch.randn(weight[1] * geometry[-1])
    for dtype, compute in (
        (torch.float32, "bf16"),
        (torch.float32, "fp32"),
        (torch.float16, "bf16"),
        (torch.bfloat16, "int8"),
    ):
        x = torch.randn(shape).to(dtype)
        args = (*w, bias, shape[1], weight[2:], *geometry)
        check("conv_transpose", tier, (x, *args), compute)
        if x.dim() in LAST:
            check("conv_transpose", tier, (x.to(memory_format=LAST[x.dim()]), *args), compute)


def test_a_packed_activation(tier):
    for m, k, n in LINEAR:
        x, scale, g = ops.quantize(torch.randn(m, k))
        w = packed((n, k))
        y = torch.ops.fp4fx_cpu.linear(x, *w, None, k, scale, g, torch.float32, compute="fp32", tier=tier)
        assert error(y, ops.linear(x, *w, None, k, scale, g, torch.float64)) < limit(torch.float32, "fp32")
        y = torch.ops.fp4fx_cpu.linear(x, *w, None, k, scale, g, torch.bfloat16, tier=tier)
        assert error(y, ops.linear(x, *w, None, k, scale, g, torch.float64)) < limit(torch.bfloat16, "bf16")
    for shape, weight, *geometry in CONV:
        x, scale, g = ops.quantize(torch.randn(shape), None, "channels")
        args = (*packed(weight, "conv", geometry[-1]), None, shape[1], weight[2:], *geometry, scale, g)
        y = torch.ops.fp4fx_cpu.conv(x, *args, torch.float32, tier=tier)
        reference = ops.conv(x, *args, torch.float64)
        assert strides(y) == strides(reference) and error(y, reference) < limit(torch.float32, "bf16")


# --- int8 ------------------------------------------------------------------------------------------------------------

INT8 = ("amx", "avx512_bf16", "amx_emulated")
"""The tiers that multiply integers whatever the number of rows; the others compute more than 16 in fp32."""


def int8_linear(x, packed, scale, g):
    """What compute="int8" says of more than 16 rows: every row of x to int8, W to int8 in slices of 4096 values."""
    codes, blocks = nvfp4.decode_e2m1(nvfp4.unpack(packed)) * 2, nvfp4.decode_e4m3(scale)
    to_int = torch.where(x.abs().amax(1, keepdim=True) > 0, 127 / x.abs().amax(1, keepdim=True), 0)
    xq, y = (x.double() * to_int.double()).round(), torch.zeros(x.shape[0], packed.shape[0], dtype=torch.float64)
    for k in range(0, x.shape[1], 4096):
        c, s = codes[:, k : k + 4096], blocks[:, k // 16 : (k + 4096) // 16]
        most = s.amax(1, keepdim=True)
        fraction = (s * torch.where(most > 0, 32767 / most, 0)).round().long().repeat_interleave(16, 1)
        w = (((c.long() * 2687 * fraction + 2**14) >> 15) + 128) >> 8
        w = w[:, : x.shape[1] - k].double() * (most / 21 * 32768 / 32767)
        y += xq[:, k : k + 4096] @ w.T
    return y * x.abs().amax(1, keepdim=True).double() / 127 * g.double()


@pytest.mark.parametrize(("m", "k", "n"), [(17, 48, 20), (33, 4096 + 80, 70), (64, 250, 16)])
def test_int8_products_are_those_of_the_rounded_operands(tier, m, k, n):
    if tier not in INT8:
        pytest.skip("no integer products")
    x = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]
    x[1] = 0
    w = list(packed((n, k)))
    w[1] = w[1].clone()
    w[1][3] = 0
    y = torch.ops.fp4fx_cpu.linear(x, *w, None, k, compute="int8", tier=tier)
    expected = int8_linear(x, *w)
    assert (y[1] == 0).all() and (y[:, 3] == 0).all()
    assert all(error(a, b) < 1e-6 for i, (a, b) in enumerate(zip(y, expected, strict=True)) if i != 1)
    same = torch.ops.fp4fx_cpu.conv(  # rows as pixels
        x.T.reshape(1, k, 1, m), *w, None, k, (1, 1), [1, 1], [0, 0], [1, 1], 1, compute="int8", tier=tier
    )
    assert torch.equal(same[0, :, 0].T, y)


def test_int8_rounds_weights_to_no_side(tier):
    """Which would add up over an input of one sign, as behind a ReLU."""
    if tier not in INT8:
        pytest.skip("no integer products")
    x, w = torch.rand(64, 4096), packed((256, 4096))
    args = (x, *w, None, 4096)
    y = torch.ops.fp4fx_cpu.linear(*args, compute="int8", tier=tier)
    excess = y - ops.linear(*args)
    assert excess.mean().abs() < 4 * excess.mean(0).std() / 16
    assert error(y, ops.linear(x.double(), *args[1:])) < 0.015


def test_int8_of_an_infinity_is_nan_in_its_row_or_image_only(tier):
    if tier == "portable":
        pytest.skip("no integer products")
    for rows in (1, 5, 10, 20) if tier in INT8 else (1, 5, 10):
        x = torch.randn(rows, 32)
        x[rows // 2, 5] = float("inf")
        y = torch.ops.fp4fx_cpu.linear(x, *packed((7, 32)), None, 32, compute="int8", tier=tier)
        wrong = y.isnan()
        assert torch.equal(wrong.all(1), torch.arange(rows) == rows // 2) and torch.equal(wrong.any(1), wrong.all(1))
    if tier not in INT8:
        return
    images = torch.randn(3, 16, 6, 6)
    images[1, 2, 3, 4] = float("nan")
    geometry = (16, (3, 3), [1, 1], [1, 1], [1, 1], 1)
    y = torch.ops.fp4fx_cpu.conv(images, *packed((7, 16, 3, 3), "conv"), None, *geometry, compute="int8", tier=tier)
    assert [image.isnan().any().item() for image in y] == [False, True, False]


def test_int8_pads_images_with_zeros_that_cost_no_accuracy(tier):
    if tier not in INT8:
        pytest.skip("no integer products")
    for padding in (1, 3):  # of 3, whole tiles read nothing, and some rows of others
        x, w = torch.ones(2, 32, 3, 3), ops.quantize(torch.full((5, 32, 3, 3), 3.0), None, "conv")
        args = (x, *w, None, 32, (3, 3), [1, 1], [padding, padding], [1, 1], 1)
        assert error(torch.ops.fp4fx_cpu.conv(*args, compute="int8", tier=tier), ops.conv(*args).double()) < 1e-4


ORDERS = [
    ((33,), "rows", 1),
    ((5, 40), "rows", 1),
    ((2, 3, 16), "rows", 1),
    ((0, 24), "rows", 1),
    ((40, 5), "columns", 1),
    ((2, 3, 24, 7), "columns", 1),
    ((2, 12, 5, 3), "channels", 1),
    ((2, 36, 5), "channels", 2),
    ((12, 5, 3, 3), "conv", 1),
    ((12, 4, 3), "conv", 2),
    ((8, 3, 3, 3), "conv_transpose", 2),
    ((5, 7, 2, 2, 2), "conv_transpose", 1),
]


@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_the_codec_gives_the_bits_of_the_body(tier, case, block_rows):
    shape, order, groups = case
    for dtype, g in itertools.product(DTYPES, (None, torch.tensor(0.01))):
        x = torch.randn(shape).to(dtype)
        parts = torch.ops.fp4fx_cpu.quantize(x, g, order, groups, "max", block_rows, tier=tier)
        expected = ops.quantize(x, g, order, groups, "max", block_rows)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(parts, expected, strict=True))
        assert g is None or parts[2].data_ptr() != g.data_ptr()
        y = torch.ops.fp4fx_cpu.dequantize(*parts, shape, dtype, order, groups, tier=tier)
        expected = ops.dequantize(*parts, shape, dtype, order, groups)
        assert torch.equal(y, expected) and strides(y) == strides(expected) and y.dtype == dtype


def test_tiles_end_with_their_matrix(tier):
    x = torch.randn(3, 20, 40) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1)
    for rows in (x, x[:, :16], x[:, ::2], x[:1], x[0]):
        parts = torch.ops.fp4fx_cpu.quantize(rows, block_rows=16, tier=tier)
        expected = nvfp4.quantize_rows(rows, block_rows=16)
        assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))


def test_embedding(tier):
    w = packed((11, 40))
    for indices in (torch.tensor([[0, 10], [3, 3]]), torch.tensor(4), torch.arange(22, dtype=torch.int32)[::2] % 11):
        for dtype in DTYPES:
            y = torch.ops.fp4fx_cpu.embedding(indices, *w, 40, dtype, tier=tier)
            assert torch.equal(y, ops.embedding(indices, *w, 40, dtype))
    assert torch.ops.fp4fx_cpu.embedding(torch.empty(0, 3).long(), *w, 40, torch.float32, tier=tier).shape == (0, 3, 40)
    for bad in (-1, 11):
        with pytest.raises(IndexError, match=f"{bad} is out of range, the table has 11"):
            torch.ops.fp4fx_cpu.embedding(torch.tensor([0, bad]), *w, 40, torch.float32, tier=tier)


# --- what no tier decides ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(cpu_ops):
    w, x = packed((7, 40)), torch.randn(3, 40)
    linear, conv = cpu_ops.linear, packed((6, 8, 3, 3), "conv")
    image = torch.randn(1, 8, 5, 5)

    def convolve(x=image, channels=8, stride=(1, 1), padding=(1, 1), groups=1, kernel=(3, 3)):
        return cpu_ops.conv(x, *conv, None, channels, kernel, stride, padding, [1, 1], groups)

    for call, message in (
        (lambda: linear(x[:, :39], *w, None, 40), "x has 39 values"),
        (lambda: linear(torch.randn(3, 64), *w, None, 64), "K=64 needs 32 code bytes"),
        (lambda: linear(x.double(), *w, None, 40), "float32, bfloat16 or float16, found Double"),
        (lambda: linear(x, w[0].int(), *w[1:], None, 40), "uint8"),
        (lambda: linear(x, *w[:2], w[2].double(), None, 40), "global scale must be one float32"),
        (lambda: linear(x, *w, torch.randn(8), 40), "bias must have 7"),
        (lambda: linear(x, *w, None, 40, channel_scale=torch.ones(7).int()), "channel_scale must have 7 floating"),
        (lambda: linear(x, *w, None, 40, residual=torch.randn(3, 8)), "residual must be Float"),
        (lambda: linear(x, *w, None, 40, residual=torch.randn(3, 7).half()), "residual must be Float"),
        (lambda: linear(x, *w, None, 40, dtype=torch.half, residual=torch.randn(3, 7)), "residual must be Half"),
        (lambda: linear(x, *w, None, 40, dtype=torch.double), "float32, bfloat16 or float16, found Double"),
        (lambda: linear(x, *w, None, 40, activation="tanh"), "unknown activation 'tanh'; use one of none, relu"),
        (lambda: linear(x, *w, None, 40, compute="fp8"), "unknown compute 'fp8'"),
        (lambda: linear(x, *w, None, 40, tier="sse"), "no tier 'sse'"),
        (lambda: linear(x, *w, None, 40, torch.ones(3, 3).byte()), "a quantized x needs"),
        (lambda: convolve(padding=(-1, 0)), "negative padding"),
        (lambda: convolve(x=image[..., :2], padding=(0, 0)), "does not fit"),
        (lambda: convolve(stride=(0, 1)), "must be positive"),
        (lambda: convolve(channels=9), "K=81"),
        (lambda: convolve(groups=3), "do not form 3 groups"),
        (lambda: convolve(x=image[0]), "x must have a batch"),
        (lambda: convolve(stride=(1,)), "one to three spatial axes"),
        (lambda: cpu_ops.quantize(x.double()), "float32, bfloat16 or float16"),
        (lambda: cpu_ops.quantize(x, block_rows=2), "1 row or 16"),
        (lambda: cpu_ops.quantize(x, scale_rule="min"), "unknown scale rule"),
        (lambda: cpu_ops.quantize(x, torch.tensor(0.0)), "must be positive"),
        (lambda: cpu_ops.quantize(x[:, :0]), "no values along its reduction axis"),
        (lambda: cpu_ops.quantize(x, None, "diagonal"), "unknown order"),
        (lambda: cpu_ops.dequantize(*w, (8, 40), torch.float32), "do not fill the shape"),
        (lambda: cpu_ops.embedding(x, *w, 40, torch.float32), "indices must be int64"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()


def test_fakes_and_schemas(cpu_ops):
    w, conv, transposed = packed((7, 40)), packed((6, 8, 3, 3), "conv"), packed((8, 3, 3, 3), "conv_transpose", 2)
    x = torch.randn(2, 8, 5, 5)
    xq = ops.quantize(torch.randn(3, 40))
    square = ((3, 3), [2, 2], [1, 1])
    for name, args, kwargs in (
        ("quantize", (x, None, "channels"), {}),
        ("dequantize", (*conv, (6, 8, 3, 3), torch.bfloat16, "conv"), {"tier": "portable"}),
        ("linear", (torch.randn(3, 40), *w, torch.randn(7), 40), {"activation": "relu", "compute": "fp32"}),
        ("linear", (xq[0], *w, None, 40, *xq[1:], torch.float32), {"tier": "portable"}),
        ("linear", (torch.randn(3, 40), *w, torch.randn(7), 40), {"dtype": torch.bfloat16, "compute": "bf16_operands"}),
        ("conv", (x.bfloat16(), *conv, None, 8, *square, [1, 1], 1), {"dtype": torch.float32}),
        ("conv", (x, *conv, None, 8, *square, [1, 1], 1), {}),
        ("conv", (x.to(memory_format=torch.channels_last), *conv, None, 8, *square, [1, 1], 1), {}),
        ("conv_transpose", (x, *transposed, None, 8, *square, [1, 1], [1, 1], 2), {}),
        ("embedding", (torch.tensor([[0, 6]]), *w, 40, torch.float32), {}),
    ):
        opcheck(getattr(cpu_ops, name).default, args, kwargs)


def test_the_eager_codec_uses_the_kernels_and_keeps_its_bits(cpu_ops):
    x = torch.randn(5, 40)
    expected = nvfp4.quantize_rows(x)
    parts = torch.ops.fp4fx.quantize(x)
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))
    dense = nvfp4.dequantize_rows(*expected, 40, torch.float32)
    with torch.profiler.profile() as seen:
        assert torch.equal(torch.ops.fp4fx.dequantize(*parts, (5, 40), torch.float32), dense)
        assert torch.equal(torch.ops.fp4fx.fake_quantize(x), dense)
        assert torch.equal(torch.ops.fp4fx.embedding(torch.tensor([1, 3]), *parts, 40, torch.float32), dense[[1, 3]])
        q = encoding.quantize(x)
    assert torch.equal(q.packed, parts[0]) and torch.equal(q.scale, parts[1])
    count = {event.key: event.count for event in seen.key_averages()}
    assert count["fp4fx_cpu::dequantize"] == 3 and count["fp4fx_cpu::quantize"] == 2
    wide = torch.ops.fp4fx.quantize(x.double())  # which no kernel takes
    assert all(torch.equal(a, b) for a, b in zip(wide, expected, strict=True))
    y = x.clone().requires_grad_()
    torch.ops.fp4fx.fake_quantize(y).sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))


def test_threads_that_call_different_layers_do_not_disturb_each_other(cpu_ops):
    calls = []
    for i in range(4):
        w, conv = packed((50 + i, 40)), packed((20 + i, 8, 3, 3), "conv")
        x, image = torch.randn(30 + i, 40), torch.randn(1, 8, 9, 9)
        calls.append(
            lambda x=x, w=w, image=image, conv=conv: (
                cpu_ops.linear(x, *w, None, 40),
                cpu_ops.conv(image, *conv, None, 8, (3, 3), [1, 1], [1, 1], [1, 1], 1),
                *cpu_ops.quantize(x),
            )
        )
    expected = [call() for call in calls]
    wrong = []

    def work(i):
        wrong.extend(
            i for _ in range(50) if not all(torch.equal(a, b) for a, b in zip(calls[i](), expected[i], strict=True))
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
