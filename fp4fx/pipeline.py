"""Runs the passes over a graph: observe, eliminate dead code, lint, verify the dialect, log, dump."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fp4fx import capture
from fp4fx.errors import Error, PassError
from fp4fx.folding import Folded
from fp4fx.graph_sites import COMPUTE_OPS
from fp4fx.lowering import Lowering
from fp4fx.plan import Decision
from fp4fx.policy import Policy

log = logging.getLogger(__name__)


class Dialect(Enum):
    """What kinds of fp4fx ops a graph may hold."""

    ATEN = "no fp4fx op"
    QDQ = "quantize, dequantize and fake_quantize only"
    FUSED = "fused ops; no dequantize next to an op that could have eaten it"


@dataclass
class Context:
    """What the passes know beside the graph, and what they found out."""

    real: Mapping[Node, Tensor]
    """The real tensor behind every parameter and buffer."""
    policy: Policy | None = None
    """For a model that was never quantized."""
    freezing: bool = False
    unfused: str = ""
    """Why every op stays as it was captured, if it does."""
    refusals: dict[Node, str] = field(default_factory=dict)
    """Why a decoded weight or activation could not be eaten by the op that reads it, by dequantize node."""
    folded: list[Folded] = field(default_factory=list)
    """What is computed outside the graph, in the order of the inputs that it adds."""
    notes: list[tuple[Tensor, str]] = field(default_factory=list)
    """Parameters of rank 2 or more that are no site of the graph, with the reason."""
    decisions: list[tuple[Tensor, Decision]] = field(default_factory=list)
    """What the policy decided, by parameter, for a model that was never quantized."""
    between: dict[Node, str] = field(default_factory=dict)
    """Why a fused op of fp32 answers in fp32 (see the pass `narrow`), empty where it answers in bf16."""
    lowerings: list[tuple[Tensor | None, Lowering]] = field(default_factory=list)
    """How every fp4fx op is run, by the packed buffer or parameter it stores; None for an activation's."""


Rewrite = Callable[[GraphModule, Context], int]


@dataclass(frozen=True)
class Pass:
    """A rewrite and its place: why it stands where it stands, and the dialect it leaves behind."""

    rewrite: Rewrite
    reason: str
    leaves: Dialect | None = None

    @property
    def name(self) -> str:
        """The rewrite's own name."""
        return self.rewrite.__name__

    def bound(self, ctx: Context) -> Callable[[GraphModule], int]:
        """The rewrite as a function of the graph alone."""
        return lambda gm: self.rewrite(gm, ctx)


def run(gm: GraphModule, ctx: Context, passes: Sequence[Pass]) -> dict[str, int]:
    """Apply the passes in order; returns the number of rewrites of each.

    A pass that `torch._inductor.config.disabled_passes` names (`fp4fx_<name>`) is left out, and dialects not verified.

    Raises:
        PassError: a pass failed or left an invalid graph; names it and the passes that ran before.
    """
    counts: dict[str, int] = {}
    switched_off = False
    for step in passes:
        try:
            count = capture.observed(gm, f"fp4fx_{step.name}", step.bound(ctx))
            switched_off |= count is None
            counts[step.name] = count or 0
            capture.eliminate_dead_code(gm)
            gm.graph.lint()
            if step.leaves is not None and not switched_off:
                verify(gm, ctx, step.leaves)
        except Error:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            before = ", ".join(counts) or "none"
            raise PassError(
                f"pass {step.name} failed: {type(error).__name__}: {error} (passes before it: {before})"
            ) from error
        log.debug("%s: %s", step.name, "switched off" if count is None else f"{count} rewrites")
        if count:
            capture.dump(gm, f"fp4fx_{step.name}")
    gm.recompile()
    return counts


_QDQ = ("quantize", "dequantize", "fake_quantize")


def verify(gm: GraphModule, ctx: Context, dialect: Dialect) -> None:
    """Refuse a graph that is not of the dialect.

    Raises:
        PassError: names the offending node.
    """
    for node in gm.graph.nodes:
        name = op_name(node)
        if name is None:
            continue
        if dialect is Dialect.ATEN:
            found = f"fp4fx::{name} in a graph that may hold {dialect.value}"
            raise PassError(f"{found}: this model is quantized already; compile it without options['policy']")
        if dialect is Dialect.QDQ and name not in _QDQ:
            raise PassError(f"{node.format_node()} in a graph that may hold {dialect.value}")
        if dialect is Dialect.FUSED and name == "dequantize" and node not in ctx.refusals:
            eater = next((user for user in node.users if _weight_of(user) is node), None)
            if eater is not None:
                raise PassError(f"{node} was not fused into {eater} and no reason was given")


def _weight_of(node: Node) -> Any:
    """The weight of a compute op that has a fused form, or None."""
    compute = COMPUTE_OPS.get(node.target)
    return capture.arguments(node)[compute.weight] if compute is not None and compute.fuses else None


def op_name(node: Node) -> str | None:
    """The name under `fp4fx::` of the op that a node calls, or None."""
    return _name_in(node, "fp4fx")


def aten_name(node: Node) -> str | None:
    """The name under `aten::` of the op that a node calls, or None."""
    return _name_in(node, "aten")


def _name_in(node: Node, namespace: str) -> str | None:
    target = node.target
    if node.op == "call_function" and isinstance(target, capture.OpOverload) and target.namespace == namespace:
        return target._opname
    return None
