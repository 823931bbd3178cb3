"""The quantizer against the definition of its bits, and what `quantize_with` adds to it."""

import pytest
import torch

from fp4fx import nvfp4, ops
from fp4fx.errors import LayoutError, PolicyError
from fp4fx.kernels.triton import quantize as module
from fp4fx.kernels.triton.quantize import quantize, quantize_with, refuse_quantize
from fp4fx.kernels.triton.swizzle import to_blocked
from tests.kernels.test_cpu_codec import DTYPES, KINDS, many_magnitudes
from tests.kernels.triton.compiling import compile_variants
from tests.kernels.triton.launches import Launches, far_apart

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in cast")  # NumPy's, of an infinity or a NaN


@pytest.fixture(autouse=True)
def poisoned_results():
    """Bytes that a kernel forgets to write are not those that a test expects."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


def check(found, expected, what=""):
    for name, a, b in zip(("codes", "scale", "global scale"), found, expected, strict=True):
        assert a.shape == b.shape and a.is_contiguous(), f"{name} of {what}"
        assert torch.equal(a, b), f"{name} of {what}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))  # bf16 as well: a value is its bits shifted
@pytest.mark.parametrize("block_rows", [1, 16])
def test_bits_of_the_definition(device, kind, dtype, block_rows):
    static = torch.tensor(0.37, device=device)
    for n, k, g in ((1, 1, static), (3, 15, None), (17, 16, None), (5, 33, static), (20, 48, None), (19, 70, None)):
        x = kind(n, k).to(dtype).to(device)
        check(quantize(x, g, block_rows=block_rows), nvfp4.quantize_rows(x, g, block_rows=block_rows), f"{n}x{k}")


@pytest.mark.parametrize("rule", ["search", "four_over_six", "four_over_six_mae"])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_the_choice_of_scales(device, kind, rule):
    for n, k, g in ((3, 15, None), (12, 32, None), (2, 33, torch.tensor(0.37, device=device))):
        x = kind(n, k).to(device)
        check(quantize(x, g, scale_rule=rule), nvfp4.quantize_rows(x, g, scale_rule=rule), f"{n}x{k}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [
    lambda x: x[:, 3:35], lambda x: x[::2, :32], lambda x: x[:, 1:33], lambda x: x.t(), lambda x: x[5:6].expand(4, 64),
    lambda x: x[:, ::2], lambda x: x.view(8, 5, 64)[:, 1:4], lambda x: x[0], lambda x: x[:1, :1], lambda x: x[:0],
    lambda x: x.flatten().as_strided((6, 48), (56, 1), 8),
])  # fmt: skip
@pytest.mark.parametrize("block_rows", [1, 16])
def test_any_strides(device, dtype, view, block_rows):
    x = view(many_magnitudes(40, 64).to(dtype).to(device))
    check(quantize(x, block_rows=block_rows), nvfp4.quantize_rows(x, block_rows=block_rows))


@pytest.mark.parametrize("shape", [(2, 3, 17, 20), (3, 16, 32), (2, 0, 16)])
def test_tiles_of_16_rows_end_with_their_matrix(device, shape):
    x = torch.randn(shape, device=device) * torch.rand(shape[:-1], device=device)[..., None]
    check(quantize(x, block_rows=16), nvfp4.quantize_rows(x, block_rows=16))


@pytest.mark.parametrize("shape", [(2, 48, 3, 5), (1, 24, 4), (2, 32, 2, 2, 3)])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_channels(device, shape, last, groups):
    x = torch.randn(shape, device=device)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        rows = nvfp4.to_rows(x, "channels", groups)
        assert module._as_matrix(rows).data_ptr() == x.data_ptr()  # no copy
    check(quantize(x, None, "channels", groups), ops.quantize(x, None, "channels", groups))


@pytest.mark.parametrize("order", ["conv", "conv_transpose"])
def test_weights_of_convolutions(device, order):
    w = torch.randn(4, 6, 3, 2, device=device)
    check(quantize(w, None, order, 2), ops.quantize(w, None, order, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_scale_of_more_tiles_than_programs(device, dtype, monkeypatch):
    monkeypatch.setattr(module, "_PARTS", 3)
    for n, k in ((70, 65), (64, 96)):
        for place in ((n - 1, k - 1), (n // 2, k // 2)):
            x = torch.randn(n, k).to(dtype).to(device)
            x[place] = -100
            x[n // 3, 0], x[n // 3, 1] = float("nan"), float("inf")
            check(quantize(x), nvfp4.quantize_rows(x))


def test_a_static_global_scale_is_copied(device):
    g = torch.tensor(0.5, device=device)
    for rows in (4, 0):
        used = quantize(torch.randn(rows, 16, device=device), g)[2]
        assert torch.equal(used, g) and used.data_ptr() != g.data_ptr()


def test_rows_further_apart_than_32_bits(device, tmp_path):
    if device == "cuda":
        pytest.skip("its values are in a file")
    for stride in (2**31 + 16, 2**30 + 1):
        x = far_apart(tmp_path, (3, 40), (stride, 1), torch.float16)
        check(quantize(x), nvfp4.quantize_rows(x))


def test_kernels_are_launched_on_the_device_of_x(device, monkeypatch):
    launches = Launches(monkeypatch, module, "amax_kernel", "quantize_kernel")
    x = torch.randn(4, 32, device=device)
    quantize(x)
    assert [guard for guard, _ in launches.seen] == [x.device] * 2


def test_refusals(device):
    x = torch.randn(2, 16, device=device)
    assert all(refuse_quantize(rule) is None for rule in ("max", "search", "four_over_six", "four_over_six_mae"))
    assert "'four_over_six_mae', found 'min'" in refuse_quantize("min")
    with pytest.raises(PolicyError, match="found 'min'"):
        quantize(x, scale_rule="min")
    with pytest.raises(PolicyError, match="block_rows=4"):
        quantize(x, block_rows=4)
    with pytest.raises(PolicyError, match="needs scale_rule='max'"):
        quantize(x, scale_rule="search", block_rows=16)
    with pytest.raises(LayoutError, match="floating-point"):
        quantize(x.int())
    with pytest.raises(LayoutError, match="one fp32 value"):
        quantize(x, torch.ones(1, device=device))
    with pytest.raises(LayoutError, match="no values"):
        quantize(x[:, :0])
    with pytest.raises(LayoutError, match="at most 2147475456 values here, found 2147483648"):
        quantize(x[0, :1].expand(2**31))
    for seed in (torch.tensor([1], device=device), torch.tensor(1, dtype=torch.int32, device=device)):
        with pytest.raises(LayoutError, match=r"stochastic must be an int or i64 \[\]"):
            quantize_with(x, None, stochastic=seed)
    with pytest.raises(LayoutError, match="hadamard"):
        quantize_with(x, None, hadamard=torch.eye(8, device=device))


# --- more than the op -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 16), (33, 80), (130, 70), (2, 3, 32)])
def test_swizzled_scales(device, shape):
    x = torch.randn(shape, device=device)
    packed, scale, g = nvfp4.quantize_rows(x)
    check(quantize_with(x, None, swizzled=True), (packed, to_blocked(scale.flatten(0, -2)), g))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 32), (3, 40), (2, 3, 48)])
def test_hadamard(device, dtype, shape):
    """Values and matrix whose products have no rounding, so that the order of the sums does not matter."""
    x = torch.randint(-8, 9, shape).to(dtype).to(device)
    h = torch.randint(-2, 3, (16, 16)).float().to(device) / 4
    blocks = torch.nn.functional.pad(x.float(), (0, -shape[-1] % 16)).unflatten(-1, (-1, 16)) @ h
    for g in (None, torch.tensor(0.02, device=device)):
        check(quantize_with(x, g, hadamard=h), nvfp4.quantize_rows(blocks.flatten(-2), g))


def grid(device):
    return nvfp4.decode_e2m1(torch.arange(8, dtype=torch.uint8, device=device))


def test_stochastic_rounding_takes_both_neighbours_and_has_the_value_as_its_mean(device):
    block = torch.cat([torch.tensor([6.0, -5.3, 0.0, -0.2]), torch.randn(12) * 2]).clamp(-6, 6)
    x = block.repeat(64, 16).to(device)
    packed, scale, g = quantize_with(x, None, stochastic=7)
    assert scale.unique().numel() == 1
    step = nvfp4.decode_e4m3(scale[0, 0]) * g
    value = block.to(device) / step
    found = nvfp4.decode_e2m1(nvfp4.unpack(packed)).view(-1, 16)

    values = grid(device)
    below = values[torch.searchsorted(values, value.abs(), right=True) - 1]
    above = values[torch.searchsorted(values, value.abs())]
    assert (value.abs() <= 6).all()  # nothing saturates
    taken = found.abs()
    assert ((taken == below) | (taken == above)).all()
    assert ((found.sign() == value.sign()) | (taken == 0)).all()
    chance = torch.where(above > below, (value.abs() - below) / (above - below), 0.0)
    for i in range(16):
        both = taken[:, i].unique().numel() == 2
        assert both or not 0.02 < chance[i] < 0.98
    deviation = (above - below) * (chance * (1 - chance)).sqrt() / len(found) ** 0.5
    assert ((found.mean(0) - value).abs() <= 5 * deviation + 1e-6).all()


def test_stochastic_rounding_is_that_of_the_seed(device):
    x = torch.randn(20, 40, device=device)
    first = quantize_with(x, None, stochastic=1)
    check(quantize_with(x, None, stochastic=1), first)
    other = quantize_with(x, None, stochastic=2)
    assert not torch.equal(other[0], first[0])
    check(other[1:] + first[:1], first[1:] + first[:1])
    same = quantize_with(x[:1].expand(20, 40), None, stochastic=1)[0]
    assert len(same.unique(dim=0)) == 20  # every row draws its own
    check(quantize_with(x, None, stochastic=0), quantize_with(x, None, stochastic=0))
    check(quantize_with(x, None, stochastic=torch.tensor(1, device=device)), first)
    far = 2**40 + 1  # more than 32 bits of a seed count
    assert not torch.equal(quantize_with(x, None, stochastic=far)[0], first[0])


@pytest.mark.gpu
def test_a_cuda_graph_draws_anew_from_a_tensor(device):
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    x = torch.randn(20, 40, device=device)

    def both():
        seed = torch.randint(2**63 - 1, (), device=device)
        return [quantize_with(x, None, stochastic=s)[0] for s in (seed, 1)]

    both()  # compiles
    graph, replays = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        found = both()
    for _ in range(2):
        graph.replay()
        replays.append([codes.clone() for codes in found])
    assert not torch.equal(replays[0][0], replays[1][0])
    assert torch.equal(replays[0][1], replays[1][1])


def test_stochastic_scales_have_headroom(device):
    x = many_magnitudes(30, 64).to(device)
    _, scale, g = quantize_with(x, None, stochastic=3)
    assert torch.equal(g, nvfp4.global_scale(x))
    amax = x.abs().unflatten(-1, (-1, 16)).amax(-1)
    expected = nvfp4.encode_e4m3((amax * 1.0625 / (6 * g)).clamp(2.0**-9, 448))
    assert torch.equal(scale, expected)


def test_stochastic_corner_cases(device):
    x = torch.tensor(
        [[float("nan"), 1.0] * 8, [float("inf"), -float("inf"), 1.0, -0.0] * 4, [-0.0] * 16], device=device
    )
    decoded = nvfp4.dequantize_rows(
        *quantize_with(x, torch.tensor(1.0, device=device), stochastic=5), 16, torch.float32
    )
    assert decoded[0].isnan().all()
    assert (decoded[1, 0::4] > 0).all() and (decoded[1, 1::4] < 0).all() and decoded[1].isfinite().all()
    assert torch.equal(decoded[2].view(torch.int32), torch.zeros(16, dtype=torch.int32, device=device))


def test_stochastic_error_is_that_of_the_method(device):
    x = torch.randn(32, 1024, device=device)
    decoded = nvfp4.dequantize_rows(*quantize_with(x, None, stochastic=11), 1024, torch.float32)
    error = (x - decoded).square().mean() / x.square().mean()
    assert abs(error - 23.5e-3) < 1e-3


def test_compiles_ahead_of_time():
    options = ("stochastic", "search", "four_over_six")
    compile_variants("quantize", ("amax-bf16-8x512", *(f"quantize-bf16-8x512-{option}" for option in options)))
