"""Scales in the order of cuBLAS."""

import pytest
import torch

from fp4fx.kernels.triton.swizzle import from_blocked, padded, to_blocked

SHAPES = ((1, 1), (128, 4), (129, 5), (200, 10), (300, 3))


@pytest.mark.parametrize(("rows", "blocks"), SHAPES)
def test_each_scale_lies_where_the_formula_says(rows, blocks):
    scale = torch.randint(1, 127, (rows, blocks), dtype=torch.uint8)
    high, wide = padded(rows, blocks)
    expected = torch.zeros(high * wide, dtype=torch.uint8)
    for r in range(rows):
        for c in range(blocks):
            tile = (r // 128) * (wide // 4) + c // 4
            expected[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale[r, c]
    assert torch.equal(to_blocked(scale), expected)


@pytest.mark.parametrize(("rows", "blocks"), SHAPES)
def test_round_trip(rows, blocks):
    scale = torch.randint(0, 256, (rows, blocks), dtype=torch.uint8)
    assert torch.equal(from_blocked(to_blocked(scale), rows, blocks), scale)


@pytest.mark.peers
@pytest.mark.parametrize(("rows", "blocks"), SHAPES)
def test_agrees_with_torchao(rows, blocks):
    theirs = pytest.importorskip("torchao.prototype.mx_formats.utils").to_blocked
    scale = torch.randint(0, 256, (rows, blocks), dtype=torch.uint8)
    assert torch.equal(to_blocked(scale), theirs(scale, use_triton_kernel=False).flatten())
