"""The ops `fp4fx_cuda::*` of programs for AOTInductor: `torch.library.triton_op`, so that packages hold the kernels.

They take the arguments of `fp4fx::<op>` and a last `target`, the compute capability of the GPU times ten, which decides
schedules and tiles where no GPU is asked: a program is compiled for one. AOTInductor opens such an op into the launches
that its body does, and needs neither Python nor this package for what it then compiles.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from fp4fx.capture import OpOverload
from fp4fx.kernels import triton
from fp4fx.registry import Kernel, Request


def kernel(target: int) -> Kernel:
    """The kernels of this package as a way to run a program's ops on GPUs of one compute capability, times ten."""
    return replace(triton.KERNEL, refuse=_refuse, lower=functools.partial(_lower, target=target))


def _refuse(request: Request) -> str | None:
    if request.symbolic_image:
        return "the height or width of the image is dynamic, which the kernels of a program have as constants"
    return triton.KERNEL.refuse(request)


def _lower(node: Node, *, target: int) -> None:
    node.target = op(node.target._opname)  # type: ignore[union-attr]
    node.kwargs = {**node.kwargs, "target": target}


def load() -> None:
    """Define all `torch.ops.fp4fx_cuda`, which `torch.export.load` needs for a program that was saved with them.

    Importing fp4fx does not, for it takes Triton and the seconds of its import.
    """
    for name in triton.OPS:
        op(name)


@functools.cache
def op(name: str) -> OpOverload:
    """`torch.ops.fp4fx_cuda.<name>`, defined by the first call."""
    from fp4fx.kernels.triton import library, tuning  # noqa: PLC0415  (which import Triton)

    like: Any = getattr(torch.ops.fp4fx, name).default
    body = library.BODIES[name]

    def run(*args: Any, target: int, **kwargs: Any) -> Any:
        given = (a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        family = tuning.family_for(target) if next(given).is_cuda else tuning.INTERPRETER
        return body(*args, family=family, **kwargs)

    def shapes(*args: Any, target: int, **kwargs: Any) -> Any:
        return like(*args, **kwargs)

    schema = str(like._schema).removeprefix(f"fp4fx::{name}").replace(") ->", ", *, int target) ->", 1)
    defined: Any = torch.library.triton_op(f"fp4fx_cuda::{name}", run, mutates_args=(), schema=schema)
    defined.register_fake(shapes)
    overload: OpOverload = getattr(torch.ops.fp4fx_cuda, name).default
    return overload
