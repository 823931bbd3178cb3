"""bitsandbytes: FP4 in blocks of 64, its C++ kernel for AVX-512 BF16 (elsewhere it decodes and multiplies)."""

from __future__ import annotations

import bitsandbytes
import torch
from torch import Tensor

from benchmarks.peers.base import Candidate, Layer, linear_module, module_layer


def candidates() -> list[Candidate]:
    """FP4, bf16 x."""
    return [Candidate("bitsandbytes fp4 b64", torch.bfloat16, _build, 4)]


def _build(weight: Tensor) -> Layer:
    n, k = weight.shape
    module = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="fp4", device="meta")
    dense = linear_module(weight, torch.bfloat16).weight
    module.weight = bitsandbytes.nn.Params4bit(dense.data, requires_grad=False, quant_type="fp4", blocksize=64)
    module = module.to("cpu").eval()
    decoded = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    with torch.no_grad():
        module(torch.zeros(1, k, dtype=torch.bfloat16))  # packs the weight for its kernel
    state = module.weight.quant_state
    return module_layer(module, decoded, module.weight.data.nbytes + state.absmax.nbytes)
