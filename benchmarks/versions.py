"""Which versions of the peers a run had."""

from __future__ import annotations

import importlib.metadata

PEERS = ("torchao", "onnxruntime", "openvino", "nncf", "bitsandbytes", "ggml-python", "timm", "torchvision")


def versions() -> dict[str, str | None]:
    """By package; None where it is not installed."""
    return {package: _version(package) for package in PEERS}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
