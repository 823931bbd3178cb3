"""Every way to compute a linear layer that is measured, fp4fx first; one file a package, imported when asked for."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterable
from typing import Any

from benchmarks.peers.base import Candidate, Layer, UnavailableError, importable, reason

__all__ = ["PEERS", "Candidate", "Layer", "UnavailableError", "linear_candidates", "reason"]

PEERS = {
    "aten": ("torch", "torch"),
    "onnxruntime": ("onnxruntime MatMulNBits", "onnxruntime onnx"),
    "openvino": ("OpenVINO", "openvino nncf"),
    "torchao": ("torchao", "torchao"),
    "bitsandbytes": ("bitsandbytes fp4", "bitsandbytes"),
    "ggml": ("ggml", "ggml-python"),
}
"""File here -> what its row is called if it cannot be imported, what to install."""


def linear_candidates(*, tiers: bool = False) -> tuple[Candidate, ...]:
    """All candidates; what is not installed is there too, and its `build` says so.

    Args:
        tiers: fp4fx also by every lower instruction set.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package of GPU kernels
    found = list(importable(functools.partial(_candidates, "ours", tiers=tiers), "fp4fx", "fp4fx"))
    for module, (name, packages) in PEERS.items():
        found += importable(functools.partial(_candidates, module), name, packages)
    return tuple(found)


def _candidates(module: str, **options: Any) -> Iterable[Candidate]:
    return importlib.import_module(f"benchmarks.peers.{module}").candidates(**options)  # type: ignore[no-any-return]
