"""Quantizing, decoding and gathering: values a second, fp4fx beside torch, torchao, bitsandbytes and ggml."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import peers, timing
from benchmarks.peers import ours
from fp4fx import nvfp4
from fp4fx.bench import Call

ROWS = 512
"""Rows that an embedding gathers."""


def measure(size: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of a weight [size, size]: quantized from bf16, decoded to bf16, and a table of which `ROWS` are gathered."""
    torch.manual_seed(0)
    weight = torch.randn(size, size).bfloat16()
    indices = torch.randint(size, (ROWS,))
    packed = nvfp4.quantize(weight)
    parts = (packed.packed, packed.scale, packed.global_scale)
    sections: dict[str, tuple[int, dict[str, Callable[[], Call]]]] = {
        "quantize": (
            weight.numel(),
            {
                "fp4fx, max": lambda: _ours("quantize", weight),
                "fp4fx, search": lambda: _ours("quantize", weight, scale_rule="search"),
                "fp4fx, max, its body compiled": lambda: _compiled(functools.partial(nvfp4.quantize_rows, weight)),
                "torchao NVFP4": lambda: _torchao(weight)[0],
                "bitsandbytes fp4": lambda: _bitsandbytes(weight)[0],
                "ggml nvfp4, one thread": lambda: _ggml(weight)[0],
            },
        ),
        "dequantize": (
            weight.numel(),
            {
                "fp4fx": lambda: _ours("dequantize", *parts, list(weight.shape), torch.bfloat16),
                "fp4fx, its body compiled": lambda: _compiled(
                    functools.partial(nvfp4.dequantize_rows, *parts, size, torch.bfloat16)
                ),
                "torchao NVFP4": lambda: _torchao(weight)[1],
                "bitsandbytes fp4": lambda: _bitsandbytes(weight)[1],
                "ggml nvfp4 to fp32, one thread": lambda: _ggml(weight)[1],
                "torch bf16, a copy": lambda: weight.clone,
            },
        ),
        "embedding": (
            ROWS * size,
            {
                "fp4fx": lambda: _ours("embedding", indices, *parts, size, torch.bfloat16),
                "torch bf16": lambda: functools.partial(F.embedding, indices, weight),
            },
        ),
    }
    rows = []
    for op, (values, candidates) in sections.items():
        calls: dict[str, Call] = {}
        for name, make in candidates.items():
            try:
                calls[name] = make()
                calls[name]()
            except Exception as error:  # noqa: BLE001  (whatever a peer raises is the reason of its row)
                calls.pop(name, None)
                rows.append({"section": "codec", "op": op, "candidate": name, "reason": peers.reason(error)})
        for name, took in timing.blocks(calls, rounds).items():
            times = {"median_ms": took.median, "p10_ms": took.p10, "p90_ms": took.p90}
            rows.append({"section": "codec", "op": op, "candidate": name, "values": values, **times})
    return rows


def _ours(op: str, *arguments: Any, **named: Any) -> Call:
    ours.tiers()
    return functools.partial(getattr(torch.ops.fp4fx_cpu, op).default, *arguments, **named)


def _compiled(call: Call) -> Call:
    return torch.compile(call, dynamic=False)  # type: ignore[no-any-return]


def _torchao(weight: torch.Tensor) -> tuple[Call, Call]:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale  # noqa: PLC0415

    def quantize() -> Any:
        return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().amax()))

    stored = quantize()
    return quantize, lambda: stored.dequantize(torch.bfloat16)


def _bitsandbytes(weight: torch.Tensor) -> tuple[Call, Call]:
    from bitsandbytes import functional  # noqa: PLC0415

    stored, state = functional.quantize_4bit(weight, quant_type="fp4", blocksize=64)
    return (
        lambda: functional.quantize_4bit(weight, quant_type="fp4", blocksize=64),
        lambda: functional.dequantize_4bit(stored, state),
    )


def _ggml(weight: torch.Tensor) -> tuple[Call, Call]:
    import ggml  # noqa: PLC0415

    kind, (n, k) = ggml.GGML_TYPE_NVFP4, weight.shape
    source, target = weight.float(), torch.empty(n, k)
    stored = ctypes.create_string_buffer(n * ggml.ggml_row_size(kind, k))
    floats = [ctypes.cast(x.data_ptr(), ctypes.POINTER(ctypes.c_float)) for x in (source, target)]
    decode = ggml.ggml_get_type_traits(kind).contents.to_float

    def quantize(_keep: Any = source) -> Any:
        return ggml.ggml_quantize_chunk(kind, floats[0], stored, 0, n, k, None)

    def dequantize(_keep: Any = target) -> Any:
        return decode(ctypes.cast(stored, ctypes.c_void_p), floats[1], n * k)

    quantize()
    return quantize, dequantize
