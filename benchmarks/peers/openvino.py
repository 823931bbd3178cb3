"""OpenVINO: dense weights computed in bf16, and weights compressed by NNCF to INT4 and NVFP4."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from typing import Any

import nncf
import openvino
import torch
from openvino import opset13
from torch import Tensor

from benchmarks.peers.base import Call, Candidate, Layer

CORE = openvino.Core()
nncf.set_log_level(logging.ERROR)


def candidates() -> list[Candidate]:
    """bf16, INT4 in groups of 32, NVFP4; x and y are fp32, the inference precision is bf16 where the CPU has it."""
    int4 = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 32}
    nvfp4 = {"mode": nncf.CompressWeightsMode.NVFP4, "group_size": 16}
    return [
        Candidate("OpenVINO bf16", torch.float32, functools.partial(_build, compression=None), 16),
        Candidate("OpenVINO INT4 g32", torch.float32, functools.partial(_build, compression=int4), 4),
        Candidate("OpenVINO NVFP4", torch.float32, functools.partial(_build, compression=nvfp4), 4),
    ]


def settings(precision: str = "bf16") -> dict[str, Any]:
    """Lowest latency of one request, with torch's number of threads; bf16 only where the plugin offers it."""
    fast = precision if precision.upper() in CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": fast,
    }


def _build(weight: Tensor, compression: dict[str, Any] | None) -> Layer:
    k = weight.shape[1]
    x = opset13.parameter([-1, k], openvino.Type.f32, name="x")
    product = opset13.matmul(x, opset13.constant(weight.numpy()), transpose_a=False, transpose_b=True)
    model = openvino.Model([product], [x], "linear")
    if compression is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # tables and bars
            model = nncf.compress_weights(model, ratio=1.0, all_layers=True, **compression)
    node = next(op for op in model.get_ops() if op.get_type_name() == "MatMul").input_value(1)
    stored = sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")
    stored = stored if compression is not None else stored // 2  # the compiled model holds bf16

    def at(x: Tensor) -> Call:
        fixed = model.clone()
        fixed.reshape([x.shape[0], k])
        request = CORE.compile_model(fixed, "CPU", settings()).create_infer_request()
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

        def call() -> Any:
            request.infer()
            return request

        call.keep = x  # type: ignore[attr-defined]  # the request reads its memory
        return call

    return Layer(at, stored, _decoded(node), lambda r: torch.from_numpy(r.get_output_tensor().data.copy()))


def _decoded(weight: openvino.Output) -> Tensor:
    """The weight as the model computes it from its constants, fp32 [N, K]."""
    alone = openvino.Model([weight], [], "weight").clone()
    compiled = CORE.compile_model(alone, "CPU", settings("f32"))
    return torch.from_numpy(compiled([])[0].copy())
