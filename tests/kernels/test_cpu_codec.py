"""The codec's kernels at every tier: the bits of nvfp4.quantize_rows and nvfp4.dequantize_rows."""

import pytest
import torch

from fp4fx import nvfp4, scales

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 15), (7, 16), (5, 33), (40, 100), (133, 256))
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def gaussian(n, k):
    return torch.randn(n, k)


def many_magnitudes(n, k):
    return torch.randn(n, k) * 10.0 ** torch.randint(-6, 4, (n, 1))


def poisoned(n, k):
    x = torch.randn(n, k)
    x[0, 0], x[-1, -1] = float("nan"), float("-inf")
    return x


def zeros(n, k):
    return torch.where(torch.rand(n, k) < 0.5, 0.0, -0.0)


def mostly_zeros(n, k):
    return torch.where(torch.rand(n, k) < 0.5, -0.0, torch.randn(n, k) * 1e-3)


def ties(n, k):
    return torch.randint(-48, 49, (n, k)) / 8


def tiny(n, k):
    return torch.randn(n, k) * 1e-38


def huge(n, k):
    return torch.randn(n, k).clamp(-3, 3) * 1e38


KINDS = (gaussian, many_magnitudes, poisoned, zeros, mostly_zeros, ties, tiny, huge)


def same_bits(a, b):
    """Equal bit by bit, any NaN for any other."""
    bits = INTEGERS.get(a.dtype, a.dtype)
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rule", "block_rows"), [("max", 1), ("max", 16), ("search", 1), ("four_over_six", 1), ("four_over_six_mae", 1)]
)
def test_quantize_has_the_bits_of_the_definition(cpu_ops, tier, kind, dtype, rule, block_rows):
    torch.manual_seed(0)
    for n, k in SHAPES:
        x = kind(n, k).to(dtype)
        for g in (None, torch.tensor(0.37)):
            expected = nvfp4.quantize_rows(x, g, scale_rule=rule, block_rows=block_rows)
            found = cpu_ops.quantize(x, g, "rows", 1, rule, block_rows, tier=tier)
            for name, a, b in zip(("codes", "scale", "global scale"), found, expected, strict=True):
                assert torch.equal(a, b), f"{name} of {n}x{k}, global scale {g}"


@pytest.mark.parametrize("rule", ["search", "four_over_six", "four_over_six_mae"])
@pytest.mark.parametrize("kind", KINDS)
def test_weighted_errors_have_the_bits_of_the_definition(cpu_ops, tier, kind, rule):
    torch.manual_seed(0)
    for n, k, parts in ((1, 1, 1), (6, 33, 3), (40, 100, 1), (12, 48, 4)):
        x, importance = kind(n, k), torch.rand(parts, k).pow(4) * (torch.rand(parts, k) < 0.8)
        expected = nvfp4.quantize(x, scale_rule=rule, importance=importance)
        weights = scales.weights_of(importance, x)
        packed, scale, g = cpu_ops.quantize(x, scale_rule=rule, weights=weights, tier=tier)
        assert torch.equal(packed, expected.packed) and torch.equal(scale, expected.scale)
        assert torch.equal(g, expected.global_scale)
    with pytest.raises(ValueError, match="equal parts of 12; found Float"):
        cpu_ops.quantize(x, scale_rule=rule, weights=weights[:, :2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_has_the_bits_of_the_definition(cpu_ops, tier, kind, dtype):
    torch.manual_seed(0)
    for n, k in SHAPES:
        q = nvfp4.quantize_rows(kind(n, k))
        expected = nvfp4.dequantize_rows(*q, k, dtype)
        assert same_bits(cpu_ops.dequantize(*q, (n, k), dtype, tier=tier), expected)


def test_every_code_and_scale(cpu_ops, tier):
    """All 256 pairs of codes under all scales that are not negative, two rows of them, so that a vector is filled."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 128)
    scale = torch.arange(128, dtype=torch.uint8).repeat_interleave(32).repeat(2, 1)
    k = 2 * codes.shape[1]
    for dtype in DTYPES:
        g = torch.tensor(0.013)
        expected = nvfp4.dequantize_rows(codes, scale, g, k, dtype)
        assert same_bits(cpu_ops.dequantize(codes, scale, g, (2, k), dtype, tier=tier), expected)


def test_products_read_every_code_and_scale(cpu_ops, tier):
    """Each row of a weight has one code under one scale; the product with ones is 16 times their value."""
    code, byte = torch.meshgrid(torch.arange(16), torch.arange(128), indexing="ij")
    packed = (code | code << 4).to(torch.uint8).reshape(-1, 1).expand(-1, 8).contiguous()
    scale = byte.to(torch.uint8).reshape(-1, 1).contiguous()
    dense = nvfp4.dequantize_rows(packed, scale, torch.tensor(1.0), 16, torch.float32)
    for rows in (1, 5, 40):  # a vector at a time, and panels
        for compute in ("bf16", "fp32"):
            x = torch.ones(rows, 16)
            y = cpu_ops.linear(x, packed, scale, torch.tensor(1.0), None, 16, compute=compute, tier=tier)
            assert torch.equal(y.nan_to_num(1e9), (x @ dense.T).nan_to_num(1e9)), (rows, compute)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_gathers_rows(cpu_ops, tier, dtype):
    for k in (1, 37, 64, 300, 1000):  # parts of a block, an odd number of blocks, more than a vector of scales
        packed, scale, g = nvfp4.quantize_rows(many_magnitudes(50, k))
        for factor in (1.0, 1e-38):  # and subnormal results
            table = packed, scale, g * factor
            dense = nvfp4.dequantize_rows(*table, k, dtype)
            for indices in (torch.randint(0, 50, (4, 9)), torch.tensor(49), torch.tensor([], dtype=torch.int32)):
                found = cpu_ops.embedding(indices, *table, k, dtype, tier)
                assert same_bits(found, dense[indices.long()]), (k, factor, indices.shape)


def test_rows_apart_and_misaligned(cpu_ops, tier):
    memory = torch.randn(40 * 70 + 3)
    x = memory[3:].view(40, 70)[:, 1:52]  # starts within a vector, ends within a block, rows apart
    for a, b in zip(cpu_ops.quantize(x, tier=tier), nvfp4.quantize_rows(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_bits(cpu_ops, threads):
    x = torch.randn(300, 257)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = cpu_ops.quantize(x)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, nvfp4.quantize_rows(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["search", "four_over_six", "four_over_six_mae"])
def test_a_choice_of_scales_over_tiles_is_refused(cpu_ops, rule):
    with pytest.raises(ValueError, match=f"'{rule}' chooses .* a 16x16 block needs 'max'"):
        cpu_ops.quantize(torch.randn(16, 16), None, "rows", 1, rule, 16)
