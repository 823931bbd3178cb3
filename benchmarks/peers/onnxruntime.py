"""onnxruntime's MatMulNBits: 4-bit integers in blocks of 32, activations in fp32 (accuracy 0) or int8 (accuracy 4)."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from benchmarks.peers.base import Call, Candidate, Layer

BLOCK = 32


def candidates() -> list[Candidate]:
    """One for each accuracy level; x and y are fp32."""
    return [
        Candidate(f"onnxruntime MatMulNBits b32 acc{a}", torch.float32, functools.partial(_build, accuracy=a), 4)
        for a in (0, 4)
    ]


def _build(weight: Tensor, accuracy: int) -> Layer:
    """Symmetric: w = (q - 8) · scale, the value of greatest magnitude in a block has code 0."""
    n, k = weight.shape
    blocks = weight.reshape(n, k // BLOCK, BLOCK)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = extreme / -8
    scale[scale == 0] = 1
    codes = (blocks / scale + 8).round().clamp(0, 15)
    dense = ((codes - 8) * scale).reshape(n, k)
    codes = codes.to(torch.uint8)
    packed = (codes[..., 0::2] | (codes[..., 1::2] << 4)).numpy()
    scales = scale.squeeze(-1).numpy()
    model = _model(n, k, packed, scales, accuracy)

    def at(x: Tensor) -> Call:
        session = onnxruntime.InferenceSession(model, _options(), providers=["CPUExecutionProvider"])
        source = onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())
        target = onnxruntime.OrtValue.ortvalue_from_shape_and_type((x.shape[0], n), np.float32)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", source)
        binding.bind_ortvalue_output("y", target)

        def call() -> onnxruntime.OrtValue:
            session.run_with_iobinding(binding)
            return target

        return call

    return Layer(at, packed.nbytes + scales.nbytes, dense, lambda y: torch.from_numpy(y.numpy().copy()))


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads sleep when a run is over
    return options


def _model(n: int, k: int, packed: np.ndarray, scales: np.ndarray, accuracy: int) -> bytes:
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=BLOCK,
        accuracy_level=accuracy,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])],
        [numpy_helper.from_array(packed, "codes"), numpy_helper.from_array(scales.reshape(-1), "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
