"""Formats as functions: x fp32 [M, K] -> what it decodes to, fp32 [M, K]; K is a multiple of 128, M of 16."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4fx import nvfp4
from fp4fx.kernels import encoding

Codec = Callable[[Tensor], Tensor]

NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip
"""Quantiles of a Gaussian, as QLoRA has them (Dettmers et al., arXiv 2305.14314, appendix E)."""
STEPS = 64
"""Scales that `searched_fp32` tries."""


@dataclass(frozen=True)
class Format:
    """A format, how it is named in tables, and its bits per value, scales included (without one per tensor)."""

    name: str
    bits: float
    codec: Codec
    peer: bool = False
    """Made by another library."""


def decoded(x: Tensor, **how: Any) -> Tensor:
    """By `fp4fx`'s own codec, the CPU kernels where they are built."""
    return nvfp4.dequantize(encoding.quantize(x, **how))


def _blocks(x: Tensor, size: int) -> Tensor:
    return x.reshape(-1, size)


def e2m1(x: Tensor) -> Tensor:
    """Nearest values of E2M1, at most 6."""
    return nvfp4.decode_e2m1(nvfp4.encode_e2m1(x))


def _power_of_two(x: Tensor, size: int) -> Tensor:
    """E2M1 in blocks with a scale 2**(floor(log2(amax)) - 2), as the OCP specification of MX formats has it."""
    blocks = _blocks(x, size)
    exponent = blocks.abs().amax(1, keepdim=True).view(torch.int32) & 0x7F800000  # of fp32, in its place
    scale = exponent.view(torch.float32).clamp(min=2.0**-120) / 4
    return (e2m1(blocks / scale) * scale).view_as(x)


def _integers(x: Tensor, size: int, most: int) -> Tensor:
    """Symmetric integers with an fp32 scale per group."""
    groups = _blocks(x, size)
    scale = (groups.abs().amax(1, keepdim=True) / most).clamp(min=2.0**-126)
    return ((groups / scale).round().clamp(-most, most) * scale).view_as(x)


def _nf4(x: Tensor, size: int) -> Tensor:
    groups, levels = _blocks(x, size), torch.tensor(NF4)
    scale = groups.abs().amax(1, keepdim=True)
    middles = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(groups / scale, middles)] * scale).view_as(x)


def _fp8(x: Tensor) -> Tensor:
    scale = x.abs().amax() / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _fp32_scales(x: Tensor, size: int) -> Tensor:
    blocks = _blocks(x, size)
    scale = blocks.abs().amax(1, keepdim=True) / 6
    return (e2m1(blocks / scale) * scale).view_as(x)


def searched_fp32(x: Tensor) -> Tensor:
    """E2M1 in blocks of 16 with the best of `STEPS` fp32 scales from 3/4 to 2 times amax/6: what a search can reach."""
    factors = torch.logspace(math.log2(0.75), 1, STEPS, base=2.0)

    def best_of(blocks: Tensor) -> Tensor:
        scale = blocks.abs().amax(1, keepdim=True) / 6
        best, least = torch.zeros_like(blocks), torch.full((len(blocks), 1), torch.inf)
        for s in (scale * factor for factor in factors):
            tried = e2m1(blocks / s) * s
            error = (tried - blocks).square().sum(1, keepdim=True)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        return best

    return torch.cat([best_of(part) for part in _blocks(x, 16).split(2048)]).view_as(x)  # parts that stay in cache


def stochastic(x: Tensor) -> Tensor:
    """NVFP4 rounded to one of two neighbours with the value as the mean; scales leave 17/16 of room, so none saturates.

    As gradients are in training: a stored scale lies at most 1/17 below the one that was asked for.
    """
    room = 17 / 16
    blocks, g = _blocks(x, 16), nvfp4.global_scale(x) * room
    wanted = blocks.abs().amax(1) * room / (6 * g)
    s = nvfp4.decode_e4m3(nvfp4.encode_e4m3(wanted.clamp(2.0**-9, 448)))[:, None] * g
    values = nvfp4.decode_e2m1(torch.arange(8, dtype=torch.uint8))
    magnitude = (blocks / s).abs().clamp(max=6)
    below = (torch.bucketize(magnitude, values, right=True) - 1).clamp(max=6)
    low, high = values[below], values[below + 1]
    generator = torch.Generator().manual_seed(1)
    up = torch.rand(blocks.shape, generator=generator) < (magnitude - low) / (high - low)
    return (torch.where(up, high, low) * blocks.sign() * s).view_as(x)


