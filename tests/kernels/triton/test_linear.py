"""Every schedule of the Triton linear layer against the op's body in fp64."""

import importlib.util
import math

import pytest
import torch

from fp4fx import nvfp4
from fp4fx.kernels.triton import linear as module
from fp4fx.kernels.triton import tuning
from fp4fx.kernels.triton.linear import linear, variants
from fp4fx.ops import compute as ops
from fp4fx.ops.epilogue import ACTIVATIONS
from tests.kernels.triton.launches import Launches, far_apart

TOLERANCE = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}  # of the largest result: one rounding
SCHEDULES = ("gemv", "split_k", "gemm", "decode")
WIDENED = ("channel_scale", "residual")
DECODES = importlib.util.find_spec("fp4fx.kernels.triton.dequantize") is not None


def weight(n, k, device, seed=0):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return tuple(t.to(device) for t in nvfp4.quantize_rows(w))


def rows(*shape, dtype=torch.float32, device="cpu", seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def expected(x, q, bias, k, **more):
    """The body in fp64, of the same values."""
    wide = {name: t.double() if isinstance(t, torch.Tensor) and name in WIDENED else t for name, t in more.items()}
    if "dtype" in wide:
        wide["dtype"] = torch.float64
    x = x.double() if x.is_floating_point() else x
    return ops.linear(x, *q, None if bias is None else bias.double(), k, **wide)


def check(actual, reference, dtype, schedule=None):
    """`decode` rounds both operands, the product and the result."""
    assert actual.dtype == dtype and actual.shape == reference.shape and actual.is_contiguous()
    scale = max(reference.abs().max().item(), 1e-30) if reference.numel() else 1.0
    atol = TOLERANCE[dtype] * (3 if schedule == "decode" else 1)
    torch.testing.assert_close(actual.double() / scale, reference / scale, rtol=0, atol=atol)


def skip_decode(schedule):
    if schedule == "decode" and not DECODES:
        pytest.skip("fp4fx.kernels.triton.dequantize is not there")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (2, 17, 48), (3, 33, 50), (4, 5, 129), (3, 20, 96)])
def test_shapes(schedule, m, n, k, device, dtypes):
    skip_decode(schedule)
    q = weight(n, k, device)
    for dtype in dtypes:
        x, bias = rows(m, k, dtype=dtype, device=device), rows(n, dtype=dtype, device=device, seed=2)
        y = linear(x, *q, bias, k, compute="fp32", schedule=schedule)
        check(y, expected(x, q, bias, k), dtype, schedule)


def test_many_rows(device, dtypes):
    """More tiles of x and of W than one, both with an edge."""
    q = weight(37, 80, device)
    for dtype in dtypes:
        x = rows(2, 25, 80, dtype=dtype, device=device)
        for schedule in ("split_k", "gemm"):
            y = linear(x, *q, None, 80, compute="fp32", schedule=schedule)
            check(y, expected(x, q, None, 80), dtype)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(schedule, activation, device, dtypes):
    skip_decode(schedule)
    n, k = 19, 40
    q = weight(n, k, device)
    bias, scaling = rows(n, device=device, seed=2), rows(n, dtype=torch.float16, device=device, seed=3)
    for dtype in dtypes:
        x, residual = rows(3, k, dtype=dtype, device=device), rows(3, n, dtype=dtype, device=device, seed=4)
        some = {"channel_scale": scaling, "residual": residual, "activation": activation, "compute": "fp32"}
        check(linear(x, *q, bias, k, **some, schedule=schedule), expected(x, q, bias, k, **some), dtype, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 3), (5, 18, 48), (18, 17, 72)])
def test_packed_activation(schedule, m, n, k, device, dtypes):
    skip_decode(schedule)
    q = weight(n, k, device)
    x, x_scale, x_global = (t.to(device) for t in nvfp4.quantize_rows(rows(m, k, seed=5)))
    for dtype in dtypes:
        some = {"x_scale": x_scale, "x_global_scale": x_global, "dtype": dtype, "compute": "fp32"}
        check(linear(x, *q, None, k, **some, schedule=schedule), expected(x, q, None, k, **some), dtype, schedule)


