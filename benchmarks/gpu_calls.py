"""What is timed on a GPU: linear layers, convolutions and the quantizer, by fp4fx's Triton kernels and by their peers.

Each function gives a list of calls, one per copy of its inputs; see `gpu_timing`. On the CPU the kernels are
interpreted, in fp32, which the interpreter computes rightly.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import rotate
from benchmarks.peers.base import UnavailableError, linear_module
from fp4fx import nvfp4
from fp4fx.bench import Call
from fp4fx.kernels import scaled_mm

OURS, CUBLAS, CUDNN = "fp4fx", "cuBLAS bf16", "cuDNN bf16, channels_last"
GROUP = 128
"""Of the integer peers."""


def dtype_of(device: torch.device) -> torch.dtype:
    """Of activations."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def kernel(module: str) -> Any:
    """A module of fp4fx.kernels.triton.

    Raises:
        UnavailableError: it cannot be imported, and why.
    """
    try:
        return importlib.import_module(f"fp4fx.kernels.triton.{module}")
    except ImportError as error:
        raise UnavailableError(f"{error}") from error


# --- linear ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def weight(n: int, k: int, device: torch.device) -> nvfp4.NVFP4:
    """A quantized weight [n, k]."""
    torch.manual_seed(0)
    return nvfp4.quantize(torch.randn(n, k, device=device, dtype=dtype_of(device)))


@functools.lru_cache(maxsize=1)
def dense(n: int, k: int, device: torch.device) -> Tensor:
    """The same weight decoded."""
    return nvfp4.dequantize(weight(n, k, device))


def inputs(m: int, k: int, device: torch.device) -> Tensor:
    """x [m, k]."""
    return torch.randn(m, k, device=device, dtype=dtype_of(device))


def packed_bytes(n: int, k: int) -> int:
    """Of a weight [n, k] in NVFP4."""
    return n * math.ceil(k / nvfp4.BLOCK) * 9


def linear(m: int, n: int, k: int, device: torch.device, **options: Any) -> list[Call]:
    """fp4fx's kernel, W4A16; options are its own, `schedule` say."""
    run = kernel("linear").linear
    q = weight(n, k, device)

    def make(_: int) -> Call:
        parts = [part.clone() for part in (q.packed, q.scale, q.global_scale)]
        return functools.partial(run, inputs(m, k, device), *parts, None, k, **options)

    return rotate(make, packed_bytes(n, k), device)


def linear_w4a4(m: int, n: int, k: int, device: torch.device, way: str) -> list[Call]:
    """The product with a packed x: by fp4fx's kernel ("native") or by the library's ("scaled_mm")."""
    run = kernel("linear").linear if way == "native" else functools.partial(scaled_mm.linear, own_rows=0)
    q, x = weight(n, k, device), nvfp4.quantize(inputs(m, k, device))

    def make(_: int) -> Call:
        parts = [part.clone() for part in (q.packed, q.scale, q.global_scale)]
        return functools.partial(run, x.packed, *parts, None, k, x.scale, x.global_scale, dtype_of(device))

    return rotate(make, packed_bytes(n, k), device)


def linear_error(m: int, n: int, k: int, device: torch.device) -> float:
    """The kernel's relative error against fp64 with the same packed weight."""
    q, x = weight(n, k, device), inputs(m, k, device)
    y = kernel("linear").linear(x, q.packed, q.scale, q.global_scale, None, k)
    exact = x.double() @ dense(n, k, device).double().T
    return float((y.double() - exact).norm() / exact.norm())


def linear_candidates(m: int, n: int, k: int, device: torch.device) -> dict[str, Callable[[], list[Call]]]:
    """The ways to compute x [m, k] times a weight [n, k], by name."""
    rotated = functools.partial(_peer, m, n, k, device)
    return {
        OURS: lambda: linear(m, n, k, device),
        CUBLAS: lambda: rotated(lambda w: functools.partial(F.linear, weight=w.clone()), 2),
        "torch int4pack g128": lambda: rotated(_int4pack, 0.5),
        "gemlite INT4 g128": lambda: rotated(_gemlite_int4, 0.5),
        "gemlite MXFP4": lambda: rotated(lambda w: _gemlite("A16W4_MXFP", w), 0.5),
        "torchao NVFP4": lambda: rotated(_torchao, 0.5),
    }