def rotated(codec: Codec, size: int) -> Codec:
    """The codec between a Hadamard rotation of runs of `size` values with random signs, and its inverse."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size)) * 2.0 - 1
    rotation = signs[:, None] * h / size**0.5

    def codec_of(x: Tensor) -> Tensor:
        turned = (_blocks(x, size) @ rotation).view_as(x)
        return (_blocks(codec(turned), size) @ rotation.T).view_as(x)

    return codec_of


_RULES: dict[str, dict[str, Any]] = {
    "nearest": {"scale_rule": "max"},
    "four over six, MAE": {"scale_rule": "four_over_six_mae"},
    "four over six, MSE": {"scale_rule": "four_over_six"},
    "scale search": {"scale_rule": "search"},
    "16x16 tiles": {"scale_rule": "max", "block": (16, 16)},
}
NVFP4: dict[str, Codec] = {f"NVFP4, {name}": functools.partial(decoded, **how) for name, how in _RULES.items()}

FORMATS = (
    *(Format(name, 4.5, codec) for name, codec in NVFP4.items()),
    Format("NVFP4, stochastic", 4.5, stochastic),
    Format("E2M1 g16, fp32 scale", 6.0, functools.partial(_fp32_scales, size=16)),
    Format("E2M1 g16, fp32 scale search", 6.0, searched_fp32),
    Format("MXFP4", 4.25, functools.partial(_power_of_two, size=32)),
    Format("E2M1 g16, E8M0 scale", 4.5, functools.partial(_power_of_two, size=16)),
    *(Format(f"INT4 g{g}", 4 + 32 / g, functools.partial(_integers, size=g, most=7)) for g in (16, 32, 128)),
    Format("NF4 g64", 4.5, functools.partial(_nf4, size=64)),
    Format("FP8 E4M3", 8.0, _fp8),
    Format("INT8", 8.0, lambda x: _integers(x, x.numel(), 127)),
    *(
        Format(f"{name}, Hadamard {size}", bits, rotated(codec, size))
        for name, bits, codec in (
            ("NVFP4, nearest", 4.5, NVFP4["NVFP4, nearest"]),
            ("NVFP4, four over six, MSE", 4.5, NVFP4["NVFP4, four over six, MSE"]),
            ("NVFP4, scale search", 4.5, NVFP4["NVFP4, scale search"]),
            ("MXFP4", 4.25, functools.partial(_power_of_two, size=32)),
            ("INT4 g128", 4.25, functools.partial(_integers, size=128, most=7)),
        )
        for size in (16, 128)
    ),
)


# --- other libraries --------------------------------------------------------------------------------------------------


def _torchao(x: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale  # noqa: PLC0415

    stored = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().amax()))
    return stored.dequantize(torch.float32)


def _torchao_mx(x: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor  # noqa: PLC0415

    return MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)


def _modelopt(x: Tensor) -> Tensor:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor  # noqa: PLC0415

    stored, scale, g = NVFP4QTensor.quantize(x.clone(), 16)
    return stored.dequantize(dtype=torch.float32, scale=scale, double_scale=g, block_sizes={-1: 16})


def _bitsandbytes(x: Tensor) -> Tensor:
    from bitsandbytes import functional  # noqa: PLC0415

    stored, state = functional.quantize_4bit(x, quant_type="nf4", blocksize=64)
    return functional.dequantize_4bit(stored, state)


PEERS = (
    Format("ModelOpt NVFP4", 4.5, _modelopt, peer=True),
    Format("torchao NVFP4", 4.5, _torchao, peer=True),
    Format("torchao MXFP4", 4.25, _torchao_mx, peer=True),
    Format("bitsandbytes NF4", 4.5, _bitsandbytes, peer=True),
)
