"""torch itself: dense fp32 and bf16, eager and compiled with freezing, and its 4-bit integer product for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.base import Call, Candidate, Layer, linear_module, module_layer

FP32, BF16, BF16_COMPILED, INT4 = "torch fp32", "torch bf16", "torch bf16, compiled", "torch int4pack g32"
GROUP = 32


def candidates() -> list[Candidate]:
    """Dense in fp32 and bf16, bf16 compiled, int4."""
    return [
        Candidate(FP32, torch.float32, lambda w: _dense(w, torch.float32), 32),
        Candidate(BF16, torch.bfloat16, lambda w: _dense(w, torch.bfloat16), 16),
        Candidate(BF16_COMPILED, torch.bfloat16, lambda w: _dense(w, torch.bfloat16, freezing=True), 16),
        Candidate(INT4, torch.bfloat16, _int4, 4),
    ]


def _dense(weight: Tensor, dtype: torch.dtype, **options: bool) -> Layer:
    module = linear_module(weight, dtype)
    return module_layer(module, module.weight.float(), module.weight.nbytes, **options)


def _int4(weight: Tensor) -> Layer:
    """Asymmetric int4 in groups of 32: w = (q - 8) · scale + zero, scale and zero in bf16."""
    n, k = weight.shape
    groups = weight.reshape(n, k // GROUP, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low).clamp(min=1e-6) / 15).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    codes = ((groups - zero[..., None]) / scale[..., None] + 8).round().clamp(0, 15)
    dense = ((codes - 8) * scale[..., None] + zero[..., None]).reshape(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.reshape(n, k).int(), 1)
    scales = torch.stack((scale, zero), -1).transpose(0, 1).contiguous().bfloat16()  # [K/32, N, 2]
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu

    def at(x: Tensor) -> Call:
        def call() -> Tensor:
            with torch.no_grad():
                return multiply(x, packed, GROUP, scales)  # type: ignore[no-any-return]

        return call

    return Layer(at, packed.nbytes + scales.nbytes, dense)
