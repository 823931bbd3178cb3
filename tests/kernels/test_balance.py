"""Errors of a convolution's weights that cancel: a plain loop, the definition and the kernels; the gain."""

from fractions import Fraction

import pytest
import torch
from torch.nn.functional import conv2d, interpolate

import fp4fx
from fp4fx import nvfp4
from fp4fx.balance import balanced
from fp4fx.kernels import encoding

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GRID = sorted({*VALUES, *(-v for v in VALUES)})
SHAPES = [(6, 5, 3, 3), (3, 40, 1, 1), (4, 16, 7), (2, 3, 2, 3, 2), (5, 1, 3, 3), (1, 130, 1)]


def nearest(w):
    """The rows of a convolution's weight, and their nearest values by searched scales."""
    return nvfp4.to_rows(w, "conv"), nvfp4.quantize(w, scale_rule="search", order="conv")


def by_hand(row, codes, scales, g, taps):
    """A row's values over g after all moves, in fractions; the row itself counts in 1024ths of g."""
    s = [Fraction(x) for x in nvfp4.decode_e4m3(scales).tolist() for _ in range(16)][: len(row)]
    at = [GRID.index(v) for v in nvfp4.decode_e2m1(nvfp4.unpack(codes)).tolist()][: len(row)]
    w = [Fraction(round(x * 1024), 1024) for x in (row / g).tolist()]

    def move(members, weight):
        def value(i, place):
            return Fraction(GRID[place]) * s[i]

        total = sum(w[i] - value(i, at[i]) for i in members)
        way = (total > 0) - (total < 0)
        ranked = []
        for i in members if way else ():
            if not 0 <= at[i] + way < len(GRID):
                continue
            step = (value(i, at[i] + way) - value(i, at[i])) * way
            towards = (w[i] - value(i, at[i])) * way
            if towards > 0:  # (e - d)^2 - e^2 = d (d - 2 e)
                ranked.append((step - 2 * towards, i, step))
        rest = abs(total)
        for loss, i, step in sorted(ranked):
            if weight * (rest**2 - (rest - step) ** 2) <= step * loss:
                break
            at[i] += way
            rest -= step

    channels = len(row) // taps
    if taps > 1:
        for c in range(channels):
            move(range(c, len(row), channels), 1)
    move(range(len(row)), Fraction(1, 2))
    return [Fraction(GRID[place]) * s[i] for i, place in enumerate(at)]


@pytest.mark.parametrize("shape", SHAPES)
def test_moves_are_those_of_a_plain_loop(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rows, q = nearest(w)
    taps = nvfp4.taps(w.shape, "conv")
    moved = balanced(rows, q.packed, q.scale, q.global_scale, taps)
    found = nvfp4.dequantize_rows(moved, q.scale, torch.tensor(1.0), rows.shape[1], torch.float32)
    for i, row in enumerate(rows):
        expected = by_hand(row, q.packed[i], q.scale[i], q.global_scale, taps)
        assert found[i].tolist() == [float(v) for v in expected]
    assert not torch.equal(moved, q.packed)


@pytest.mark.parametrize("shape", [*SHAPES, (70, 64, 3, 3)])
@pytest.mark.parametrize("kind", ["gaussian", "poisoned", "mostly zeros", "tiny", "far apart"])
def test_kernels_move_the_same(shape, kind, cpu_ops):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    flat = w.view(-1)
    if kind == "poisoned":
        flat[::7], flat[1::11], flat[2::13] = float("nan"), float("inf"), float("-inf")
    elif kind == "mostly zeros":
        flat[flat.abs() < 1] = -0.0
    elif kind == "tiny":
        w *= 1e-38
    elif kind == "far apart":
        flat[0] = 1e4
    rows, q = nearest(w)
    taps = nvfp4.taps(w.shape, "conv")
    expected = balanced(rows, q.packed, q.scale, q.global_scale, taps)
    for tier in cpu_ops.tiers():
        found = cpu_ops.balance(rows.contiguous(), q.packed, q.scale, q.global_scale, taps, tier)
        assert torch.equal(found, expected)
    finite = nvfp4.dequantize_rows(q.packed, q.scale, q.global_scale, rows.shape[1], torch.float32).isfinite()
    changed = nvfp4.unpack(expected)[:, : rows.shape[1]] != nvfp4.unpack(q.packed)[:, : rows.shape[1]]
    assert not changed[~finite | ~rows.isfinite()].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_all_ways_to_encode_agree(shape, chunk, cpu_ops, monkeypatch):
    monkeypatch.setattr(nvfp4, "CHUNK", chunk)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    expected = nvfp4.quantize(w, scale_rule="unbiased", order="conv")
    found = encoding.quantize(w, scale_rule="unbiased", order="conv")
    op = torch.ops.fp4fx.quantize(w, order="conv", scale_rule="unbiased")
    for parts in ((found.packed, found.scale, found.global_scale), op):
        assert all(map(torch.equal, parts, (expected.packed, expected.scale, expected.global_scale)))
    d = nvfp4.dequantize(expected).double()
    assert (w * d).sum() / w.double().square().sum() == pytest.approx(1, abs=2e-6)
    ones = encoding.quantize(w, scale_rule="unbiased", order="conv", importance=torch.ones(w[0].numel()))
    assert torch.equal(ones.packed, expected.packed) and ones.global_scale == expected.global_scale


def test_no_rows_and_values_that_fp32_cannot_hold(cpu_ops):
    w = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    w[0, 0, 0, 0] = 1e60  # Inf, which keeps its code
    for part in (w, w[:0]):
        expected, found = (e.quantize(part, scale_rule="unbiased", order="conv") for e in (nvfp4, encoding))
        parts = torch.ops.fp4fx.quantize(part, order="conv", scale_rule="unbiased")
        for other in ((found.packed, found.scale, found.global_scale), parts):
            assert all(map(torch.equal, other, (expected.packed, expected.scale, expected.global_scale)))


def test_only_a_convolution_is_balanced():
    w = torch.randn(8, 48)
    searched = nvfp4.quantize(w, scale_rule="search")
    assert torch.equal(nvfp4.quantize(w, scale_rule="unbiased").packed, searched.packed)
    for order, shape in (("conv_transpose", (16, 4, 3, 3)), ("columns", (48, 8))):
        w = torch.randn(shape)
        found, searched = (nvfp4.quantize(w, scale_rule=rule, order=order) for rule in ("unbiased", "search"))
        assert torch.equal(found.packed, searched.packed)


def test_an_output_of_smooth_positive_inputs_has_less_error():
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(64, 32, 3, 3, generator=generator)
    x = interpolate(torch.randn(2, 32, 12, 12, generator=generator), scale_factor=2, mode="bilinear").relu()
    y = conv2d(x, w)

    def error(rule):
        rounded = nvfp4.dequantize(nvfp4.quantize(w, scale_rule=rule, order="conv"))
        return float((conv2d(x, rounded) - y).norm() / y.norm())

    assert error("unbiased") < 0.75 * error("search")


def test_the_default_policy_balances_convolutions():
    model = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3) for _ in range(3)))
    q = fp4fx.quantize(model)
    w = model[1].weight.detach()
    assert torch.equal(q[1].weight, nvfp4.dequantize(nvfp4.quantize(w, scale_rule="unbiased", order="conv")))
    assert not torch.equal(q[1].weight_packed, nvfp4.quantize(w, scale_rule="search", order="conv").packed)
