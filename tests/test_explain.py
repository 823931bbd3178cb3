import re

import pytest
import torch
from torch import nn

import fp4fx

ALL = fp4fx.Policy(skip_first=0, skip_last=0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 16)
        self.gate = nn.Linear(32, 16)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(x) * self.gate(x)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(1, 16, 8, 8)


def find(calls, op):
    return [call for call in calls if call.op == op]


@torch.no_grad()
def test_a_quantized_model_before_and_after(x):
    model = Block().eval()
    policy = fp4fx.Policy(skip_first=0, skip_last=0, exclude=("gate.weight",))
    qmodel = fp4fx.quantize(model, policy)
    expected = qmodel(x)
    explanation = fp4fx.explain(qmodel, x)
    (graph,) = explanation.graphs
    assert [(c.stored, c.notes) for c in find(graph.before, "fp4fx.dequantize")] == [
        (("conv.weight",), ("W4A16: no rule keeps it",)),
        (("head.weight",), ("W4A16: no rule keeps it",)),
    ]
    (conv,) = find(graph.after, "fp4fx_cpu.conv")
    assert conv.stored == ("conv.weight",)
    assert conv.notes == ("kernel cpu",)
    assert conv.result == "fp32[1, 32, 8, 8]"
    assert {call.op for call in graph.after if call.name in conv.reads} == {"aten.contiguous", "folded"}
    assert not find(graph.after, "relu") and graph.rewrites["fuse_conv"] == 1
    assert [c.stored for c in find(graph.after, "aten.linear")] == [("gate.weight", "gate.bias")]
    text = str(explanation)
    assert "graph 1 of 1, as captured" in text and re.search(r"passes: .*fuse_conv 1", text)
    assert torch.equal(qmodel(x), expected)
    assert not fp4fx.report(qmodel).rows[0].kernels  # nothing was compiled


@torch.no_grad()
def test_a_dense_model_with_a_policy_and_a_compiled_one(x):
    model = Block().eval()
    (graph,) = fp4fx.explain(torch.compile(model), x, policy=ALL).graphs
    (conv,) = find(graph.before, "conv2d")
    assert (conv.stored, conv.notes) == (("conv.weight",), ("W4A16: no rule keeps it",))
    assert len(find(graph.after, "fp4fx_cpu.linear")) == 2


@torch.no_grad()
def test_a_refusal_is_beside_its_node(x):
    model = fp4fx.quantize(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=4)).eval(), ALL)
    (graph,) = fp4fx.explain(model, x).graphs
    notes = [note for call in graph.after for note in call.notes]
    assert any(note.startswith("refused by cpu: ") for note in notes)


@torch.no_grad()
def test_a_graph_break_gives_two_graphs(x):
    class Broken(Block):
        def forward(self, x):
            y = self.conv(x)
            torch._dynamo.graph_break()
            return self.norm(y)

    explanation = fp4fx.explain(fp4fx.quantize(Broken().eval(), ALL), x)
    assert len(explanation.graphs) == 2
    assert "graph 2 of 2, for Inductor" in str(explanation)


@torch.no_grad()
def test_diagrams_have_every_node_and_edge(x):
    (graph,) = fp4fx.explain(fp4fx.quantize(Block().eval(), ALL), x).graphs
    edges = {(source, call.name) for call in graph.after for source in call.reads}
    mermaid, dot = graph.mermaid(), graph.dot()
    assert set(re.findall(r"^  (\w+) --> (\w+)$", mermaid, re.MULTILINE)) == edges
    assert set(re.findall(r'^  "(\w+)" -> "(\w+)";$', dot, re.MULTILINE)) == edges
    assert mermaid.startswith("flowchart TD\n") and dot.startswith("digraph {\n")
    for call in graph.after:
        assert f'  {call.name}["{call.op}' in mermaid
        assert f'  "{call.name}" [shape=box, label="{call.op}' in dot
    assert "fp4fx.dequantize" in graph.mermaid(after=False)


def test_what_is_no_module_is_refused(x):
    with pytest.raises(fp4fx.PlanError, match="explain: found function"):
        fp4fx.explain(lambda y: y, x)