def test_packed_activation_is_exact(device):
    """Codes times scales lose nothing on their way: with integers for products the sums are the numbers themselves."""
    w = torch.tensor([[0.5, -6, 3, 4, -1.5, 2, 1, 0] * 4] * 3, device=device)
    one = torch.ones((), device=device)
    q = nvfp4.quantize_rows(w, one)
    x = nvfp4.quantize_rows(w[:2].flip(1), one)
    for schedule in ("split_k", "gemm"):
        y = linear(x[0], *q, None, 32, *x[1:], torch.float32, schedule=schedule)
        assert torch.equal(y, w[:2].flip(1) @ w.T)


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_strides(schedule, device, dtypes):
    """Rows apart, columns apart, an odd offset, more than one leading axis."""
    k, n = 18, 6
    q = weight(n, k, device)
    for dtype in dtypes:
        base = rows(2, 2, 2 * k + 2, dtype=dtype, device=device)
        views = [base[..., :k], base[..., 1 : k + 1], base[..., : 2 * k : 2], base[:, 0, :k], base[0, 0, :k]]
        for x in (*views, base[..., :k].transpose(0, 1)):
            y = linear(x, *q, None, k, compute="fp32", schedule=schedule)
            check(y, expected(x, q, None, k), dtype)


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_rows_further_apart_than_32_bits(schedule, device, tmp_path):
    if device == "cuda":
        pytest.skip("its values are in a file")
    q = weight(5, 32, device)
    x = far_apart(tmp_path, (3, 32), (2**30 + 2, 1), torch.float16)
    check(linear(x, *q, None, 32, schedule=schedule), expected(x, q, None, 32), torch.float16)


