"""The scale rules, against trials of each scale in fp64 and the figures that are known of them."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fp4fx import nvfp4
from fp4fx.kernels import encoding
from fp4fx.scales import LARGEST_SCALE, SEARCH

RULES = [rule for rule in LARGEST_SCALE if rule != "max"]


def test_search_finds_the_least_error_of_all_scales():
    """Within its range: every block is compared with a trial of each scale by itself."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) * 3
    q = nvfp4.quantize(x, scale_rule="search")
    start = nvfp4.encode_e4m3(x.abs().amax(1) / (6 * q.global_scale)).int()
    trials = []
    for step in SEARCH:
        byte = (start + step).clamp(max=0x7E).to(torch.uint8)[:, None]
        s = nvfp4.decode_e4m3(byte) * q.global_scale
        trials.append((nvfp4.decode_e2m1(nvfp4.encode_e2m1(x / s)) * s - x).square().sum(1))
    found = (nvfp4.dequantize(q) - x).square().sum(1)
    torch.testing.assert_close(found, torch.stack(trials).amin(0), rtol=1e-4, atol=0)  # squares are cut to 2**-19


@pytest.mark.parametrize("scale", [1e-37, 1e-24, 1e-20, 1e20, 1e30, 1e37])
def test_search_gains_at_every_magnitude(scale):
    x = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0)).view(-1, 256)
    y = x * scale
    decoded = nvfp4.dequantize(nvfp4.quantize(y, scale_rule="search"))
    assert nvfp4.sqnr(y, decoded) > nvfp4.sqnr(x, nvfp4.dequantize(nvfp4.quantize(x))) + 1.2


def test_search_keeps_the_corner_cases_of_max():
    x = torch.randn(4, 32)
    x[0, :16], x[1, 0], x[2, 3] = 0, float("nan"), float("inf")
    q = nvfp4.quantize(x, scale_rule="search")
    assert q.scale[0, 0] == 0x38  # a zero block: 1
    assert q.scale[1, 0] == nvfp4.E4M3_NAN
    assert nvfp4.dequantize(q)[2, 3] == 6 * (nvfp4.decode_e4m3(q.scale[2, 0]) * q.global_scale)  # saturated


# --- four over six ----------------------------------------------------------------------------------------------------


def trials(x, g, power):
    """Blocks fp32 [N, 16] -> the error of each with its maximum at 6 and at 4, fp64 [N, 2], and both scales' bits."""
    x, g = x.double().numpy(), np.float64(g)
    s = np.clip(np.abs(x).max(1) / (6 * g), 2.0**-9, 448)
    scales = np.stack([s, np.minimum(1.5 * s, 448)], 1).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    step = scales.astype(np.float64)[..., None] * g
    codes = np.clip(x[:, None] / step, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return (np.abs(x[:, None] - codes * step) ** power).sum(-1), scales.view(np.uint8)


@pytest.mark.parametrize("rule", ["four_over_six", "four_over_six_mae"])
@pytest.mark.parametrize("given", [None, 3e-3, 5e-3, 300.0])
def test_four_over_six_takes_the_better_of_two_scales(rule, given):
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1)) * 3
    g = None if given is None else torch.tensor(given)
    q = nvfp4.quantize(x, scale_rule=rule, global_scale=g)
    assert given is not None or q.global_scale == x.abs().max() / 1536
    errors, bits = trials(x, q.global_scale, 1 if rule.endswith("mae") else 2)
    wanted = np.where(errors[:, 1] < errors[:, 0], bits[:, 1], bits[:, 0])
    clear = np.abs(errors[:, 1] - errors[:, 0]) > 1e-3 * errors[:, 0]  # errors are cut to 2**-19
    assert np.array_equal(q.scale.numpy()[clear, 0], wanted[clear])
    assert clear.mean() > 0.8


def test_four_over_six_takes_six_where_both_are_as_good():
    x = torch.tensor([6.0, 4, 3, 2, 1.5, 1, 0.5, 0] * 2)[None] * torch.tensor([[256.0], [1.0]])
    q = nvfp4.quantize(x, scale_rule="four_over_six")
    assert q.scale[:, 0].tolist() == nvfp4.encode_e4m3(torch.tensor([256.0, 1.0])).tolist()
    q = nvfp4.quantize(x[:1], scale_rule="four_over_six", global_scale=torch.tensor(0.25))
    assert q.scale.tolist() == [[0x7E]]  # both stop at 448
    y = torch.tensor([4.0, 3, 2, 1.5, 1, 0.5, 0, 0] * 2)[None] * torch.tensor([[384.0], [1.5]])
    assert torch.equal(nvfp4.dequantize(nvfp4.quantize(y, scale_rule="four_over_six")), y)  # four, and exact


