"""The ops `fp4fx_triton::*` and how they are chosen; whole graphs through the interpreter where there is no GPU."""

import dis
import inspect
import pkgutil
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import nn

import fp4fx
from fp4fx import ops
from fp4fx.kernels import reference, triton
from fp4fx.kernels.triton import library, program
from fp4fx.registry import Request, select
from fp4fx.target import Target, target_of

HOPPER = Target("cuda", "a card", frozenset({"sm_90"}))


def request(**changes):
    given = {"op": "linear", "target": HOPPER, "dtype": torch.bfloat16, "n": 64, "k": 64, "quantized_input": False}
    return Request(**{**given, "freezing": True, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"op": "quantize"}, None),
        ({"dtype": torch.float64}, "torch.float64"),
        ({"gradient": True}, "gradient"),
        ({"op": "embedding", "target": Target("cuda", "a card", frozenset({"sm_120"}))}, None),
        ({"target": Target("cuda", "an old card", frozenset({"sm_75"}))}, "an old card (sm_75)"),
        ({"op": "conv", "groups": 64}, "group"),
        ({"op": "conv", "padding": (-1, 0)}, "negative padding"),
        ({"op": "quantize", "scale_rule": "min"}, "found 'min'"),
    ],
)
def test_what_is_refused(changes, reason):
    kernel, refusals = select(request(**changes), (triton.KERNEL, reference.KERNEL))
    if reason is None:
        assert kernel is triton.KERNEL
    else:
        assert kernel is reference.KERNEL
        assert reason in refusals[0]


def test_torch_for_rocm_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in select(request(), (triton.KERNEL, reference.KERNEL))[1][0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert target_of(torch.device("cuda")).capability is None  # whose numbers would be read as NVIDIA's


def test_on_other_devices_they_are_no_choice():
    kernel, refusals = select(request(target=Target("cpu", "a cpu", frozenset())), (triton.KERNEL, reference.KERNEL))
    assert kernel is reference.KERNEL and refusals == ()


def test_ops_have_the_schemas_of_the_bodies():
    for name in triton.OPS:
        mine, theirs = library.op(name)._schema, getattr(torch.ops.fp4fx, name).default._schema
        assert str(mine).replace("fp4fx_triton::", "fp4fx::") == str(theirs)


def test_ops_of_programs_have_the_bits_of_the_others(device):
    w, x = [t.to(device) for t in ops.quantize(torch.randn(20, 40))], torch.randn(3, 40, device=device)
    kernel = [t.to(device) for t in ops.quantize(torch.randn(20, 48))]
    image = torch.randn(2, 16, 5, device=device)
    geometry = [3], [2], [1]
    calls = {
        "linear": ((x, *w, None, 40), {"activation": "relu", "channel_scale": torch.rand(20, device=device)}),
        "dequantize": ((*w, (20, 40), torch.float32), {}),
        "embedding": ((torch.tensor([[3, 19]], device=device), *w, 40, torch.float16), {}),
        "quantize": ((x, w[2]), {"scale_rule": "four_over_six"}),
        "conv": ((image, *kernel, None, 16, *geometry, [1], 1), {}),
        "conv_transpose": ((image, *kernel, None, 16, *geometry, [1], [1], 1), {}),
    }
    assert set(calls) == set(triton.OPS)
    for name, (args, options) in calls.items():
        found, expected = program.op(name)(*args, **options, target=80), library.op(name)(*args, **options)
        for a, b in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (found, expected)), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
        mine, theirs = str(program.op(name)._schema), str(library.op(name)._schema)
        assert mine.replace(", *, int target", "") == theirs.replace("fp4fx_triton::", "fp4fx_cuda::")


def test_kernels_call_functions_by_their_names():
    """Inductor copies the sources of these, and finds none through a module."""
    kernels = 0
    for module in pkgutil.iter_modules(triton.__path__, f"{triton.__name__}."):
        for value in vars(import_module(module.name)).values():
            if type(value).__name__ in ("JITFunction", "InterpretedFunction"):
                names = {i.argval for i in dis.get_instructions(value.fn) if i.opname == "LOAD_GLOBAL"}
                found = [value.fn.__globals__.get(name) for name in names]
                assert [m for m in found if inspect.ismodule(m) and m.__name__.startswith("fp4fx")] == [], value
                kernels += 1
    assert kernels > 30


def test_fakes(device):
    w = [t.to(device) for t in ops.quantize(torch.randn(20, 40))]
    x = torch.randn(3, 40, device=device)
    torch.library.opcheck(library.op("linear"), (x, *w, None, 40), {"activation": "relu", "compute": "fp32"})
    torch.library.opcheck(library.op("dequantize"), (*w, (20, 40), torch.float32))


class Net(nn.Module):
    """One of each op."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.conv = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(32)
        self.up = nn.ConvTranspose2d(32, 32, 2, 2)
        self.head = nn.Linear(32, 16)

    def forward(self, indices):
        x = self.table(indices).permute(0, 3, 1, 2)
        x = self.up(torch.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("activations", [None, "nvfp4"])
def test_a_model_runs_on_them_from_end_to_end(device, monkeypatch, activations):
    if device == "cpu":
        kernel = replace(triton.KERNEL, device=None)
        monkeypatch.setattr(import_module("fp4fx.passes.select_kernels"), "KERNELS", (kernel, reference.KERNEL))
    torch.manual_seed(0)
    policy = fp4fx.Policy(skip_first=0, skip_last=0, embeddings=True, activations=activations, compute="fp32")
    model = fp4fx.quantize(Net().eval(), policy).to(device)
    indices = torch.randint(0, 10, (2, 6, 6), device=device)
    with torch.no_grad():
        expected = model(indices)
        y = torch.compile(model, backend="fp4fx")(indices)
    assert (y - expected).norm() / expected.norm() < 1e-4
    rows = [row for row in fp4fx.report(model).rows if row.kernels]
    assert [row.refusals for row in rows] == [()] * 4
    used = {kernel.split(": ")[1] for row in rows for kernel in row.kernels}
    native = device == "cuda" and torch.cuda.get_device_capability() >= (10, 0) and activations is not None
    assert used == ({"triton", "scaled_mm"} if native else {"triton"})


@pytest.mark.gpu
def test_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    w, image = torch.randn(32, 64), torch.randn(2, 64, 1, 3)
    packed, indices = ops.quantize(w), torch.tensor([3, 31])
    calls = {
        "quantize": lambda f, to: f(to(w)),
        "dequantize": lambda f, to: f(*map(to, packed), (32, 64), torch.float32),
        "embedding": lambda f, to: f(to(indices), *map(to, packed), 64, torch.float32),
        "linear": lambda f, to: f(to(w), *map(to, packed), None, 64, compute="fp32"),
        "conv": lambda f, to: f(to(image), *map(to, packed), None, 64, [1, 1], [1, 2], [0, 0], [1, 1], 1),
    }
    with torch.cuda.device(0):
        for name, call in calls.items():
            found = call(library.op(name), lambda t: t.to("cuda:1"))
            expected = call(getattr(ops, name), lambda t: t)
            for a, b in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (found, expected)), strict=True):
                assert a.device == torch.device("cuda:1")
                torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0.3 if name == "conv" else 1e-4)
