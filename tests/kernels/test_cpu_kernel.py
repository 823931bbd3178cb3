"""When the compiler chooses the CPU kernels, and what it says when it does not."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

import fp4fx
from fp4fx.kernels import KERNELS, cpu
from fp4fx.kernels.cpu import library
from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.fuse_conv import fuse_conv
from fp4fx.passes.fuse_linear import fuse_linear
from fp4fx.passes.select_kernels import select_kernels
from fp4fx.registry import Request, select
from fp4fx.target import Target, target_of
from tests.passes.graphs import Captured, conv, linear

REQUEST = Request(
    op="conv",
    target=Target("cpu", "a processor", frozenset()),
    dtype=torch.bfloat16,
    n=8,
    k=32,
    quantized_input=False,
    freezing=False,
)


def chosen(g):
    """The kernel that the last op got, and the refusals."""
    g.apply(canonicalize, fuse_linear, fuse_conv, select_kernels)
    _, lowering = g.ctx.lowerings[-1]
    return lowering.kernel, " ".join(lowering.refusals)


@pytest.mark.parametrize("freezing", [False, True])
def test_it_is_the_first_choice(cpu_ops, freezing):
    g = Captured(linear(), torch.randn(3, 32), freezing=freezing)
    assert chosen(g) == ("cpu", "")
    assert cpu_ops.linear.default in [n.target for n in g.gm.graph.nodes]
    g.check(tolerance=2e-2)
    g = Captured(conv(nn.Conv2d, 4, 6, 3, padding="same"), torch.randn(1, 4, 5, 5), freezing=freezing)
    assert chosen(g) == ("cpu", "")
    g.check(tolerance=2e-2)


def test_it_refuses_what_requires_a_gradient(cpu_ops):
    layer = linear()
    assert "no backward" in chosen(Captured(layer, torch.randn(3, 32), grad=True))[1]
    layer.requires_grad_(False)
    assert chosen(Captured(layer, torch.randn(3, 32), grad=True)) == ("cpu", "")


def test_it_refuses_fp64_and_negative_padding():
    assert "found torch.float64" in chosen(Captured(linear().double(), torch.randn(3, 32).double()))[1]
    _, reasons = select(replace(REQUEST, padding=(1, -1)), KERNELS)
    assert reasons == ("cpu: negative padding (1, -1)",)


def test_without_a_library_the_reason_is_that_of_the_build(monkeypatch):
    monkeypatch.setattr(library, "_answers", {True: "no C++ compiler found"})
    kernel, reasons = select(REQUEST, KERNELS)
    assert (kernel.name, reasons) == ("inductor", ("cpu: no C++ compiler found",))


def test_on_another_device_it_is_no_choice():
    kernel, reasons = select(replace(REQUEST, target=Target("xpu", "a card", frozenset())), KERNELS)
    assert (kernel.name, reasons) == ("inductor", ())
    assert cpu.KERNEL.device == "cpu"


def test_what_is_asked_later_may_build_what_was_not_built_before(monkeypatch):
    asked = []

    def load(build):
        asked.append(build)
        if not build:
            raise fp4fx.errors.KernelError("not built yet")

    monkeypatch.setattr(library, "_answers", {})
    monkeypatch.setattr(library, "_load", load)
    assert library.load(build=False) == library.load(build=False) == "not built yet"
    assert library.load() is None and library.load(build=False) is None
    assert asked == [False, True]


def test_a_dynamic_batch_runs_at_every_size(cpu_ops):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).eval()
    q = fp4fx.quantize(model, fp4fx.Policy(skip_first=0, skip_last=0, compute="fp32"))
    compiled = torch.compile(q, backend="fp4fx", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 5, 1, 3):
            x = torch.randn(batch, 3, 6, 6)
            torch.testing.assert_close(compiled(x), q(x), rtol=1e-4, atol=1e-4)
    assert {kernel for row in fp4fx.report(q).rows for kernel in row.kernels} == {"conv: cpu", "linear: cpu"}


def test_it_refuses_groups_that_leave_vectors_empty():
    _, reasons = select(replace(REQUEST, n=64, groups=16), KERNELS)
    assert reasons == ("cpu: 16 groups of 4 channels leave most of a vector empty",)
    assert select(replace(REQUEST, n=64, groups=8), KERNELS)[1] == ()


@pytest.mark.parametrize("freezing", [False, True])
def test_compiling_keeps_one_copy_of_the_weights(cpu_ops, freezing):
    """At most 0.6 bytes for each quantized value, over all tensors that are alive."""
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(3)]).eval()
    before = _storages()
    packed = fp4fx.quantize(model, fp4fx.Policy(skip_first=0, skip_last=0))
    x = torch.randn(2, 1024)
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        compiled = torch.compile(packed, backend="fp4fx")
        compiled(x)
        compiled(x)
    values = sum(layer.weight.numel() for layer in model)
    new = sum(storage.nbytes() for pointer, storage in _storages().items() if pointer not in before)
    assert 0.5 * values < new <= 0.6 * values


def test_bf16_between_layers_that_round_to_it_anyway_costs_no_accuracy(cpu_ops):
    if not target_of(torch.device("cpu")).multiplies_bf16:
        pytest.skip("this processor has no products of bf16")
    torch._dynamo.reset()
    model = nn.Sequential(
        nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 64)
    ).eval()
    x, found, counts = torch.randn(300, 64), [], []
    for compute in ("bf16", "bf16_operands"):
        packed = fp4fx.quantize(model, fp4fx.Policy(skip_first=0, skip_last=0, compute=compute))
        compiled = torch.compile(packed, backend="fp4fx", fullgraph=True)
        with torch.no_grad():
            found.append(compiled(x))
        counts.append(sum(row.between.count("") for row in fp4fx.report(packed).rows))
        exact = copy.deepcopy(packed).double()(x.double())
    assert counts == [2, 0]
    errors = [((y - exact).norm() / exact.norm()).item() for y in found]
    assert errors[0] < 1.3 * errors[1] < 1e-2

    mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval()
    packed = [
        fp4fx.quantize(mlp, fp4fx.Policy(skip_first=0, skip_last=0, compute=c)) for c in ("bf16", "bf16_operands")
    ]
    with torch.no_grad():
        narrow, wide = (torch.compile(q, backend="fp4fx")(x) for q in packed)
    assert torch.equal(narrow, wide)


def _storages():
    """The storages of all tensors that are alive, by address; while they are held no other gets their address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage for storage in storages if storage.data_ptr()}
