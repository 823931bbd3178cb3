"""bf16 between the layers of an fp32 model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fp4fx.capture import STANDS_IN, arguments, emit, fake_mode, mutated, storages, value
from fp4fx.dataflow import CUTS, RESHAPES, TRANSPOSES
from fp4fx.dataflow import op_name as name_of
from fp4fx.passes.replay import is_context_switch
from fp4fx.passes.select_kernels import choose
from fp4fx.passes.spellings import is_identity
from fp4fx.pipeline import Context, op_name
from fp4fx.target import target_of

aten = torch.ops.aten

_DTYPE, _RESIDUAL, _COMPUTE = -5, -3, -1
"""Where a fused op takes them."""

_CARRIERS = RESHAPES | TRANSPOSES | CUTS | {"contiguous", "detach", "alias", "expand", "squeeze", "movedim"}
"""Calls that give the values of their first argument in its dtype."""

_FEW = 1 << 14
"""Values up to which a result lies in the first-level cache, where half the bytes save no time."""

_LOOPS = """
add iadd radd sub isub rsub mul imul div truediv itruediv neg pow square abs exp log sqrt rsqrt reciprocal
maximum minimum clamp clamp_min clamp_max clip where lerp addcmul
relu relu6 silu gelu hardswish hardsigmoid hardtanh sigmoid tanh leaky_relu elu mish softplus glu
softmax log_softmax layer_norm batch_norm group_norm rms_norm instance_norm normalize
mean sum amax max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool2d interpolate pad
cat concat stack size sym_size
"""
_FUSED_BY_INDUCTOR = frozenset(_LOOPS.split())
"""Calls for which Inductor writes loops of its own: they read bf16 and compute in fp32, or store bf16, in one go."""


def narrow(gm: GraphModule, ctx: Context) -> int:
    """Store what lies between layers in bf16, where the layers around it compute in bf16 anyway.

    A fused op of an fp32 model answers bf16 where everything that reads it is the x of another, which rounds it so in
    any case, or the residual of one that answers bf16 too, or a loop that Inductor writes, which gets it cast back to
    fp32. A residual that loops read as well stays in fp32, as in transformers, whose norms read the sum of all layers,
    to which each rounding would add. What a loop gives to the x of a fused op is cast to bf16 at its end. Results of
    the graph, what anything else reads and what is small stay as they are; so do processors without products of bf16.

    Before: `z = fp4fx.linear(F.gelu(fp4fx.linear(x, ...)), ...)`
    After: `y = fp4fx.linear(x, ..., dtype=bf16)`, `z = fp4fx.linear(F.gelu(y.to(fp32)).to(bf16), ..., dtype=fp32)`
    """
    return _Narrow(gm, ctx).run()


class _Narrow:
    """One rewrite: `rounding` are the ops that round x to bf16, `chosen` those of them that are to answer in it."""

    def __init__(self, gm: GraphModule, ctx: Context) -> None:
        self.gm = gm
        self.why = ctx.between
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        self.writes = {n: written for n in gm.graph.nodes if not is_context_switch(n) and (written := mutated(n))}
        for node in gm.graph.nodes:
            if op_name(node) in ("linear", "conv", "conv_transpose") and _is_fp32(node):
                self.why[node] = _refusal(node, ctx)
        self.rounding = {node for node, why in self.why.items() if not why}
        self.chosen = set(self.rounding)

    def run(self) -> int:
        while self._drop():
            pass
        for node in sorted(self.chosen):
            self._answer_narrow(node)
        for node in sorted(self.rounding):
            self._read_narrow(node)
        return len(self.chosen)

    def _drop(self) -> bool:
        """Take away what cannot answer bf16, given the others."""
        before = len(self.chosen)
        for node in sorted(self.chosen):
            self.why[node] = self._objection(node)
            if self.why[node]:
                self.chosen.remove(node)
        return len(self.chosen) < before

    def _objection(self, node: Node) -> str:
        if _is_small(node):
            return "small"
        if any(self._is_written(n) for n in (node, *_carriers(node))):
            return "written to in place"
        residual = arguments(node)[_RESIDUAL]
        if residual is not None and _origin(residual) not in self.chosen and not self._may_end_narrow(residual):
            return "its residual is in fp32"
        added = loop = ""
        for source, reader in readers(node):
            if reader.op == "output":
                return "a result of the graph"
            if reader not in self.rounding:
                loop = name_of(reader)
                if loop not in _FUSED_BY_INDUCTOR:
                    return f"read by {loop}"
            elif arguments(reader)[_RESIDUAL] is source:
                added = "a residual of what is in fp32" if reader not in self.chosen else added or "a residual"
        if added and (loop or added != "a residual"):
            return f"{added}, read by {loop}" if loop else added
        return ""

    def _is_written(self, node: Node) -> bool:
        """Whether a value changes after it was computed."""
        return any(node < writer and written & storages([value(node)]) for writer, written in self.writes.items())

    def _may_end_narrow(self, node: Node) -> bool:
        """Whether a loop that Inductor writes can store this value in bf16."""
        is_loop = name_of(_origin(node)) in _FUSED_BY_INDUCTOR
        return is_loop and not _is_small(node) and not self._is_written(node)

    def _answer_narrow(self, node: Node) -> None:
        node.update_arg(len(node.args) + _DTYPE, torch.bfloat16)
        for source, reader in list(readers(node)):
            if reader not in self.rounding:
                reader.replace_input_with(source, self._cast(source, torch.float32))
        for carrier in [node, *_carriers(node)]:
            carrier.meta["example_value"] = self._rounded(value(carrier))
            carrier.meta[STANDS_IN] = True

    def _read_narrow(self, node: Node) -> None:
        """x, and with a narrow result the residual, in bf16 where that costs nothing."""
        args = arguments(node)
        for index in [0] if args[_RESIDUAL] is None or node not in self.chosen else [0, len(args) + _RESIDUAL]:
            if value(args[index]).dtype == torch.float32 and self._may_end_narrow(args[index]):
                node.update_arg(index, self._cast(args[index], torch.bfloat16))
        if value(arguments(node)[0]).dtype == torch.bfloat16:
            node.update_arg(len(args) + _DTYPE, value(node).dtype)
            node.meta[STANDS_IN] = True

    def _cast(self, node: Node, dtype: torch.dtype) -> Node:
        """The node in another dtype, by one call for all that read it so."""
        if (node, dtype) not in self.casts:
            cast = emit(self.gm, aten.to.dtype, (node, dtype), like=node.next)
            cast.meta[STANDS_IN] = True
            self.casts[node, dtype] = cast
        return self.casts[node, dtype]

    def _rounded(self, values: Any) -> Any:
        """The fake values in bf16, laid out alike."""

        def rounded(v: Tensor) -> Tensor:
            return torch.empty_strided(v.shape, v.stride(), dtype=torch.bfloat16, device=v.device)

        with fake_mode(self.gm):
            return pytree.tree_map_only(Tensor, rounded, values)


def _is_fp32(node: Node) -> bool:
    return bool(value(node).dtype == value(arguments(node)[0]).dtype == torch.float32)


def _is_small(node: Node) -> bool:
    numel = value(node).numel()
    return isinstance(numel, int) and numel <= _FEW


def _refusal(node: Node, ctx: Context) -> str:
    """Why an op of fp32 does not round x to bf16, or not for free; empty if it does."""
    compute = arguments(node)[_COMPUTE]
    if compute in ("fp32", "bf16_operands"):
        return f"compute={compute!r}"
    if not target_of(value(node).device).multiplies_bf16:
        return "the processor has no products of bf16"
    kernel, _ = choose(node, ctx)
    return "" if kernel.rounds else f"the kernel is {kernel.name}"


def _is_carrier(node: Node) -> bool:
    given = [*node.args, *node.kwargs.values()]
    return is_identity(node) or (name_of(node) in _CARRIERS and not any(isinstance(a, torch.dtype) for a in given))


def _carriers(node: Node) -> Iterator[Node]:
    """The calls that hand a node's values on, in the order of the graph along each path."""
    for user in node.users:
        if _is_carrier(user) and user.args[0] is node:
            yield user
            yield from _carriers(user)


def readers(node: Node) -> Iterator[tuple[Node, Node]]:
    """What reads a node's values, and through which node: itself or what hands them on."""
    for source in [node, *_carriers(node)]:
        for user in source.users:
            if not (_is_carrier(user) and user.args[0] is source):
                yield source, user


def _origin(node: Node) -> Node:
    """Where a value comes from that was handed on."""
    while _is_carrier(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
