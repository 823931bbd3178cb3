"""What `test_program` looks at, found by a process that does not interpret: JSON, one entry a case."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

import fp4fx
from fp4fx.kernels.triton import program
from fp4fx.packed import PARTS
from tests.kernels.triton import no_gpu

TARGET = 90
KEEP = {"always_keep_tensor_constants": True, "joint_graph_constant_folding": False}
"""Options of Inductor that keep global scales in memory."""


class Mixed(nn.Module):
    """An embedding, a convolution over its features and a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.conv, self.head = nn.Conv1d(32, 256, 3, padding=1), nn.Linear(256, 48)

    def forward(self, tokens):
        x = torch.relu(self.conv(self.table(tokens).mT))
        return self.head(x.mean(-1))


def head():
    return nn.Sequential(nn.Linear(256, 48), nn.SiLU())


def rows(n):
    return torch.randn(n, 256).half()


def tokens(n):
    return torch.randint(0, 40, (n, 7))


def image(n):
    return torch.randn(n, 32, 5, 6).half()


BATCH = ({0: Dim("batch", max=512)},)


def cases():
    """Of each: model, example, policy, dynamic shapes, batches to replay."""
    return {
        "mixed": (Mixed, tokens(3), {}, BATCH, [tokens(3), tokens(6)]),
        "w4a4": (Mixed, tokens(3), {"activations": "nvfp4"}, BATCH, [tokens(5)]),
        "few rows": (head, rows(2), {}, None, [rows(2)]),
        "many rows": (head, rows(200), {}, BATCH, [rows(150)]),
        "transposed": (lambda: nn.ConvTranspose2d(32, 48, 4, 2, 1), image(2), {}, BATCH, [image(3)]),
        "fp64": (lambda: nn.Linear(32, 32).double(), torch.randn(2, 32).double(), {}, None, []),
        "dynamic image": (lambda: nn.Conv2d(32, 32, 3), image(2), {}, ({2: Dim("height", min=4, max=64)},), []),
    }


def case(model, example, policy, shapes, batches, interpreter):
    """What came of one: ops, launches and the greatest error of a replay, relative to the greatest value."""
    policy = fp4fx.Policy(skip_first=0, skip_last=0, embeddings=True, **policy)
    q = fp4fx.quantize(model() if example.dtype == torch.float64 else model().half(), policy).eval()
    program = no_gpu.export(q, example, shapes)
    refusals = ""
    try:
        lowered = fp4fx.lower(program, "cuda", target=TARGET, on_fallback="raise")
    except fp4fx.FallbackError as error:
        refusals, lowered = str(error), fp4fx.lower(program, "cuda", target=TARGET)
    opened = lowered.run_decompositions({}, decompose_custom_triton_ops=True)
    calls = [node for node in lowered.graph.nodes if node.op == "call_function"]
    launches = opened.graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.triton_kernel_wrapper_functional
    )
    found = {
        "refusals": refusals,
        "ops": [str(node.target) for node in calls if "fp4fx" in str(node.target)],
        "cloned": sorted({name for node in launches for name in node.kwargs["tensors_to_clone"]}),
        "symbolic": [any(isinstance(n, torch.fx.Node) for n in node.kwargs["grid"][0]) for node in launches],
        "dense": [n for n, t in opened.state_dict.items() if t.is_floating_point() and t.dim() > 1],
        "launches": [],
        "errors": [],
    }
    held = {**dict(q.named_parameters()), **dict(q.named_buffers())}
    signature = opened.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for x in batches:
        replay = no_gpu.Replay(opened, interpreter)
        inputs = [
            held[names[node.name]] if node.name in names else x for node in opened.graph.find_nodes(op="placeholder")
        ]
        with torch.no_grad():
            (y,), expected = replay.run(*inputs), q(x)
        found["errors"].append(float((y - expected).abs().max() / expected.abs().max()))
        found["launches"].append(replay.launches)
    return found, lowered


class Op(nn.Module):
    """A call of an op of the form "cuda", which can be saved where a model on CUDA cannot."""

    def __init__(self):
        super().__init__()
        q = fp4fx.nvfp4.quantize(torch.randn(16, 32))
        for name in PARTS:
            self.register_buffer(name, getattr(q, name))

    def forward(self, x):
        return program.op("linear")(x, self.packed, self.scale, self.global_scale, None, 32, target=TARGET)


def main():
    """Of all cases, and the package of one; a program is saved where the argument says."""
    torch.export.save(torch.export.export(Op(), (torch.randn(2, 32),)), sys.argv[1])
    no_gpu.compiles_for(TARGET)
    torch.manual_seed(0)
    found, programs = {}, {}
    with no_gpu.interpreter() as interpreter:
        for name, given in cases().items():
            found[name], programs[name] = case(*given, interpreter)
    no_gpu.told_about_a_gpu(TARGET)
    source, cubins = no_gpu.compiled(programs["w4a4"], **KEEP)
    found["package"] = {
        "launched": [line.strip() for line in source.splitlines() if line.startswith("    call_")],
        "loads": [line.strip() for line in source.splitlines() if "= loadKernel(" in line],
        "cubins": {name: Path(path).read_bytes()[:4].hex() for name, path in cubins.items()},
        "python": "Python.h" in source or "py::" in source,
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
