"""What the compiler makes of a model: every graph before and after the passes, with decisions and kernels beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fp4fx import capture
from fp4fx.backend import rewritten
from fp4fx.errors import PlanError
from fp4fx.lowering import Lowering
from fp4fx.packed import PARTS, Packed, plan_of
from fp4fx.plan import Decision
from fp4fx.policy import Policy


@dataclass(frozen=True)
class Call:
    """One node of a graph that computes or is given something."""

    name: str
    op: str
    """The op's name, e.g. `aten.conv2d` or `fp4fx_cpu.linear`; `input`, `output`, or `folded`: computed beforehand."""
    reads: tuple[str, ...]
    """Names of the calls whose results it reads."""
    stored: tuple[str, ...]
    """Names of the parameters and buffers that it reads."""
    result: str
    """Dtype and shape, e.g. `bf16[1, 64, 56, 56]`; empty where there is none or several."""
    notes: tuple[str, ...] = ()
    """What was decided about a parameter that it reads, by which kernel it runs, and which refused."""

    @property
    def text(self) -> str:
        """The op and what it is given."""
        return f"{self.op}({', '.join((*self.reads, *self.stored))})"


@dataclass(frozen=True)
class Graph:
    """One graph that Dynamo captured."""

    before: tuple[Call, ...]
    after: tuple[Call, ...]
    rewrites: Mapping[str, int]
    """How often each pass rewrote something, in the order of the passes."""

    def mermaid(self, *, after: bool = True) -> str:
        """The graph as a Mermaid flowchart."""
        calls = self.after if after else self.before
        nodes = [f'  {c.name}["{_quoted(c, "<br/>")}"]' for c in calls]
        return "\n".join(["flowchart TD", *nodes, *(f"  {a} --> {b}" for a, b in _edges(calls))]) + "\n"

    def dot(self, *, after: bool = True) -> str:
        """The graph in Graphviz's language."""
        calls = self.after if after else self.before
        nodes = [f'  "{c.name}" [shape=box, label="{_quoted(c, chr(92) + "n")}"];' for c in calls]
        edges = [f'  "{a}" -> "{b}";' for a, b in _edges(calls)]
        return "\n".join(["digraph {", *nodes, *edges, "}"]) + "\n"


@dataclass(frozen=True)
class Explanation:
    """The graphs of one call of a model, in the order in which they ran."""

    graphs: tuple[Graph, ...]

    def __str__(self) -> str:
        """Both forms of every graph as tables, with the passes that did something between them."""
        parts = []
        for number, graph in enumerate(self.graphs, 1):
            done = ", ".join(f"{name} {count}" for name, count in graph.rewrites.items() if count)
            parts += [
                f"graph {number} of {len(self.graphs)}, as captured",
                _table(graph.before),
                f"passes: {done or 'nothing to do'}",
                f"graph {number} of {len(self.graphs)}, for Inductor",
                _table(graph.after),
            ]
        return "\n\n".join(parts)


def explain(model: nn.Module, *inputs: Any, policy: Policy | None = None, **kwargs: Any) -> Explanation:
    """Run a model once and say what `backend="fp4fx"` makes of every graph of it, without compiling.

    As with `torch._dynamo.explain` what this process has compiled is forgotten, and compiled anew at its next call.

    Args:
        model: What `fp4fx.quantize` or `torch.compile` returned, or with a policy any model.
        inputs: The positional arguments of its forward.
        policy: As in `options={"policy": ...}`, for a model that was never quantized.
        kwargs: The keyword arguments of its forward.

    Raises:
        PlanError: `model` is no module.
        BackendError: The policy does not fit a graph.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise PlanError(f"explain: found {type(model).__name__}, expected a torch.nn.Module")
    names, plan = _names(model), plan_of(model)
    planned = {d.site.parameter: d for d in (plan.decisions if plan is not None else ())}
    graphs: list[Graph] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        twin, ctx, counts = rewritten(gm, example_inputs, policy)
        decided = {**planned, **{names[id(p)]: d for p, d in ctx.decisions if id(p) in names}}
        lowered: dict[int, list[Lowering]] = {}
        for tensor, lowering in ctx.lowerings:
            if tensor is not None:
                lowered.setdefault(id(tensor), []).append(lowering)
        before = tuple(_calls(gm, capture.real_tensors(gm, example_inputs), names, decided, {}))
        graphs.append(Graph(before, tuple(_calls(twin, ctx.real, names, {}, lowered)), counts))
        forward: Callable[..., Any] = gm.forward
        return forward

    torch.compiler.reset()
    try:
        torch.compile(model, backend=backend)(*inputs, **kwargs)
    finally:
        torch.compiler.reset()
    return Explanation(tuple(graphs))


def _names(model: nn.Module) -> dict[int, str]:
    """The name of every parameter and buffer, that of a packed part being its parameter's."""
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    for path, module in model.named_modules():
        for attribute in module.nvfp4 if isinstance(module, Packed) else ():
            for part in PARTS:
                names[id(module.get_buffer(f"{attribute}_{part}"))] = f"{path}.{attribute}".lstrip(".")
    return names


def _calls(
    gm: GraphModule,
    real: Mapping[Node, Tensor],
    names: Mapping[int, str],
    decided: Mapping[str, Decision],
    lowered: Mapping[int, list[Lowering]],
) -> Iterable[Call]:
    uses = {key: iter(notes) for key, notes in lowered.items()}
    for node in gm.graph.nodes:
        if node in real:
            continue
        tensors = [real[n] for n in node.all_input_nodes if n in real]
        stored = tuple(dict.fromkeys(names.get(id(tensor), "constant") for tensor in tensors))
        notes = [f"{decided[name].label}: {decided[name].reason}" for name in stored if name in decided]
        for use in (next(uses[id(tensor)], None) for tensor in tensors if id(tensor) in uses):
            if use is not None:
                notes += [f"kernel {use.kernel}", *(f"refused by {refusal}" for refusal in use.refusals)]
        yield Call(
            name=node.name,
            op=_op(node),
            reads=tuple(n.name for n in node.all_input_nodes if n not in real),
            stored=stored,
            result=_result(capture.value(node)),
            notes=tuple(notes),
        )


def _op(node: Node) -> str:
    if node.op == "placeholder":
        return "folded" if node.name.startswith("folded_") else "input"
    if isinstance(node.target, capture.OpOverload):
        return f"{node.target.namespace}.{node.target._opname}"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _result(value: Any) -> str:
    if not isinstance(value, Tensor):
        return ""
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "u8", "int64": "i64"}
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{short.get(dtype, dtype)}[{', '.join(map(str, value.shape))}]"


def _table(calls: Iterable[Call]) -> str:
    rows = [(c.name, c.text, c.result, "; ".join(c.notes)) for c in calls]
    return tabulate(rows, ("", "call", "result", "notes"), disable_numparse=True)


def _edges(calls: Iterable[Call]) -> list[tuple[str, str]]:
    return [(source, call.name) for call in calls for source in call.reads]


def _quoted(call: Call, line: str) -> str:
    words = [call.op, *call.stored, call.result, *call.notes]
    return line.join(word.replace('"', "'") for word in words if word)
