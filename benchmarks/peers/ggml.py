"""ggml, the library of llama.cpp: its 4-bit types in the buffer that llama.cpp would choose for them."""

from __future__ import annotations

import ctypes
import functools
import weakref
from typing import Any

import ggml
import torch
from torch import Tensor

from benchmarks.peers.base import Call, Candidate, Layer, UnavailableError

TYPES = {"q4_0": ggml.GGML_TYPE_Q4_0, "q4_K": ggml.GGML_TYPE_Q4_K, "nvfp4": ggml.GGML_TYPE_NVFP4}

_QUIET = ggml.ggml_log_callback(lambda *_: None)
ggml.ggml_log_set(_QUIET, None)  # it names every weight that it repacks


def candidates() -> list[Candidate]:
    """One for each type; x and y are fp32, activations are rounded to int8 inside."""
    return [
        Candidate(f"ggml {name}", torch.float32, functools.partial(_build, kind=kind), 4)
        for name, kind in TYPES.items()
    ]


class _Context:
    """A ggml context whose tensors live in one buffer of one type; freed with the object."""

    def __init__(self, tensors: int) -> None:
        size = tensors * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
        self.raw: Any = ggml.ggml_init(ggml.ggml_init_params(size, None, True))
        weakref.finalize(self, ggml.ggml_free, self.raw)

    def allocate(self, buffer_type: Any) -> None:
        """Give every tensor of the context its memory."""
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.raw, buffer_type)
        if not buffer:
            raise UnavailableError(f"no memory in the buffer {ggml.ggml_backend_buft_name(buffer_type).decode()}")
        weakref.finalize(self, ggml.ggml_backend_buffer_free, buffer)


@functools.cache
def _backend() -> Any:
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, torch.get_num_threads())
    return backend


@functools.cache
def _buffer_types() -> list[Any]:
    """Those that repack a weight, best first as ggml lists them, then the plain one.

    The AMX buffer is left out: its tile configuration does not survive another library's in one process.
    """
    device = ggml.ggml_backend_get_device(_backend())
    registry = ggml.ggml_backend_cpu_reg()
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    plain = ggml.ggml_backend_get_default_buffer_type(_backend())
    if not address:
        return [plain]
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    extra = []
    while listed and listed[len(extra)]:
        extra.append(listed[len(extra)])
    return [*(b for b in extra if ggml.ggml_backend_buft_name(b) != b"AMX"), plain]


def _build(weight: Tensor, kind: int) -> Layer:
    n, k = weight.shape
    stored = ctypes.create_string_buffer(n * ggml.ggml_row_size(kind, k))
    source = ctypes.cast(weight.contiguous().data_ptr(), ctypes.POINTER(ctypes.c_float))
    ggml.ggml_quantize_chunk(kind, source, stored, 0, n, k, None)
    dense = torch.empty(n, k)
    to_float = ggml.ggml_get_type_traits(kind).contents.to_float
    to_float(ctypes.cast(stored, ctypes.c_void_p), ctypes.cast(dense.data_ptr(), ctypes.POINTER(ctypes.c_float)), n * k)
    device = ggml.ggml_backend_get_device(_backend())
    for buffer_type in _buffer_types():
        context = _Context(4)
        packed = ggml.ggml_new_tensor_2d(context.raw, kind, k, n)
        if _supports(device, packed, k, buffer_type):
            break
    context.allocate(buffer_type)
    ggml.ggml_backend_tensor_set(packed, ctypes.cast(stored, ctypes.c_void_p), 0, len(stored))

    def at(x: Tensor) -> Call:
        work = _Context(8)
        inputs = ggml.ggml_new_tensor_2d(work.raw, ggml.GGML_TYPE_F32, k, x.shape[0])
        product = ggml.ggml_mul_mat(work.raw, packed, inputs)
        graph = ggml.ggml_new_graph(work.raw)
        ggml.ggml_build_forward_expand(graph, product)
        work.allocate(ggml.ggml_backend_get_default_buffer_type(_backend()))
        ggml.ggml_backend_tensor_set(inputs, ctypes.c_void_p(x.contiguous().data_ptr()), 0, x.nbytes)

        def call() -> Any:
            ggml.ggml_backend_graph_compute(_backend(), graph)
            return product

        call.keep = (context, work)  # type: ignore[attr-defined]  # the graph lives in their memory
        return call

    def output(product: Any) -> Tensor:
        y = torch.empty(tuple(product.contents.ne[1::-1]))
        ggml.ggml_backend_tensor_get(product, ctypes.c_void_p(y.data_ptr()), 0, y.nbytes)
        return y

    return Layer(at, len(stored), dense, output)


def _supports(device: Any, packed: Any, k: int, buffer_type: Any) -> bool:
    """Whether a product with this weight runs from a buffer of that type; asked with an empty one, as in llama.cpp."""
    work = _Context(4)
    inputs = ggml.ggml_new_tensor_2d(work.raw, ggml.GGML_TYPE_F32, k, 1)
    product = ggml.ggml_mul_mat(work.raw, packed, inputs)
    empty = ggml.ggml_backend_buft_alloc_buffer(buffer_type, 0)
    packed.contents.buffer = empty
    supported = bool(ggml.ggml_backend_dev_supports_op(device, product))
    packed.contents.buffer = None
    ggml.ggml_backend_buffer_free(empty)
    return supported