def test_grids_have_room_for_any_number_of_rows(device, monkeypatch):
    """A grid has 65535 programs along its second axis, at most."""
    launches = Launches(monkeypatch, module, "gemm", "reduce", run=False)
    q = weight(4, 64, device)
    x = torch.zeros(1, 64, dtype=torch.float16, device=device).expand(70000, 64)
    for schedule in ("split_k", "decode"):
        linear(x, *q, None, 64, activation="relu", schedule=schedule)
    assert len(launches.seen) == 3
    assert all(math.prod(grid) >= 70000 // 16 and max(grid[1:], default=1) <= 2 for _, grid in launches.seen)


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_what_is_past_a_row_is_not_read(schedule, device):
    """NaN around x and in the unused end of the result's neighbours: nothing of it arrives."""
    k, n = 20, 5
    q = weight(n, k, device)
    base = torch.full((3, k + 12), torch.nan, dtype=torch.float16, device=device)
    base[:, 4 : k + 4] = rows(3, k, dtype=torch.float16, device=device)
    x = base[:, 4 : k + 4]
    check(linear(x, *q, None, k, schedule=schedule), expected(x, q, None, k), torch.float16)


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_nan_scale_poisons_its_row_only(schedule, device):
    q = weight(4, 40, device)
    q[1][2, 1] = nvfp4.E4M3_NAN
    y = linear(rows(2, 40, device=device), *q, None, 40, schedule=schedule)
    assert y[:, 2].isnan().all() and not y[:, [0, 1, 3]].isnan().any()


def test_largest_and_smallest_scales(device):
    """Every block scale at its bounds, for the ranges of the operands."""
    q = weight(3, 64, device)
    for byte in (0x7E, 0x01, 0x08):
        q[1].fill_(byte)
        x = rows(2, 64, dtype=torch.float16, device=device) / 64
        for schedule in SCHEDULES[:3]:
            y = linear(x.float(), *q, None, 64, schedule=schedule, compute="fp32")
            check(y, expected(x, q, None, 64), torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinite_x(device):
    """An infinity stays one where the weight is not zero, also in two parts."""
    q = nvfp4.quantize_rows(torch.ones(2, 16, device=device))
    x = torch.zeros(1, 16, device=device)
    x[0, 3] = torch.inf
    for schedule in SCHEDULES[:3]:
        assert linear(x, *q, None, 16, schedule=schedule, compute="fp32").tolist() == [[torch.inf, torch.inf]]


def test_fp32_compute(device):
    q = weight(16, 96, device)
    x = rows(5, 96, device=device)
    for schedule in ("split_k", "gemm"):
        check(linear(x, *q, None, 96, compute="fp32", schedule=schedule), expected(x, q, None, 96), torch.float32)


def test_deterministic(device):
    q = weight(33, 160, device)
    x = rows(7, 160, device=device)
    first, second = (linear(x, *q, None, 160, schedule="split_k") for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_to_do(device):
    q = weight(4, 16, device)
    assert linear(rows(0, 16, device=device), *q, None, 16).shape == (0, 4)
    assert linear(rows(2, 0, 3, 16, device=device), *q, None, 16).shape == (2, 0, 3, 4)


def test_the_table_chooses(device, monkeypatch):
    """Without `schedule` the number of rows decides; a packed x has no gemv."""
    called = []
    for name in ("_gemv", "_gemm", "_decode"):
        monkeypatch.setattr(module, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(tuning, "largest_m", lambda _: {"gemv": 4, "split_k": 8, "gemm": 16})
    q = weight(4, 16, device)
    for m in (4, 5, 9, 17):
        linear(rows(m, 16, device=device), *q, None, 16)
    x, x_scale, x_global = (t.to(device) for t in nvfp4.quantize_rows(rows(1, 16)))
    linear(x, *q, None, 16, x_scale, x_global, torch.float32)
    assert called == ["_gemv", "_gemm", "_gemm", "_decode", "_gemm"]
    called.clear()
    x, x_scale, x_global = (t.to(device) for t in nvfp4.quantize_rows(rows(17, 16)))
    for family in ("sm_90", "sm_100"):  # whose matrix unit reads packed operands, and is not given decoded ones
        monkeypatch.setattr(tuning, "family_of", lambda _, family=family: family)
        linear(x, *q, None, 16, x_scale, x_global, torch.float32)
    assert called == ["_decode", "_gemm"]


def test_names_of_variants():
    names = [variant.name for variant in variants()]
    assert names and len(names) == len(set(names))


def test_refusals(device):
    q = weight(4, 16, device)
    x = rows(2, 16, device=device)
    with pytest.raises(RuntimeError, match="residual"):
        linear(x, *q, None, 16, residual=rows(3, 4, device=device))
    with pytest.raises(RuntimeError, match="activation"):
        linear(x, *q, None, 16, activation="swish")
    with pytest.raises(RuntimeError, match="K=15"):
        linear(x[:, :15], *(q[0][:, :4], *q[1:]), None, 15)
    with pytest.raises(RuntimeError, match="gemv"):
        linear(rows(5, 16, device=device), *q, None, 16, schedule="gemv")


@pytest.mark.gpu
def test_random_calls(device):
    """On a GPU: bf16 and random sizes, strides and epilogues, through whatever the table chooses."""
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        m, n, k = (int(torch.randint(1, high, (), generator=generator)) for high in (300, 700, 3000))
        dtype = (torch.bfloat16, torch.float16)[step % 2]
        q = weight(n, k, device, seed=step)
        x = rows(m, k + step % 5, dtype=dtype, device=device, seed=step)[:, :k]
        some = {"residual": rows(m, n, dtype=dtype, device=device)} if step % 3 == 0 else {}
        some["activation"] = ("none", "silu")[step % 2]
        bias = rows(n, dtype=dtype, device=device) if step % 4 else None
        check(linear(x, *q, bias, k, **some), expected(x, q, bias, k, **some), dtype)
