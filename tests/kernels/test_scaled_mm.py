import importlib
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp4fx
from fp4fx import nvfp4, ops
from fp4fx.kernels import KERNELS, reference, scaled_mm
from fp4fx.kernels.triton import swizzle, tuning
from fp4fx.registry import Request, select
from fp4fx.target import Target


def request(**changes):
    given = {
        "op": "linear",
        "target": Target("cuda", "a card", frozenset({"sm_100"})),
        "dtype": torch.bfloat16,
        "n": 32,
        "k": 64,
        "quantized_input": True,
        "freezing": False,
    }
    return Request(**{**given, **changes})


@pytest.mark.parametrize("capability", ["sm_100", "sm_103", "sm_120", "sm_121"])
def test_what_it_takes(capability):
    assert scaled_mm.refuse(request(target=Target("cuda", "a card", frozenset({capability})))) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"op": "conv"}, "matrices"),
        ({"quantized_input": False}, "not in 4 bits"),
        ({"target": Target("cuda", "H100", frozenset({"sm_90"}))}, "H100 has no 4-bit matrix instruction"),
        ({"target": Target("cpu", "a CPU", frozenset({"avx2"}))}, "no 4-bit matrix instruction"),
        ({"dtype": torch.float64}, "float64"),
        ({"gradient": True}, "no_grad"),
        ({"k": 48}, "K=48"),
        ({"n": 40}, "N=40"),
        ({"n": None}, "N=None"),
    ],
)
def test_what_it_refuses(changes, words):
    assert words in scaled_mm.refuse(request(**changes))


@pytest.mark.parametrize(
    ("changes", "name", "reasons"),
    [
        ({}, "scaled_mm", []),
        ({"target": Target("cuda", "a card", frozenset({"sm_121"}))}, "scaled_mm", []),
        # no choice, and no reason: the kernel that is taken is the first choice there
        ({"target": Target("cuda", "H100", frozenset({"sm_90"}))}, "triton", []),
        ({"quantized_input": False}, "triton", []),
        ({"op": "conv"}, "triton", []),
        # the first choice, which refuses
        ({"n": 40}, "triton", ["scaled_mm: found K=64 (in blocks), N=40"]),
        ({"gradient": True}, "inductor", ["scaled_mm: the result requires a gradient", "triton: the result"]),
    ],
)
def test_what_is_chosen(changes, name, reasons):
    kernel, refusals = select(request(**changes), KERNELS)
    assert kernel.name == name
    assert len(refusals) == len(reasons) and all(map(str.startswith, refusals, reasons))


def quantized(shape, seed):
    torch.manual_seed(seed)
    return nvfp4.quantize_rows(torch.randn(shape))


def library(a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a=None, swizzle_b=None, bias=None, output_dtype=None):
    """scaled_mm as its documentation has it, in fp64: row-major times column-major, codes in multiples of 16 bytes."""
    assert a.dtype == b.dtype == torch.float4_e2m1fn_x2
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert a.shape[1] % 16 == b.shape[1] % 16 == 0
    assert swizzle_a == swizzle_b == [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    assert recipe_a == recipe_b == [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    F._real(a.to("meta"), b.to("meta"), [s.to("meta") for s in scale_a], recipe_a, [s.to("meta") for s in scale_b],
            recipe_b, swizzle_a, swizzle_b, output_dtype=output_dtype)  # fmt: skip
    k = 2 * a.shape[1]
    sides = []
    for codes, (scale, global_scale) in ((a, scale_a), (b.t(), scale_b)):
        assert scale.dtype == torch.float8_e4m3fn
        blocks = swizzle.from_blocked(scale.view(torch.uint8), codes.shape[0], k // 16)
        sides.append(nvfp4.dequantize_rows(codes.view(torch.uint8), blocks, global_scale, k, torch.float64))
    y = sides[0] @ sides[1].T
    if bias is not None:
        assert output_dtype == bias.dtype != torch.float32
        y = y + bias
    return y.to(output_dtype)


@pytest.fixture
def standing_in(monkeypatch):
    monkeypatch.setattr(F, "_real", F.scaled_mm, raising=False)
    monkeypatch.setattr(F, "scaled_mm", library)


EPILOGUES = {
    "bare": {},
    "bias": {"bias": True},
    "all": {"bias": True, "channel_scale": True, "residual": True, "activation": "silu"},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("lead", [(3,), (2, 70), (0,), ()])
def test_it_multiplies_what_the_body_multiplies(standing_in, lead, epilogue, dtype):
    n, k = 48, 96
    x, w = quantized((*lead, k), 1), quantized((n, k), 2)
    torch.manual_seed(3)
    more = dict(EPILOGUES[epilogue])
    bias = torch.randn(n, dtype=dtype) if more.pop("bias", False) else None
    if "residual" in more:
        more["residual"] = torch.randn(*lead, n, dtype=dtype)
        more["channel_scale"] = torch.rand(n) + 0.5
    arguments = (x[0], *w, bias, k, x[1], x[2], dtype)
    y, expected = scaled_mm.linear(*arguments, **more), ops.linear(*arguments, **more)
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    assert (y - expected).float().norm() <= tolerance * max(1, expected.float().norm())


def test_the_library_takes_its_arguments():
    """On the meta device, where nothing is computed."""
    m, n, k = 130, 48, 96
    x = torch.empty(m, k // 2, dtype=torch.uint8, device="meta")
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device="meta")
    scales = [torch.empty(rows, math.ceil(k / 16), dtype=torch.uint8, device="meta") for rows in (m, n)]
    one = torch.empty((), device="meta")
    y = scaled_mm.linear(x, packed, scales[1], one, None, k, scales[0], one, torch.bfloat16)
    assert (y.shape, y.dtype) == ((m, n), torch.bfloat16)


def test_few_rows_are_tritons(standing_in, monkeypatch):
    seen = []
    module = types.SimpleNamespace(linear=lambda x, *args: seen.append(len(x)) or ops.linear(x, *args))
    monkeypatch.setitem(sys.modules, "fp4fx.kernels.triton.linear", module)
    monkeypatch.setattr(tuning, "native_rows", {"interpreter": 3}.__getitem__)
    w = quantized((16, 32), 2)
    for rows in (2, 3, 4):
        x = quantized((rows, 32), rows)
        arguments = (x[0], *w, None, 32, x[1], x[2], torch.float32)
        torch.testing.assert_close(scaled_mm.linear(*arguments), ops.linear(*arguments))
    assert seen == [2, 3]


def test_a_compiled_model_runs_on_it(standing_in, monkeypatch):
    """As an op that Inductor does not look into; on the CPU, where nothing else differs."""
    kernel = replace(scaled_mm.KERNEL, device=None, meant_for=lambda r: r.quantized_input, refuse=lambda _: None)
    monkeypatch.setattr(importlib.import_module("fp4fx.passes.select_kernels"), "KERNELS", (kernel, reference.KERNEL))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 16)).eval()
    policy = fp4fx.Policy(skip_first=0, skip_last=0, activations="nvfp4", compute="fp32")
    model = fp4fx.quantize(model, policy)
    x = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="fp4fx")(x), model(x))
    assert [row.kernels for row in fp4fx.report(model).rows] == [("linear: scaled_mm",)] * 2
