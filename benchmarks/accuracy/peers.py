"""What others make of the same weights: their own encoders, each on the weights that fp4fx's default policy packs."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from benchmarks.peers import UnavailableError
from fp4fx import nvfp4
from fp4fx.codes import E4M3_MAX
from fp4fx.site import Site

Codec = Callable[[Tensor, Site], tuple[Tensor, int]]
"""Weight fp32 of a site -> the weight after rounding, fp32 of the same shape, and the bytes it takes with scales."""


def on_rows(rounded: Callable[[Tensor], tuple[Tensor, int]]) -> Codec:
    """A codec of rows [N, K], K being the axis that the op reduces over, for the weight of any op."""

    def codec(weight: Tensor, site: Site) -> tuple[Tensor, int]:
        rows = nvfp4.to_rows(weight, site.order, site.groups)
        values, stored = rounded(rows.reshape(-1, rows.shape[-1]))
        return nvfp4.from_rows(values.reshape(rows.shape), weight.shape, site.order, site.groups), stored

    return codec


def replaced(model: nn.Module, sites: Sequence[Site], codec: Codec) -> tuple[nn.Module, int]:
    """A copy of the model with these sites' weights rounded, and the bytes that those take."""
    result, stored = copy.deepcopy(model), 0
    with torch.no_grad():
        for site in sites:
            weight = result.get_parameter(site.parameter)
            values, taken = codec(weight, site)
            weight.copy_(values)
            stored += taken
    return result, stored


def int4(rows: Tensor) -> tuple[Tensor, int]:
    """Rows [N, K] -> symmetric INT4, nearest, groups of 32 along K with an fp16 scale of amax/7: 4.5 bits."""
    n, k = rows.shape
    groups = pad(rows, (0, -k % 32)).view(n, -1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    codes = (groups / scale.where(scale > 0, 1.0)).round().clamp(-8, 7)
    return (codes * scale).view(n, -1)[:, :k], rows.numel() // 2 + scale.numel() * 2


def fp8(rows: Tensor, *, per_row: bool) -> tuple[Tensor, int]:
    """Rows [N, K] -> FP8 E4M3, nearest, an fp32 scale of amax/448 for each row or for all."""
    scale = (rows.abs().amax(1, keepdim=True) if per_row else rows.abs().amax()) / E4M3_MAX
    scale = scale.where(scale > 0, 1.0)
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale, rows.numel() + scale.numel() * 4


def nf4(rows: Tensor) -> tuple[Tensor, int]:
    """Rows [N, K] -> bitsandbytes' NF4, blocks of 64 values, an fp32 scale each: 4.5 bits."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package of GPU kernels
    from bitsandbytes import functional  # noqa: PLC0415

    packed, state = functional.quantize_4bit(
        rows.flatten(), quant_type="nf4", blocksize=64
    )  # of rows it loses the ends
    return functional.dequantize_4bit(packed, state).view_as(rows), packed.nbytes + state.absmax.nbytes


def modelopt(rows: Tensor) -> tuple[Tensor, int]:
    """Rows [N, K] -> ModelOpt's NVFP4 as it stores it, the tail of K padded in front as its quantizers pad it."""
    k = rows.shape[1]
    padded = pad(rows, (-k % nvfp4.BLOCK, 0))
    return _modelopt(padded)(padded, None)[:, -k:], padded.numel() // 16 * 9 + 4


def modelopt_last_axis(weight: Tensor, _site: Site) -> tuple[Tensor, int]:
    """ModelOpt's NVFP4 with the blocks where its configurations put them: on the last axis, so on a kernel's width."""
    values, stored = modelopt(weight.reshape(-1, weight.shape[-1]))
    return values.view_as(weight), stored


def modelopt_sweep(rows: Tensor) -> tuple[Tensor, int]:
    """Rows [N, K] -> ModelOpt's NVFP4 with the best of all 126 scales for each block: its `NVFP4MSECalibrator`."""
    from modelopt.torch.quantization.calib import NVFP4MSECalibrator  # noqa: PLC0415

    k = rows.shape[1]
    padded = pad(rows, (-k % nvfp4.BLOCK, 0))
    rounded = _modelopt(padded)
    blocks = padded.view(-1, nvfp4.BLOCK)
    amax = blocks.abs().amax(1, keepdim=True)

    def quantize(x: Tensor, block_amax: Tensor) -> Tensor:
        return rounded(x, block_amax)

    calibrator = NVFP4MSECalibrator(amax, blocks.abs().amax(), axis=0, quant_func=quantize)
    calibrator.collect(blocks)
    return rounded(blocks, calibrator.compute_amax()).view_as(padded)[:, -k:], padded.numel() // 16 * 9 + 4


def _modelopt(rows: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """ModelOpt's encoder and decoder with the global scale of these rows.

    The result takes values [M, 16 * n] and either None or the amax [M, n] that the scales of its blocks are made from.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor  # noqa: PLC0415

    g = rows.abs().amax() / 2688

    def rounded(values: Tensor, amax: Tensor | None) -> Tensor:
        scale = None if amax is None else (amax / (6 * g)).clamp(2**-9, 448).to(torch.float8_e4m3fn)
        stored, scale, _ = NVFP4QTensor.quantize(values, nvfp4.BLOCK, scale, g)
        return stored.dequantize(dtype=torch.float32, scale=scale, double_scale=g, block_sizes={-1: nvfp4.BLOCK})

    return rounded


def torchao(model: nn.Module) -> tuple[nn.Module, tuple[str, ...], int]:
    """A copy with torchao's NVFP4 weights in every Linear that takes them, the names of those weights, their bytes.

    Raises:
        UnavailableError: the model has no such layer.
    """
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig  # noqa: PLC0415
    from torchao.quantization import quantize_  # noqa: PLC0415

    def takes(module: nn.Module, _name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(size % nvfp4.BLOCK for size in module.weight.shape)

    result = copy.deepcopy(model)
    names = [name for name, module in result.named_modules() if takes(module, name)]
    if not names:
        raise UnavailableError("it takes Linear layers with both sizes a multiple of 16; there is none")
    quantize_(result, NVFP4WeightOnlyConfig(), takes)
    stored = 0
    for name in names:
        weight = result.get_submodule(name).weight
        parts = [weight.per_tensor_scale, *(getattr(weight, part) for part in weight.tensor_data_names)]
        stored += sum(part.nbytes for part in parts)
    return result, tuple(f"{name}.weight" for name in names), stored
