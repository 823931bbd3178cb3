"""Which versions of the peers a run had."""

from __future__ import annotations

from fp4fx.bench import version_of

PEERS = (
    "torchao",
    "nvidia-modelopt",
    "onnxruntime",
    "openvino",
    "nncf",
    "bitsandbytes",
    "ggml-python",
    "timm",
    "torchvision",
)


def versions() -> dict[str, str | None]:
    """By package; None where it is not installed."""
    return {package: version_of(package) for package in PEERS}