@pytest.mark.parametrize("rule", RULES)
def test_a_traced_choice_gives_the_same_bits(rule):
    def encode(x):
        return nvfp4.quantize_rows(x, scale_rule=rule)

    x = torch.randn(9, 40)
    for found, expected in zip(make_fx(encode)(torch.zeros(9, 40))(x), encode(x), strict=True):
        assert torch.equal(found, expected)


# --- importance -------------------------------------------------------------------------------------------------------


def weighted_error(x, q, importance):
    return ((nvfp4.dequantize(q) - x).square() * importance).sum(-1)


def test_importance_makes_the_weighted_error_least():
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) * 3
    importance = torch.rand(16, generator=torch.Generator().manual_seed(2)).pow(3)
    q = nvfp4.quantize(x, scale_rule="search", importance=importance)
    start = nvfp4.encode_e4m3(x.abs().amax(1) / (6 * q.global_scale)).int()
    errors = []
    for step in SEARCH:
        byte = (start + step).clamp(max=0x7E).to(torch.uint8)[:, None]
        s = nvfp4.decode_e4m3(byte) * q.global_scale
        errors.append(((nvfp4.decode_e2m1(nvfp4.encode_e2m1(x / s)) * s - x).square() * importance).sum(1))
    best = torch.stack(errors).amin(0)
    torch.testing.assert_close(weighted_error(x, q, importance), best, rtol=1e-3, atol=0)
    plain = weighted_error(x, nvfp4.quantize(x, scale_rule="search"), importance)
    assert (plain > 1.01 * best).float().mean() > 0.2


@pytest.mark.parametrize("quantize", [nvfp4.quantize, encoding.quantize])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 3e30])
def test_equal_importance_changes_nothing(quantize, value):
    x = torch.randn(40, 72)
    expected = nvfp4.quantize(x, scale_rule="search")
    for shape in ((72,), (1, 72), (5, 72)):
        q = quantize(x, scale_rule="search", importance=torch.full(shape, value))
        assert torch.equal(q.packed, expected.packed) and torch.equal(q.scale, expected.scale)


@pytest.mark.parametrize("quantize", [nvfp4.quantize, encoding.quantize])
@pytest.mark.parametrize(
    ("order", "shape", "groups"),
    [("conv", (12, 8, 3, 3), 4), ("conv_transpose", (16, 3, 2, 2), 4), ("rows", (12, 40), 1)],
)
def test_groups_have_an_importance_of_their_own(monkeypatch, quantize, order, shape, groups):
    monkeypatch.setattr(nvfp4, "CHUNK", 200)  # parts that end within a group
    x = torch.randn(shape)
    rows = nvfp4.to_rows(x, order, groups)
    importance = torch.rand(4, rows.shape[-1]).pow(4)
    q = quantize(x, scale_rule="search", order=order, groups=groups, importance=importance)
    for part, own, scale in zip(rows.chunk(4), importance, q.scale.chunk(4), strict=True):
        alone = nvfp4.quantize(part, scale_rule="search", importance=own, global_scale=q.global_scale)
        assert torch.equal(scale, alone.scale)


def test_a_row_alone_has_importance():
    x, importance = torch.randn(40), torch.rand(40)
    q = nvfp4.quantize(x, scale_rule="search", importance=importance)
    assert torch.equal(q.scale, nvfp4.quantize(x[None], scale_rule="search", importance=importance).scale[0])


@pytest.mark.parametrize("quantize", [nvfp4.quantize, encoding.quantize])
def test_unbiased_keeps_the_length_along_the_tensor_and_the_codes_of_search(quantize):
    x = torch.randn(300, 5000, generator=torch.Generator().manual_seed(2))
    found, searched = quantize(x, scale_rule="unbiased"), quantize(x, scale_rule="search")
    assert torch.equal(found.packed, searched.packed) and torch.equal(found.scale, searched.scale)
    w, q, s = (t.double() for t in (x, nvfp4.dequantize(found), nvfp4.dequantize(searched)))
    assert (w * q).sum() / (w * w).sum() == pytest.approx(1, abs=2e-6)
    assert (w * s).sum() / (w * w).sum() < 0.9945
    assert (w - q).square().sum() < 1.01 * (w - s).square().sum()
    op = torch.ops.fp4fx.quantize(x, scale_rule="unbiased")
    assert op[2] == found.global_scale == nvfp4.quantize_rows(x, scale_rule="unbiased")[2]


def test_unbiased_leaves_a_given_scale_and_tensors_without_a_length_alone():
    g = torch.tensor(0.25)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    assert nvfp4.quantize(x, scale_rule="unbiased", global_scale=g).global_scale == g
    assert nvfp4.quantize(torch.zeros(4, 32), scale_rule="unbiased").global_scale == 1
    assert nvfp4.quantize(torch.zeros(0, 32), scale_rule="unbiased").global_scale == 1
