"""Exported programs: Q/DQ, fused, portable and on the CPU kernels, saved, loaded and compiled where no fp4fx is."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import fp4fx
from fp4fx.kernels.cpu import build, library
from tests.models import Attention, ConvNet, UNet

ALL = fp4fx.Policy(skip_first=0, skip_last=0, compute="fp32")
W4A4 = fp4fx.Policy.w4a4(skip_first=0, skip_last=0, compute="fp32")
needs_kernels = pytest.mark.skipif(library.load() is not None, reason=str(library.load()))


class Mixed(nn.Module):
    """An embedding, a convolution over its features and a head, which is large beside the code of a package."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 256)
        self.conv, self.head = nn.Conv1d(256, 256, 3, padding=1), nn.Linear(256, 8192)

    def forward(self, tokens):
        x = torch.relu(self.conv(self.table(tokens).mT))
        return self.head(x.mean(-1))


def close(found, expected, tolerance=1e-5, *, codes=False):
    """With `codes`, a sum in another order may have given a few activations their other code."""
    if codes:
        assert (found - expected).norm() <= 1e-2 * expected.norm()
        return
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


def ops_of(program):
    """Names of the custom ops in a program, with their number."""
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    found = [match[0] for name in names if (match := re.match(r"fp4fx\w*\.\w+", name))]
    return {name: found.count(name) for name in found}


def is_packed(program):
    """Whether no tensor of a program is a dense weight: every float has at most one axis longer than 1."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    return not any(t.is_floating_point() and sum(n > 1 for n in t.shape) > 1 for t in tensors)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("policy", [ALL, W4A4], ids=["w4a16", "w4a4"])
@pytest.mark.parametrize("make", [ConvNet, UNet])
def test_the_forms_of_a_program(make, policy, strict):
    q, x = fp4fx.quantize(make().eval(), policy), torch.randn(2, 3, 16, 16)
    program = torch.export.export(q, (x,), strict=strict)
    sites = len(fp4fx.plan(make(), policy).quantized)
    assert ops_of(program)["fp4fx.dequantize"] == sites and is_packed(program)
    before = program.graph_module.code

    fused, portable = fp4fx.lower(program, "fused"), fp4fx.lower(program, "portable")
    found = ops_of(fused)
    assert sum(found.get(f"fp4fx.{op}", 0) for op in ("linear", "conv", "conv_transpose")) == sites
    assert "fp4fx.dequantize" not in found and ("fp4fx.quantize" in found) == (policy is W4A4)
    assert ops_of(portable) == {}
    assert program.graph_module.code == before
    with torch.no_grad():
        for other in (program, fused, portable):
            assert is_packed(other)
            close(other.module()(x), q(x), codes=other is fused and policy is W4A4)


@needs_kernels
@pytest.mark.parametrize("policy", [ALL, W4A4], ids=["w4a16", "w4a4"])
def test_the_cpu_kernels_of_a_program(policy):
    q, x = fp4fx.quantize(UNet().eval(), policy), torch.randn(2, 3, 16, 16)
    program = fp4fx.lower(torch.export.export(q, (x,)), "cpu", on_fallback="raise")
    found = ops_of(program)
    assert found["fp4fx_cpu.conv"] + found["fp4fx_cpu.conv_transpose"] == 5 and is_packed(program)
    assert not any(name.startswith("fp4fx.") for name in found)
    y = program.module()(x)
    close(y, q(x), codes=policy is W4A4)
    assert y.stride() == q(x).stride()


def test_what_the_cpu_kernels_refuse_is_decoded_by_aten_or_an_error(caplog):
    q, x = fp4fx.quantize(nn.Linear(32, 8).double(), ALL), torch.randn(2, 32).double()
    program = torch.export.export(q, (x,))
    with caplog.at_level("INFO", logger="fp4fx"):
        lowered = fp4fx.lower(program, "cpu")
    assert ops_of(lowered) == {} and "found torch.float64" in caplog.text
    close(lowered.module()(x), q(x))
    with pytest.raises(fp4fx.FallbackError, match=r"fp4fx::linear \(\w+\): cpu: found torch.float64"):
        fp4fx.lower(program, "cpu", on_fallback="raise")


@pytest.mark.parametrize("to", ["fused", "portable", "cpu"])
def test_dynamic_shapes_stay_dynamic(to):
    q, x = fp4fx.quantize(ConvNet().eval(), W4A4), torch.randn(2, 3, 8, 8)
    shapes = {"x": {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}}
    lowered = fp4fx.lower(torch.export.export(q, (x,), dynamic_shapes=shapes), to)
    for size in ((5, 3, 8, 8), (2, 3, 12, 9)):
        x = torch.randn(size)
        close(lowered.module()(x), q(x), codes=to != "portable")


@pytest.mark.parametrize("to", ["fused", "portable", pytest.param("cpu", marks=needs_kernels)])
def test_defaults_that_an_export_leaves_out(to):
    q, x = fp4fx.quantize(nn.Linear(32, 8), fp4fx.Policy(skip_first=0, skip_last=0)), torch.randn(2, 32)
    program = torch.export.export(q, (x,))
    assert "bf16" not in program.graph_module.code  # compute, the last argument
    lowered = fp4fx.lower(program, to)
    assert ops_of(lowered) == {"fused": {"fp4fx.linear": 1}, "cpu": {"fp4fx_cpu.linear": 1}}.get(to, {})
    close(lowered.module()(x), q(x), 2e-2)


def test_attention_is_exported_in_training_mode_too():
    q, x = fp4fx.quantize(Attention(), ALL), torch.randn(2, 3, 8)
    program = torch.export.export(q, (x,))
    close(fp4fx.lower(program, "fused").module()(x), q(x))
    assert ops_of(fp4fx.lower(program, "fused"))["fp4fx.linear"] == 4


def test_what_is_asked_for_is_checked():
    program = torch.export.export(fp4fx.quantize(nn.Linear(32, 8), ALL), (torch.randn(2, 32),))
    with pytest.raises(fp4fx.BackendError, match="found to='onnx', expected one of 'portable'"):
        fp4fx.lower(program, "onnx")
    with pytest.raises(fp4fx.BackendError, match="on_fallback='ignore'"):
        fp4fx.lower(program, "cpu", on_fallback="ignore")
    with pytest.raises(fp4fx.BackendError, match=r"found a Linear, expected the result of torch\.export"):
        fp4fx.lower(nn.Linear(3, 4), "portable")
    with pytest.raises(fp4fx.BackendError, match="found target=90 with to='cpu', only 'cuda' is for a target"):
        fp4fx.lower(program, "cpu", target=90)
    with pytest.raises(
        fp4fx.FallbackError, match=r"fp4fx::linear \(\w+\): triton: found a model on cpu, expected cuda; move"
    ):
        fp4fx.lower(program, "cuda", target=90, on_fallback="raise")
    for target in (9, 9.0, "sm_90"):
        with pytest.raises(fp4fx.BackendError, match=f"found target={target!r}, expected a compute capability times"):
            fp4fx.lower(program, "cuda", target=target)
    if not torch.cuda.is_available():
        with pytest.raises(fp4fx.BackendError, match="found no GPU; pass target="):
            fp4fx.lower(program, "cuda")


def alone(code, *args):
    """Run Python that cannot import fp4fx."""
    code = f"import sys; sys.modules['fp4fx'] = None\nimport torch\n{code}"
    run = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


RUN = """
tokens, expected = torch.load(sys.argv[2])
found = model(tokens)
torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """An exported program of `Mixed`, and a file with tokens and what the quantized model answers."""
    torch.manual_seed(0)
    q = fp4fx.quantize(Mixed().eval(), fp4fx.Policy(skip_first=0, skip_last=0, compute="fp32", embeddings=True))
    tokens = torch.randint(0, 40, (3, 7))
    data = tmp_path_factory.mktemp("data") / "data.pt"
    with torch.no_grad():
        torch.save((tokens, q(tokens)), data)
    program = torch.export.export(q, (tokens,), dynamic_shapes=({0: Dim("batch", max=64)},))
    return program, data


