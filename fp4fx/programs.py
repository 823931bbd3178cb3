"""Exported programs of a quantized model, in the form that whoever runs them knows.

`torch.export.export` of a quantized model gives `fp4fx::dequantize` in front of the op that reads the weight (and
`fp4fx::fake_quantize` in front of an activation); the buffers of the program are the packed bytes. `lower` makes
other forms of it, with the same buffers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fp4fx import capture, nvfp4, ops
from fp4fx.errors import BackendError, FallbackError
from fp4fx.kernels import cpu, reference
from fp4fx.kernels.triton import program as program_kernels
from fp4fx.passes import PASSES
from fp4fx.passes.select_kernels import choose
from fp4fx.pipeline import Context, op_name, run
from fp4fx.registry import Kernel
from fp4fx.target import Target, target_of

log = logging.getLogger(__name__)

Form = Literal["portable", "fused", "cpu", "cuda"]

_decode = functools.partial(nvfp4.dequantize_rows, in_place=False)

DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    getattr(torch.ops.fp4fx, name).default: functools.partial(
        getattr(ops, name), **({} if name == "quantize" else {"decode": _decode})
    )
    for name in ops.__all__
}
"""A table for `ExportedProgram.run_decompositions`: every `fp4fx::` op as what it means in ATen ops."""

_FUSING = (
    "canonicalize",
    "expose_qdq",
    "merge_qdq",
    "fuse_linear",
    "fuse_conv",
    "fuse_embedding",
    "fuse_epilogue",
    "channels_last",
    "narrow",
    "restride",
)
"""The passes that need nothing but the graph."""
_FOR_CPU_KERNELS = ("channels_last", "narrow")


def lower(
    program: ExportedProgram,
    to: Form,
    *,
    target: int | None = None,
    on_fallback: Literal["report", "raise"] = "report",
) -> ExportedProgram:
    """An exported program of a quantized model in another form; the given one stays as it was.

    Args:
        program: of `torch.export.export(qmodel, ...)`, strict or not, of fixed or dynamic shapes.
        to: "portable" has ATen ops only, so that it loads, runs and compiles (AOTInductor) where no fp4fx is: weights
            are decoded inside of every call. "fused" has one `fp4fx::` op per layer. "cpu" has the CPU kernels' ops
            `fp4fx_cpu::`, and ATen ops where these refuse; it runs wherever `torch.ops.load_library` has loaded
            `fp4fx.kernels.cpu.build.library()`, in C++ too. "cuda" has the Triton kernels as `triton_op`s
            `fp4fx_cuda::`, and ATen ops where these refuse; AOTInductor compiles them into its package, which then
            needs neither Python nor fp4fx. Schedules and tiles are those of the example's sizes where a size is
            dynamic. Whoever saves it calls `fp4fx.kernels.triton.program.load()` before `torch.export.load`.
        target: for "cuda", the compute capability of the GPU times ten (90 on Hopper); None: that of the current one.
        on_fallback: what to do about a layer that the kernels refuse: log it, or raise.

    Raises:
        BackendError: another form is asked for, what is given is no exported program, or there is no target.
        FallbackError: with on_fallback="raise", the kernels refuse an op.
    """
    if to not in get_args(Form):
        raise BackendError(f"lower: found to={to!r}, expected one of {', '.join(map(repr, get_args(Form)))}")
    if on_fallback not in ("report", "raise"):
        raise BackendError(f"lower: found on_fallback={on_fallback!r}, expected 'report' or 'raise'")
    if not isinstance(program, ExportedProgram):
        found = type(program).__name__
        raise BackendError(f"lower: found a {found}, expected the result of torch.export.export(qmodel, inputs)")
    choice = _choice(to, target)
    if to == "portable":
        return _in_aten(program)
    inference = program.run_decompositions({})  # whose values require no gradient
    refusals: list[str] = []
    lowered = capture.rewritten(inference, lambda gm: _fuse(gm, choice, refusals))
    if refusals and on_fallback == "raise":
        raise FallbackError(f"on_fallback='raise' and this program falls back: {'; '.join(refusals)}")
    for refusal in refusals:
        log.info("lower: %s", refusal)
    return lowered if choice is None else _in_aten(lowered)


def _choice(to: Form, target: int | None) -> tuple[Kernel, Target | None] | None:
    """The kernels of a form, and what they are to be compiled for."""
    if to != "cuda":
        if target is not None:
            raise BackendError(f"lower: found target={target!r} with to={to!r}, only 'cuda' is for a target")
        return None if to != "cpu" else (cpu.KERNEL, None)
    if target is not None and (not isinstance(target, int) or target < 10):
        raise BackendError(f"lower: found target={target!r}, expected a compute capability times ten (90: Hopper)")
    found = target_of(torch.device("cuda"))
    capability = found.capability if target is None else target
    if capability is None:
        raise BackendError("lower: to='cuda' found no GPU; pass target=, its compute capability times ten (90: Hopper)")
    if target is not None:
        found = Target("cuda", f"sm_{target}", frozenset({f"sm_{target}"}))
    return program_kernels.kernel(capability), found


def _in_aten(program: ExportedProgram) -> ExportedProgram:
    result: ExportedProgram = program.run_decompositions(dict(DECOMPOSITIONS))
    return result


def _fuse(gm: GraphModule, choice: tuple[Kernel, Target | None] | None, refusals: list[str]) -> None:
    """Run the passes; with a choice, let these kernels take what they do not refuse, with the reason if they do."""
    left_out = () if choice is not None and choice[0] is cpu.KERNEL else _FOR_CPU_KERNELS
    ctx = Context(real={})
    run(gm, ctx, [step for step in PASSES if step.name in _FUSING and step.name not in left_out])
    if choice is None:
        return
    wanted, target = choice
    for node in gm.graph.nodes:
        name = op_name(node)
        if name is None:
            continue
        kernel, reasons = choose(node, ctx, (wanted, reference.KERNEL), target)
        if kernel is wanted:
            kernel.lower(node)
        else:
            why = reasons or (_no_choice(wanted, name, capture.value(capture.arguments(node)[0]).device.type),)
            refusals.extend(f"fp4fx::{name} ({node.name}): {reason}" for reason in why)
    gm.recompile()


def _no_choice(kernel: Kernel, name: str, device: str) -> str:
    """Why an op had no choice to be run by a kernel."""
    if name not in kernel.ops:
        return f"{kernel.name}: it has no {name}"
    return f"{kernel.name}: found a model on {device}, expected {kernel.device}; move it there before torch.export"
