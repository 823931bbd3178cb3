"""The backend from end to end on small models: values, modes of running, packed bytes, options, reports."""

import gc
import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import fp4fx
from fp4fx.packed import Packed
from tests.machine import first_kernel
from tests.models import Attention, ConvNet, Tied, UNet

ALL = fp4fx.Policy(skip_first=0, skip_last=0, compute="fp32")
W4A4 = fp4fx.Policy.w4a4(skip_first=0, skip_last=0, compute="fp32")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def kernels(model):
    """`op: kernel` of every quantized site, from the report."""
    return [kernel for row in fp4fx.report(model).rows for kernel in row.kernels]


def check(model, *inputs, tolerance=1e-5, **kwargs):
    """Compiled equals eager up to the order of fp32 sums; returns the compiled model."""
    compiled = torch.compile(model, backend="fp4fx", fullgraph=True, **kwargs)
    with torch.no_grad():
        expected, found = model(*inputs), compiled(*inputs)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    return compiled


@pytest.mark.parametrize("policy", [ALL, W4A4], ids=["w4a16", "w4a4"])
@pytest.mark.parametrize("make", [ConvNet, UNet])
def test_compiled_equals_eager(make, policy):
    q = fp4fx.quantize(make().eval(), policy)
    check(q, torch.randn(2, 3, 16, 16))
    found = kernels(q)
    assert len(found) == len(fp4fx.plan(make(), policy).quantized)
    assert set(found) <= {f"{op}: {first_kernel()}" for op in ("conv", "conv_transpose", "linear")}


def test_attention_is_fused_through_its_function():
    q = fp4fx.quantize(Attention().eval(), ALL)
    check(q, torch.randn(2, 3, 8))
    assert kernels(q) == [f"linear: {first_kernel()}"] * 4


def test_an_embedding_and_its_tied_head():
    q = fp4fx.quantize(Tied().eval(), replace(ALL, embeddings=True))
    check(q, torch.tensor([[1, 2, 39]]))
    assert set(kernels(q)) == {f"linear: {first_kernel()}", f"embedding: {first_kernel()}"}


def test_a_dynamic_batch_shares_one_artifact():
    q, calls = fp4fx.quantize(ConvNet().eval(), W4A4), []
    from fp4fx.backend import fp4fx as backend

    def counting(gm, inputs):
        calls.append(gm)
        return backend(gm, inputs)

    compiled = torch.compile(q, backend=counting, fullgraph=True, dynamic=True)
    with torch.no_grad():
        first = compiled(torch.randn(2, 3, 12, 12))
        graphs = len(calls)  # Dynamo may capture twice: it finds out that BatchNorm's floats are constants
        for batch in (5, 3, 2):
            x = torch.randn(batch, 3, 12, 12)
            torch.testing.assert_close(compiled(x), q(x), rtol=1e-5, atol=1e-5)
    assert len(calls) == graphs and first.shape == (2, 10)


def dense_copies(numels):
    """Live floating-point tensors with as many values as one of the quantized weights."""
    gc.collect()
    tensors = [
        o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and type(o) is not torch._subclasses.FakeTensor
    ]
    return [t for t in tensors if t.is_floating_point() and t.numel() in numels]


@pytest.mark.parametrize("freezing", [False, True])
def test_the_compiled_graph_holds_packed_bytes(freezing):
    """With freezing on, Inductor folds what depends on constants alone; the packed bytes must survive that."""
    model = nn.Sequential(
        nn.Linear(48, 112), nn.ReLU(), nn.Linear(112, 80), nn.Unflatten(1, (5, 16)), nn.Conv1d(5, 7, 3)
    ).eval()
    q = fp4fx.quantize(model, ALL)
    numels = {48 * 112, 112 * 80, 5 * 7 * 3}
    del model
    assert dense_copies(numels) == []
    with torch._inductor.config.patch(freezing=freezing):
        compiled = check(q, torch.randn(3, 48))
    assert dense_copies(numels) == []
    kernel = first_kernel(freezing=freezing)
    assert kernels(q) == [f"linear: {kernel}", f"linear: {kernel}", f"conv: {kernel}"]
    assert compiled is not None


@pytest.mark.parametrize("freezing", [False, True])
def test_an_unfused_weight_stays_packed_too(freezing):
    class Standardised(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)

    q = fp4fx.quantize(nn.Sequential(Standardised(48, 112)).eval(), ALL)
    with torch._inductor.config.patch(freezing=freezing):
        compiled = check(q, torch.randn(3, 48))
    assert dense_copies({48 * 112}) == [] and compiled is not None
    (row,) = fp4fx.report(q).rows
    assert row.kernels[0].startswith("dequantize") and "its decoded value is read by" in row.refusals[0]


def test_two_frozen_models_of_one_shape_do_not_share_their_scales():
    """Inductor's cache would hand the second model the first one's global scale, a 0-dim constant under freezing."""
    for seed in range(3):
        torch._dynamo.reset()
        torch.manual_seed(seed)
        q = fp4fx.quantize(nn.Sequential(nn.Linear(48, 112)).eval(), ALL)
        with torch._inductor.config.patch(freezing=True):
            check(q, torch.randn(3, 48))


