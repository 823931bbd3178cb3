"""How a kernel is launched: on tensors, or as a node of the graph that torch is tracing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fp4fx.capture import is_traced


def launcher(kernel: Any, result: Tensor) -> Any:
    """The kernel, to be launched as `launcher(kernel, y)[grid](...)`; what it writes to is traced or not."""
    return torch.library.wrap_triton(kernel) if is_traced(result) else kernel


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A kernel is launched on the current device: let it be the tensor's. A graph has its devices from its tensors."""
    return nullcontext() if is_traced(tensor) else torch.cuda.device_of(tensor)


def in_memory(scalar: Tensor) -> Tensor:
    """A tensor of rank 0 as a kernel is given it: Inductor makes a number of such a constant, which has no address.

    Of the view it makes a tensor, in a launch of its own unless "always_keep_tensor_constants" is set and
    "joint_graph_constant_folding" is not.
    """
    return scalar.view(1) if is_traced(scalar) else scalar


def address(tensor: Tensor) -> int:
    """Where a tensor begins; a traced one in bytes from where its memory does, which is aligned, and 1 if symbolic."""
    if not is_traced(tensor):
        return tensor.data_ptr()
    offset = tensor.storage_offset()
    return offset * tensor.element_size() if isinstance(offset, int) else 1