def _peer(
    m: int, n: int, k: int, device: torch.device, build: Callable[[Tensor], Callable[[Tensor], Any]], per: float
) -> list[Call]:
    """Calls of a peer that makes its layer from a dense weight; it reads `per` bytes a weight."""
    w = dense(n, k, device)
    return rotate(lambda _: functools.partial(build(w), inputs(m, k, device)), int(n * k * per), device)


def _integers(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15 i32 [n, k], scale and lowest value fp32 [n, k / GROUP]."""
    groups = w.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low).clamp(min=1e-6) / 15
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    return codes.flatten(1).int(), scale, low


def _int4pack(w: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's own 4-bit integer product, w = (q - 8) · scale + zero."""
    if w.device.type != "cuda":
        raise UnavailableError("needs CUDA")
    codes, scale, low = _integers(w)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    scales = torch.stack((scale, low + 8 * scale), -1).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


def _gemlite(kind: str, w: Tensor) -> Callable[[Tensor], Tensor]:
    """A weight-only layer of gemlite, which searches its tiles at the first call."""
    import gemlite  # noqa: PLC0415  (a package that is missing is a row)
    from gemlite import helper  # noqa: PLC0415

    gemlite.set_autotune("fast")
    layer = getattr(helper, kind)(device=str(w.device), dtype=w.dtype)
    return layer.from_linear(linear_module(w, w.dtype))  # type: ignore[no-any-return]


def _gemlite_int4(w: Tensor) -> Callable[[Tensor], Tensor]:
    import gemlite  # noqa: PLC0415
    from gemlite import helper  # noqa: PLC0415

    gemlite.set_autotune("fast")
    codes, scale, low = _integers(w)
    scales, zeros = (t.reshape(-1, 1).to(w.dtype) for t in (scale, -low / scale))  # w = (q - zero) · scale
    layer = helper.A16W4_HQQ_INT(device=str(w.device), dtype=w.dtype)
    return layer.from_weights(codes.to(torch.uint8), scales, zeros, 4, GROUP, None)  # type: ignore[no-any-return]


def _torchao(w: Tensor) -> Callable[[Tensor], Any]:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig  # noqa: PLC0415
    from torchao.quantization import quantize_  # noqa: PLC0415

    if w.device.type != "cuda":
        raise UnavailableError("needs CUDA")
    module = linear_module(w, torch.bfloat16)
    quantize_(module, NVFP4WeightOnlyConfig())
    return functools.partial(_compiled_linear(), weight=module.weight)


@functools.cache
def _compiled_linear() -> Callable[..., Any]:
    """Compiled once for all copies of a weight."""
    return torch.compile(F.linear, dynamic=False)  # type: ignore[no-any-return]


# --- convolutions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """A convolution of a network; its padding keeps the size but for the stride."""

    net: str
    channels: int
    n: int
    size: int
    """Pixels a side of x."""
    kernel: int
    stride: int = 1
    transposed: bool = False
    batch: int = 1
    times: int = 1
    """How often the network has it."""

    @property
    def padding(self) -> int:
        """On every side."""
        return 0 if self.transposed else self.kernel // 2

    @property
    def out(self) -> int:
        """Pixels a side of y."""
        if self.transposed:
            return (self.size - 1) * self.stride + self.kernel
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def product(self) -> tuple[int, int, int]:
        """m, n and k of the product that it is."""
        return self.batch * self.out**2, self.n, self.channels * self.kernel**2

    def __str__(self) -> str:
        kind = f"{self.kernel}x{self.kernel}/{self.stride}" + ("T" if self.transposed else "")
        return f"{self.batch}x{self.channels}x{self.size}² {kind} {self.n}"


def _resnet50() -> list[Conv]:
    found = []
    width, size = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner, outer, stride = 64 << stage, 256 << stage, 1 if stage == 0 else 2
        before = size
        size = before // stride
        found += [
            Conv("resnet50", width, inner, before, 1),
            Conv("resnet50", inner, inner, before, 3, stride),
            Conv("resnet50", inner, outer, size, 1, times=blocks),
            Conv("resnet50", width, outer, before, 1, stride),
            Conv("resnet50", outer, inner, size, 1, times=blocks - 1),
            Conv("resnet50", inner, inner, size, 3, times=blocks - 1),
        ]
        width = outer
    return found


def _unet() -> list[Conv]:
    found = []
    for level in range(5):
        c, size = 64 << level, 256 >> level
        if level:
            found.append(Conv("unet", c // 2, c, size, 3))
        found.append(Conv("unet", c, c, size, 3, times=1 if level == 4 else 2))
        if level < 4:
            found.append(Conv("unet", 2 * c, c, size, 3))
            found.append(Conv("unet", 2 * c, c, size // 2, 2, 2, transposed=True))
    return found


def _convnext() -> list[Conv]:
    found = []
    for stage, blocks in enumerate((3, 3, 9, 3)):
        c, size = 96 << stage, 56 >> stage
        found += [Conv("convnext", c, 4 * c, size, 1, times=blocks), Conv("convnext", 4 * c, c, size, 1, times=blocks)]
    return found


CONVS = (*_resnet50(), *_unet(), *_convnext())
"""Of resnet50 (without its first), of `nets.UNet`, and the 1x1 of convnext_tiny."""

TINY_CONVS = (Conv("resnet50", 16, 16, 4, 3, 2), Conv("unet", 16, 16, 2, 2, 2, transposed=True))


def conv_tensors(case: Conv, device: torch.device) -> tuple[Tensor, Tensor, nvfp4.NVFP4]:
    """x [B, C, H, W] in channels_last, the decoded weight likewise, the packed one."""
    torch.manual_seed(0)
    dtype = dtype_of(device)
    pair = (case.channels, case.n) if case.transposed else (case.n, case.channels)
    order = "conv_transpose" if case.transposed else "conv"
    q = nvfp4.quantize(torch.randn(*pair, case.kernel, case.kernel, device=device, dtype=dtype), order=order)
    x = torch.randn(case.batch, case.channels, case.size, case.size, device=device, dtype=dtype)
    last = torch.channels_last
    return x.to(memory_format=last), nvfp4.dequantize(q).to(memory_format=last), q


def conv(case: Conv, device: torch.device) -> list[Call]:
    """fp4fx's kernel."""
    module = kernel("conv")
    x, _, q = conv_tensors(case, device)
    tail = [[case.stride] * 2, [case.padding] * 2, *([[0] * 2] if case.transposed else []), [1] * 2, 1]
    run = module.conv_transpose if case.transposed else module.conv

    def make(_: int) -> Call:
        parts = [part.clone() for part in (q.packed, q.scale, q.global_scale)]
        return functools.partial(run, x.clone(), *parts, None, case.channels, [case.kernel] * 2, *tail)

    return rotate(make, x.nbytes + q.packed.nbytes + q.scale.nbytes, device)


def conv_library(case: Conv, device: torch.device) -> list[Call]:
    """torch's, from the decoded weight."""
    torch.backends.cudnn.benchmark = True
    x, w, _ = conv_tensors(case, device)
    run = F.conv_transpose2d if case.transposed else F.conv2d
    return rotate(
        lambda _: functools.partial(run, x.clone(), w.clone(), stride=case.stride, padding=case.padding),
        x.nbytes + w.nbytes,
        device,
    )


def conv_error(case: Conv, device: torch.device) -> float:
    """The kernel's relative error against fp64 with the same packed weight."""
    x, w, _ = conv_tensors(case, device)
    run = F.conv_transpose2d if case.transposed else F.conv2d
    exact = run(x.double(), w.double(), stride=case.stride, padding=case.padding)
    return float((conv(case, device)[0]().double() - exact).norm() / exact.norm())


# --- quantize --------------------------------------------------------------------------------------------------------


def quantize(m: int, k: int, device: torch.device) -> list[Call]:
    """fp4fx's kernel with a static global scale."""
    run = kernel("quantize").quantize
    one = torch.ones((), device=device)
    return rotate(lambda _: functools.partial(run, inputs(m, k, device), one), 2 * m * k, device)