def test_a_portable_program_is_loaded_where_no_fp4fx_is(program, tmp_path):
    program, data = program
    file = tmp_path / "portable.pt2"
    torch.export.save(fp4fx.lower(program, "portable"), file)
    alone("model = torch.export.load(sys.argv[1]).module()" + RUN, file, data)


def test_a_fused_program_is_loaded_with_fp4fx(program, tmp_path):
    program, data = program
    torch.export.save(fp4fx.lower(program, "fused"), tmp_path / "fused.pt2")
    loaded = torch.export.load(tmp_path / "fused.pt2")
    tokens, expected = torch.load(data)
    close(loaded.module()(tokens), expected)
    assert set(ops_of(loaded)) == {"fp4fx.embedding", "fp4fx.conv", "fp4fx.linear"}


@needs_kernels
def test_a_program_on_the_cpu_kernels_needs_their_library_alone(program, tmp_path):
    program, data = program
    file = tmp_path / "cpu.pt2"
    torch.export.save(fp4fx.lower(program, "cpu"), file)
    load = "torch.ops.load_library(sys.argv[3])\nmodel = torch.export.load(sys.argv[1]).module()"
    alone(load + RUN, file, data, build.library())


CPP = Path(__file__).parent / "aoti.cpp"


def compiled(program, path):
    """An AOTInductor package."""
    return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def cpp_program(folder):
    """The C++ program that runs a package, without Python."""
    torch_folder, binary = Path(torch.__file__).parent, folder / "aoti"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    includes = [f"-isystem{torch_folder / name}" for name in ("include", "include/torch/csrc/api/include")]
    libraries = [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-Wl,--no-as-needed"]
    linked = ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    command = ["g++", "-std=c++20", "-O0", abi, *includes, str(CPP), *libraries, *linked, "-o", str(binary)]
    subprocess.run(command, check=True)
    return binary


@pytest.fixture(scope="module")
def cpp(tmp_path_factory):
    return cpp_program(tmp_path_factory.mktemp("cpp"))


@pytest.mark.parametrize("to", ["portable", pytest.param("cpu", marks=needs_kernels)])
def test_an_aotinductor_package_runs_without_fp4fx_and_without_python(to, program, cpp, tmp_path):
    program, data = program
    dense = sum(t.numel() for name, t in program.state_dict.items() if name.endswith("_packed")) * 2 * 4
    package = compiled(fp4fx.lower(program, to), tmp_path / "model.pt2")
    with zipfile.ZipFile(package) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    assert sum(size for name, size in sizes.items() if not name.endswith((".cpp", ".json"))) < dense / 2, sizes

    kernels = [str(build.library())] if to == "cpu" else []
    load = "".join(f"torch.ops.load_library({library!r})\n" for library in kernels)
    alone(f"{load}model = torch._inductor.aoti_load_package(sys.argv[1])" + RUN, package, data)

    tokens, expected = torch.load(data)
    given, found = tmp_path / "tokens", tmp_path / "found"
    given.write_bytes(tokens.numpy().tobytes())
    subprocess.run([cpp, package, given, *map(str, tokens.shape), found, *kernels], check=True)
    close(torch.from_file(str(found), size=expected.numel()).view_as(expected), expected)
