"""torchao: NVFP4 weights, and int8 weights with activations quantized per call; both compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from benchmarks.peers.base import Candidate, Layer, linear_module, module_layer


def candidates() -> list[Candidate]:
    """NVFP4 weight-only and int8 dynamic, bf16 x."""
    return [
        Candidate("torchao NVFP4", torch.bfloat16, lambda w: _build(w, NVFP4WeightOnlyConfig()), 4, max_m=16),
        Candidate("torchao int8 dynamic", torch.bfloat16, lambda w: _build(w, _int8()), 8),
    ]


def _int8() -> Int8DynamicActivationInt8WeightConfig:
    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _build(weight: Tensor, config: Any) -> Layer:
    module = linear_module(weight, torch.bfloat16)
    quantize_(module, config)
    stored = module.weight
    parts = [getattr(stored, name) for name in stored.tensor_data_names]
    return module_layer(
        module, stored.dequantize().float(), sum(part.nbytes for part in parts), freezing=True, max_autotune=False
    )
