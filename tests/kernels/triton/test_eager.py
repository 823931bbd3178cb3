"""The codec's ops in eager mode on CUDA: by the kernels, with the bits of the bodies."""

import pytest
import torch

from fp4fx import nvfp4, ops
from fp4fx.errors import PolicyError
from fp4fx.kernels import encoding
from fp4fx.kernels.triton import dequantize, eager, quantize


@pytest.fixture
def ran(monkeypatch):
    """The names of the kernels that ran."""
    names = []
    for module, name in ((quantize, "quantize"), (dequantize, "dequantize")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=kernel, n=name: names.append(n) or f(*a))
    return names


def call(name, device, **more):
    torch.manual_seed(0)
    x = torch.randn(6, 40).to(device)
    if name in ("quantize", "fake_quantize"):
        return (x,), more
    packed = [t.to(device) for t in nvfp4.quantize_rows(x)]
    rest = ((6, 40), torch.float32) if name == "dequantize" else (40, torch.float16)
    return (*([torch.tensor([5, 0, 5], device=device)] if name == "embedding" else []), *packed, *rest), more


@pytest.mark.parametrize(
    ("name", "more", "kernels"),
    [
        ("quantize", {}, ["quantize"]),
        ("quantize", {"scale_rule": "search"}, ["quantize"]),
        ("quantize", {"block_rows": 16}, ["quantize"]),
        ("fake_quantize", {"order": "channels"}, ["quantize", "dequantize"]),
        ("dequantize", {}, ["dequantize"]),
        ("embedding", {}, ["dequantize"]),
    ],
)
def test_kernels_give_the_bits_of_the_bodies(name, more, kernels, device, ran):
    args, more = call(name, device, **more)
    op = getattr(torch.ops.fp4fx, name) if device == "cuda" else eager.BODIES[name]
    found, expected = op(*args, **more), getattr(ops, name)(*args, **more)
    for a, b in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (found, expected)), strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    assert ran == kernels


@pytest.mark.parametrize("order", ["rows", "conv"])
def test_a_weight_is_encoded_by_the_kernel(order, device, ran, monkeypatch):
    monkeypatch.setitem(encoding.KERNELS, device, eager.quantize)
    weight = torch.randn(8, 4, 3, 3, device=device, generator=torch.Generator(device).manual_seed(0))
    for how in ({"scale_rule": "search"}, {"block": (16, 16)}):
        found = encoding.quantize(weight, order=order, **how)
        expected = nvfp4.quantize(weight, order=order, **how)
        assert all(torch.equal(getattr(found, part), getattr(expected, part)) for part in ("packed", "scale"))
        assert found.global_scale == expected.global_scale and found.order == order
    assert ran == ["quantize"] * 2
    k = nvfp4.row_length(weight.shape, order)  # weighted errors are the definition's
    encoding.quantize(weight, scale_rule="search", order=order, importance=torch.ones(k, device=device))
    assert ran == ["quantize"] * 2


def test_what_the_kernels_do_not_take_is_the_bodies(device, ran):
    packed = [t.to(device) for t in nvfp4.quantize_rows(torch.randn(3, 16))]
    wide = eager.BODIES["dequantize"](*packed, (3, 16), torch.float64)
    assert torch.equal(wide, ops.dequantize(*packed, (3, 16), torch.float64))
    with pytest.raises(PolicyError, match="four_over_six"):
        eager.BODIES["quantize"](torch.randn(3, 16, device=device), scale_rule="min")
    assert ran == []


def test_where_triton_does_not_run_the_log_says_why(monkeypatch, caplog, ran):
    monkeypatch.setattr(eager.triton, "missing", lambda _: "no reason")
    eager._runs_on.cache_clear()
    with caplog.at_level("INFO", logger=eager.__name__):
        for _ in range(2):
            eager.BODIES["quantize"](torch.randn(3, 16))
    eager._runs_on.cache_clear()
    assert [record.getMessage() for record in caplog.records] == ["no kernels on cpu in eager mode: no reason"]
    assert ran == []


def test_cuda_has_them_and_the_cpu_has_not():
    for name in eager.BODIES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fp4fx::{name}", "CUDA")
    for name in ("linear", "conv", "conv_transpose"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"fp4fx::{name}", "CUDA")
