"""The form "cuda" of exported programs: `triton_op`s, the launches in them, and what AOTInductor compiles of these.

Kernels are compiled and launches traced by a process that does not interpret, `programs`; launches are replayed by
one that does.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

import fp4fx
from tests.kernels.triton import programs


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if torch.cuda.is_available():
        pytest.skip("made for a machine without a GPU, which it pretends to have")
    saved = str(tmp_path_factory.mktemp("programs") / "op.pt2")
    return {"saved": saved, **json.loads(output_of(tmp_path_factory, "-m", "tests.kernels.triton.programs", saved))}


def output_of(tmp_path_factory, *arguments):
    cache = str(tmp_path_factory.mktemp("inductor"))
    env = {**os.environ, "TRITON_INTERPRET": "0", "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


CASES = {  # ops, launches, whether the grid of each has a symbolic size
    "mixed": (
        ["embedding", "conv", "linear"],
        {"_dequantize_kernel": True, "conv_kernel": True, "gemm": True, "reduce": True},
    ),
    "w4a4": (
        ["embedding", "conv", "quantize", "linear"],
        {"_dequantize_kernel": True, "conv_kernel": True, "amax_kernel": False, "quantize_kernel": True, "gemm": True,
         "reduce": True},
    ),
    "few rows": (["linear"], {"gemv": False}),
    "many rows": (["linear"], {"_dequantize_kernel": False, "reduce": True}),
    "transposed": (["conv_transpose"], {"conv_kernel": True, "sum_kernel": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_launches_of_a_program(found, name):
    ops, launches = CASES[name]
    case = found[name]
    assert case["ops"] == [f"fp4fx_cuda.{op}.default" for op in ops] and case["refusals"] == ""
    assert case["symbolic"] == list(launches.values()) and case["dense"] == []
    assert set(case["cloned"]) <= {"out_ptr", "y_ptr", "packed_ptr", "scale_ptr"}  # results, no weight
    for replayed in case["launches"]:
        assert [kernel for kernel, _ in replayed] == list(launches)
    limit = 3e-2 if name == "w4a4" else 2e-3  # fp16; a rounding before an activation's codes may change one of them
    assert max(case["errors"]) < limit  # for other batches than the example's too


def test_what_the_kernels_refuse_is_decoded(found):
    reasons = {"fp64": "found torch.float64", "dynamic image": "the height or width of the image is dynamic"}
    for name, reason in reasons.items():
        assert reason in found[name]["refusals"] and found[name]["ops"] == [] and found[name]["symbolic"] == []


def test_a_saved_program_is_loaded_where_its_ops_are_defined(found, tmp_path_factory):
    lines = (
        "import sys, torch",
        "from fp4fx.kernels.triton import program",
        "program.load()",
        "print([str(node.target) for node in torch.export.load(sys.argv[1]).graph.nodes])",
    )
    assert "fp4fx_cuda.linear.default" in output_of(tmp_path_factory, "-c", "\n".join(lines), found["saved"])


def test_aotinductor_compiles_the_launches(found):
    package = found["package"]
    names = [line.partition("(")[0].removeprefix("call_").rpartition("_")[0] for line in package["launched"]]
    assert [name for name in names if not name.startswith("triton_")] == list(CASES["w4a4"][1])
    assert len(package["loads"]) == len(package["launched"]) == len(package["cubins"])
    assert set(package["cubins"].values()) == {b"\x7fELF".hex()} and not package["python"]
    for line, name in zip(package["launched"], names, strict=True):
        if name in ("gemm", "conv_kernel", "_dequantize_kernel"):
            assert "weight_packed" in line and "weight_scale" in line and "weight_global_scale" in line
        if not name.startswith("triton_"):
            assert re.search(r"\bs\d+\b", line), line  # sizes and grid of a batch that is known when it runs


@pytest.mark.gpu
def test_a_package_runs_on_the_gpu(tmp_path):
    if not torch.cuda.is_available() or CUDA_HOME is None:
        pytest.skip("needs a CUDA device, and the headers of CUDA")
    torch.manual_seed(0)
    policy = fp4fx.Policy(skip_first=0, skip_last=0, embeddings=True)
    q = fp4fx.quantize(programs.Mixed().half(), policy).eval().cuda()
    program = torch.export.export(q, (programs.tokens(3).cuda(),), dynamic_shapes=programs.BATCH)
    package = torch._inductor.aoti_compile_and_package(
        fp4fx.lower(program, "cuda", on_fallback="raise"),
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs=programs.KEEP,
    )
    model = torch._inductor.aoti_load_package(package)
    for n in (3, 6):
        x = programs.tokens(n).cuda()
        expected = q(x)
        torch.testing.assert_close(model(x), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
