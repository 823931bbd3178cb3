"""What the machine can do: the only place that knows instruction sets and compute capabilities."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

_ISA = ("avx", "amx", "fma", "f16c", "asimd", "sve", "bf16", "i8mm")
"""How the flags of note begin, on x86-64 and on Arm."""


@dataclass(frozen=True)
class Target:
    """One device to compile for."""

    device: str
    """Device type: `cpu`, `cuda`, `meta`, ..."""
    name: str
    """Of the processor or card."""
    features: frozenset[str]
    """Instruction sets of a CPU (`avx512_bf16`, `amx_int8`, ...), or the compute capability of a GPU (`sm_90`)."""

    @property
    def capability(self) -> int | None:
        """The compute capability of an NVIDIA GPU, times ten: 90 on Hopper; None elsewhere."""
        return next((int(f.removeprefix("sm_")) for f in self.features if f.startswith("sm_")), None)

    @property
    def multiplies_bf16(self) -> bool:
        """Whether a processor has an instruction for sums of products of bf16."""
        return not self.features.isdisjoint({"amx_bf16", "avx512_bf16"})


def target_of(device: torch.device) -> Target:
    """What is known about a device; a device type that is not known here has no features."""
    if device.type == "cpu":
        return _cpu()
    if device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return Target("cuda", torch.cuda.get_device_name(device), frozenset({f"sm_{major}{minor}"}))
    return Target(device.type, device.type, frozenset())


def onednn_computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN is switched on and has convolutions of a dtype on this processor."""
    library = torch.backends.mkldnn
    if not (library.is_available() and library.enabled):  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


@functools.cache
def _cpu() -> Target:
    """The processor as Linux describes it; elsewhere its name alone."""
    facts: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text("utf-8").splitlines() if info.exists() else ():
        key, _, content = line.partition(":")
        facts.setdefault(key.strip(), content.strip())
    flags = facts.get("flags", facts.get("Features", "")).split()
    name = facts.get("model name") or platform.processor() or platform.machine()
    return Target("cpu", name, frozenset(flag for flag in flags if flag.startswith(_ISA)))