def test_inference_mode_and_no_grad_and_autocast():
    q = fp4fx.quantize(ConvNet().eval(), ALL)
    compiled = torch.compile(q, backend="fp4fx", fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), q(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = q(x), compiled(x)
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    """Weight only: fused kernels round to bf16 less often, which a quantized activation would make another code."""
    q = fp4fx.quantize(ConvNet().eval(), ALL).to(dtype)
    check(q, torch.randn(2, 3, 8, 8, dtype=dtype), tolerance=3e-2)


def test_gradients_flow_through_the_compiled_graph():
    for policy in (ALL, W4A4):
        q = fp4fx.quantize(ConvNet().train(), policy)
        x = torch.randn(2, 3, 8, 8)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        q.zero_grad()
        q(a).square().sum().backward()
        eager = {n: p.grad.clone() for n, p in q.named_parameters() if p.grad is not None}
        q.zero_grad()
        torch._dynamo.reset()
        torch.compile(q, backend="fp4fx", fullgraph=True)(b).square().sum().backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4 * float(a.grad.abs().max()))
        largest = max(float(g.abs().max()) for g in eager.values())
        assert {"body.bias", "head.bias", "bn.weight"} <= eager.keys()
        for name, p in q.named_parameters():
            torch.testing.assert_close(p.grad, eager[name], rtol=1e-3, atol=1e-5 * largest)


def test_a_graph_break_works():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    q = fp4fx.quantize(Broken(), ALL)
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(q, backend="fp4fx")(x), q(x), rtol=1e-5, atol=1e-5)
    assert kernels(q) == [f"linear: {first_kernel()}"] * 2


def test_options_are_checked():
    q = fp4fx.quantize(nn.Linear(32, 8), ALL)
    for options, message in (
        ({"polizy": 1}, "polizy"),
        ({"policy": "all"}, "found str"),
        ({"on_fallback": "ignore"}, "ignore"),
        ({"policy": fp4fx.Policy(activations="nvfp4-static")}, "example_inputs"),
    ):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
            torch.compile(q, backend="fp4fx", options=options)(torch.randn(2, 32))


def test_options_of_inductor_and_modes_pass_through():
    q = fp4fx.quantize(nn.Linear(32, 8), ALL)
    check(q, torch.randn(2, 32), options={"epilogue_fusion": False})
    torch._dynamo.reset()
    check(q, torch.randn(2, 32), mode="max-autotune-no-cudagraphs")


def test_on_fallback_raise_turns_a_refusal_into_an_error():
    q = fp4fx.quantize(nn.Linear(32, 8).double(), ALL)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"cpu: found torch\.float64"):
        torch.compile(q, backend="fp4fx", options={"on_fallback": "raise"})(torch.randn(2, 32).double())


def test_a_pass_that_breaks_names_those_before_it():
    from fp4fx.pipeline import Context, Pass, run

    def harmless(gm, ctx):
        return 0

    def broken(gm, ctx):
        raise ValueError("boom")

    gm = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(fp4fx.PassError, match=r"broken failed: ValueError: boom \(passes before it: harmless\)"):
        run(gm, Context(real={}), [Pass(harmless, ""), Pass(broken, "")])


def test_a_pass_can_be_switched_off():
    q = fp4fx.quantize(ConvNet().eval(), ALL)
    check(q, torch.randn(2, 3, 8, 8), options={"disabled_passes": "fp4fx_fuse_conv"})
    assert sorted(kernels(q)) == [f"dequantize: {first_kernel()}"] * 3 + [f"linear: {first_kernel()}"]


def test_it_logs_what_it_did(caplog):
    q = fp4fx.quantize(ConvNet().eval(), ALL)
    with caplog.at_level(logging.INFO, logger="fp4fx"):
        check(q, torch.randn(2, 3, 8, 8))
    assert any("fuse_conv 3" in r.message and "fuse_linear 1" in r.message for r in caplog.records)
    assert any("the passes took" in r.message and r.args[-1] > 0 for r in caplog.records)


def test_the_graphs_between_the_passes_are_traced(tmp_path):
    code = """
import torch, fp4fx
q = fp4fx.quantize(torch.nn.Linear(32, 8), fp4fx.Policy(skip_first=0, skip_last=0))
with torch.no_grad():
    torch.compile(q, backend="fp4fx")(torch.randn(2, 32))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TORCH_TRACE": str(tmp_path)})
    traced = "".join(file.read_text() for file in tmp_path.iterdir())
    assert "fp4fx_fuse_linear" in traced and "torch.ops.fp4fx.linear.default" in traced


def test_the_backend_is_found_without_importing_fp4fx():
    code = (
        "import torch; assert 'fp4fx' in torch._dynamo.list_backends(); import sys; assert 'fp4fx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_compile_and_run_one_model():
    from concurrent.futures import ThreadPoolExecutor

    q = fp4fx.quantize(ConvNet().eval(), ALL)
    compiled = torch.compile(q, backend="fp4fx")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = compiled(x)

    def call(_):
        with torch.no_grad():
            return compiled(x)

    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(call, range(16)):
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(q.body, Packed)
