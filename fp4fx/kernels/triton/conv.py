"""Convolutions as one implicit product: yᵀ = W · xᵀ over the taps of the kernel and the channels of a pixel.

A program has a tile of W's rows and one of y's pixels. A row of W lies over (*kernel, C/groups), so where C/groups is a
multiple of 16 a block of K has one tap, and its channels lie side by side in a channels_last x. Otherwise K is walked
flat, and every value of it finds its own tap and channel. A transposed convolution is a plain one for each phase of its
stride (see `conv_geometry`). Where there are few tiles, K is split into parts that a second kernel adds up in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4fx.errors import LayoutError
from fp4fx.kernels.triton import tuning
from fp4fx.kernels.triton.conv_geometry import Geometry, geometry, side_by_side
from fp4fx.kernels.triton.conv_kernels import conv_kernel, sum_kernel
from fp4fx.kernels.triton.launch import address, device_of, in_memory, launcher
from fp4fx.kernels.triton.variant import FUSED, Variant
from fp4fx.nvfp4 import BLOCK
from fp4fx.ops.epilogue import check_epilogue
from fp4fx.ops.library import CHANNELS_LAST, check_input, check_weight
from fp4fx.policy import Compute
from fp4fx.sizes import estimate, known_equal

# --- calls ------------------------------------------------------------------------------------------------------------

_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}
_SUM_BLOCK = 1024
_GEOMETRY = ("kernel", "stride", "padding", "dilation", "common", "inverse", "bounded", "transposed", "phases")
_PROGRAMS = 128
"""As many keep a GPU busy: K is split while there are fewer."""


class _Product(NamedTuple):
    """The arguments of a call: x is fp [B, C, *spatial] or packed [B, *spatial, bytes]."""

    x: Tensor
    x_scale: Tensor | None
    x_global_scale: Tensor | None
    packed: Tensor
    scale: Tensor
    global_scale: Tensor
    bias: Tensor | None
    channel_scale: Tensor | None
    residual: Tensor | None
    in_channels: int
    groups: int
    activation: str
    compute: Compute


class _Call(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[tuning.Size, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile: tuning.Tile

    def run(self, y: Tensor) -> None:
        """Launch it, on the current device, for that result."""
        options = {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages, **FUSED}
        launcher(self.kernel, y)[self.grid](**self.arguments, **self.constants, **options)


def _operand_dtype(dtype: torch.dtype, quantized: bool, compute: str, family: str) -> torch.dtype:
    """What is multiplied: a packed activation is exact in 16 bits, and the interpreter has no bf16."""
    if dtype == torch.float16:
        return dtype
    if family == "interpreter" or (dtype == torch.float32 and compute == "fp32" and not quantized):
        return torch.float32
    return torch.bfloat16


def _walk(
    family: str, m: tuning.Size, rows: int, channels: int, taps: int, x: torch.dtype, op: torch.dtype
) -> tuple[tuning.Tile, bool, int]:
    """For m pixels of dtype x: the tile, whether K is walked flat, and how many steps that takes.

    The table's tiles are for 16 bits and whole blocks of channels: others have less room in shared memory, and where
    every value has an address of its own, in registers.
    """
    tile = tuning.tile("conv", family, m, rows, channels * taps)
    flat = channels % BLOCK != 0 or channels < 2 * BLOCK
    if flat or op == torch.float32:
        tile = tile._replace(block_m=min(tile.block_m, 64), block_n=min(tile.block_n, 64))
    if x == torch.float32 and family == "sm_120":  # more spills by Triton 3.6
        tile = tile._replace(block_m=min(tile.block_m, 32))
    most = 32 if flat or x == torch.float32 else tile.block_k
    line, lines = (channels * taps, 1) if flat else (channels, taps)
    sizes = [size for size in (128, 64, 32) if size <= most]
    block_k = min(sizes, key=lambda size: (triton.cdiv(line, size) * size, -size))
    block_n = min(tile.block_n, max(16, triton.next_power_of_2(rows)))
    return tile._replace(block_k=block_k, block_n=block_n), flat, triton.cdiv(line, block_k) * lines


def _named(prefix: str, values: Sequence[int]) -> dict[str, int]:
    """One value for each of the three axes, 0 for those that are missing in front."""
    return {f"{prefix}{i}": value for i, value in enumerate((*(0,) * (3 - len(values)), *values))}


def _calls(t: _Product, y: Tensor, g: Geometry, family: str, parts: int | None = None) -> Iterator[_Call]:
    """What computes y [B, N, *spatial], which is dense; its dtype is that of x, or what x decodes to."""
    quantized, batch = t.x_scale is not None, y.shape[0]
    rows, channels = y.shape[1] // t.groups, t.in_channels // t.groups
    op = _operand_dtype(y.dtype, quantized, t.compute, family)
    m, phases = batch * g.pixels, math.prod(g.phases)
    tile, flat, steps = _walk(family, m, rows, channels, g.taps, t.x.dtype, op)
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(rows, tile.block_n) * t.groups
    if parts is None:
        parts = max(1, min(tile.split_k, _PROGRAMS // (estimate(tiles) * phases), steps // 4))

    pixels = t.x if quantized else t.x.movedim(1, -1)
    if quantized or (pixels.stride(-1) != 1 and t.in_channels > 1):
        pixels = pixels.contiguous()
    pixels = g.near(pixels)
    pairs = 0 if quantized else side_by_side(pixels, channels)
    unit = pixels.shape[-1] if quantized else 2 if pairs else 1
    places = zip(pixels.stride()[:-1], pixels.shape, strict=False)
    x_image, *x_strides = (0 if known_equal(n, 1) else s // unit for s, n in places)
    sums = y if parts == 1 else y.new_empty(parts * y.numel(), dtype=torch.float32)

    follows = {"x_global_ptr": None if t.x_global_scale is None else in_memory(t.x_global_scale)}
    follows |= {"global_ptr": in_memory(t.global_scale), "channel_scale_ptr": t.channel_scale}
    follows |= {"bias_ptr": t.bias, "residual_ptr": t.residual}
    sizes = {"groups": t.groups, "rows": rows, "channels": channels, "row_blocks": t.scale.shape[1]}
    sizes |= {"x_blocks": 0 if t.x_scale is None else t.x_scale.shape[-1], "batch": batch, "parts": parts}
    sizes |= {**_named("in", g.inner), **_named("out", g.outer)}
    strides = {"x_image": x_image, **_named("x", x_strides), "y_image": y.stride(0), "y_channel": y.stride(1)}
    strides |= {**_named("y", y.stride()[2:]), "y_part": y.numel()}
    geometry = {name.upper(): getattr(g, name) for name in _GEOMETRY}
    fours = not flat and math.gcd(channels // BLOCK, tile.block_k // BLOCK, address(t.scale)) % 4 == 0
    constants = {"FLAT": flat, "FOURS": fours, "PAIRS": pairs, "PART": parts > 1, "ACTIVATION": t.activation}
    constants |= {"OP": _TRITON[op], "PRECISION": "tf32x3", "PTX": family != "interpreter" and op != torch.float32}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    pointers = {"x_ptr": pixels, "x_scale_ptr": t.x_scale, "packed_ptr": t.packed, "scale_ptr": t.scale, "y_ptr": sums}
    yield _Call(conv_kernel, (tiles, phases, parts), pointers | follows | sizes | strides, constants | geometry, tile)
    if parts > 1:
        sizes = {"size": y.numel(), "rows": y.shape[1], "inner": y.stride(1), "parts": parts}
        constants = {"ACTIVATION": t.activation, "OP": _TRITON[op], "BLOCK": _SUM_BLOCK}
        grid = (triton.cdiv(y.numel(), _SUM_BLOCK), 1, 1)
        pointers = {"parts_ptr": sums, "y_ptr": y}
        yield _Call(sum_kernel, grid, pointers | follows | sizes, constants, tile._replace(num_warps=4))


# --- ops --------------------------------------------------------------------------------------------------------------

_FEW = 16
"""Results per group from which on a tile is worth it: the least rows of a dot."""


def refuse(groups: int, n: int | None, padding: Sequence[int | torch.SymInt]) -> str | None:
    """Why these kernels do not take a convolution of n results, or None."""
    if groups > 1 and n is not None and n // groups < _FEW:
        return f"{groups} groups of {n // groups} results leave most of a tile empty"
    if any(p < 0 for p in padding):
        return f"negative padding {tuple(padding)}"
    return None


def conv(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_scale: Tensor | None = None,
    x_global_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    channel_scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    compute: Compute = "bf16",
    *,
    parts: int | None = None,
    family: str | None = None,
) -> Tensor:
    """`fp4fx::conv` on CUDA, or on the CPU by Triton's interpreter.

    Args:
        x ... compute: see `fp4fx.ops.compute.conv`.
        parts: of K, added up in order; None chooses by the number of tiles, of a symbolic batch by the example's.
        family: of `tuning`, None: that of x's device.
    """
    t = _Product(x, x_scale, x_global_scale, packed, scale, global_scale, bias, channel_scale, residual, in_channels,
                 groups, activation, compute)  # fmt: skip
    spatial = tuple(x.shape[1:-1] if x_scale is not None else x.shape[2:])
    sizes = (tuple(sizes) for sizes in (kernel_size, stride, padding, dilation))
    return _run(t, geometry(spatial, *sizes), dtype, parts, family)


def conv_transpose(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_scale: Tensor | None = None,
    x_global_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    channel_scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    compute: Compute = "bf16",
    *,
    parts: int | None = None,
    family: str | None = None,
) -> Tensor:
    """`fp4fx::conv_transpose` on CUDA, or on the CPU by Triton's interpreter; the arguments are those of `conv`."""
    t = _Product(x, x_scale, x_global_scale, packed, scale, global_scale, bias, channel_scale, residual, in_channels,
                 groups, activation, compute)  # fmt: skip
    spatial = tuple(x.shape[1:-1] if x_scale is not None else x.shape[2:])
    sizes = (tuple(sizes) for sizes in (kernel_size, stride, padding, dilation, output_padding))
    return _run(t, geometry(spatial, *sizes), dtype, parts, family)


def _run(t: _Product, g: Geometry, dtype: torch.dtype | None, parts: int | None, family: str | None) -> Tensor:
    """Checks, the memory of the result, and the launches."""
    if t.x_scale is None and dtype is not None and dtype != t.x.dtype:
        t = t._replace(x=t.x.to(dtype))  # operands are of the result's dtype
    result = _check(t, g, dtype)
    last = _channels_last(t.x)
    if g.is_pointwise and t.groups == 1 and parts is None and (last or math.prod(g.inner) == 1):
        y = _pointwise(t, dtype, family)
        return y.movedim(-1, 1) if last else y.view(y.shape[0], -1, *y.shape[1:-1])
    shape = (t.x.shape[0], t.packed.shape[0], *g.outer[5 - t.x.dim() :])
    memory_format = CHANNELS_LAST[t.x.dim()] if last else torch.contiguous_format
    y = torch.empty(shape, dtype=result, device=t.x.device, memory_format=memory_format)
    if known_equal(y.numel(), 0):
        return y
    residual = t.residual
    if residual is not None:
        same, found = residual.shape == y.shape, list(residual.shape)
        torch._check(same, lambda: f"residual: found {found}, expected the result's {list(y.shape)}")
        if residual.stride() != y.stride():
            residual = torch.empty_like(y).copy_(residual)
    dense = {name: value.contiguous() for name in _DENSE if (value := getattr(t, name)) is not None}
    with device_of(y):
        for call in _calls(t._replace(residual=residual, **dense), y, g, family or tuning.family_of(y.device), parts):
            call.run(y)
    return y


_DENSE = ("x_scale", "packed", "scale", "bias", "channel_scale")


def _check(t: _Product, g: Geometry, dtype: torch.dtype | None) -> torch.dtype:
    """Refuse what does not fit together -> the dtype of the result."""
    n = t.packed.shape[0]
    if t.groups < 1 or t.in_channels % t.groups or n % t.groups:
        raise LayoutError(f"{t.in_channels} channels and {n} results do not form {t.groups} groups")
    check_weight(t.packed, t.scale, t.global_scale, g.taps * t.in_channels // t.groups)
    check_input(t.x, t.x_scale, dtype, t.in_channels, 1)
    result = t.x.dtype if dtype is None or t.x_scale is None else dtype
    if result not in _TRITON:
        raise LayoutError(f"found {result}, the kernels take float32, bfloat16 and float16")
    check_epilogue(t.residual, result, t.activation, t.compute)
    for name, vector in (("bias", t.bias), ("channel_scale", t.channel_scale)):
        if vector is not None and vector.shape != (n,):
            raise LayoutError(f"{name} must have {n} values, found {tuple(vector.shape)}")
    if estimate(t.x.shape[0]) * math.prod(g.outer) >= 2**31 - 256:  # a tile may end past the last one
        raise LayoutError(f"a result of {t.x.shape[0]} x {g.outer} pixels: the kernels count them in 31 bits")
    return result


def _channels_last(x: Tensor) -> bool:
    """Whether the result has its channels last: see `fp4fx.ops.library.in_format_of`."""
    last = CHANNELS_LAST.get(x.dim())
    if last is None or x.dtype == torch.uint8:
        return last is not None
    return not x.is_contiguous() and x.is_contiguous(memory_format=last)


def _pointwise(t: _Product, dtype: torch.dtype | None, family: str | None) -> Tensor:
    """Every pixel by itself: rows [B, *spatial, N] of a linear."""
    from fp4fx.kernels.triton.linear import linear  # noqa: PLC0415

    x = t.x if t.x_scale is not None else t.x.movedim(1, -1)
    residual = None if t.residual is None else t.residual.movedim(1, -1)
    return linear(x, t.packed, t.scale, t.global_scale, t.bias, t.in_channels, t.x_scale, t.x_global_scale, dtype,
                  t.channel_scale, residual, t.activation, t.compute, family=family)  # fmt: skip


# --- ahead of time ----------------------------------------------------------------------------------------------------

_SAME = ((1, 1), (1, 1), (1, 1))
_CASES: Mapping[str, tuple[tuple[int, ...], int, Any, int]] = {  # x, results, geometry, groups
    "3x3": ((32, 128, 56, 56), 128, ((3, 3), *_SAME), 1),
    "3x3 of few pixels": ((1, 512, 7, 7), 512, ((3, 3), *_SAME), 1),
    "3x3 by 2 of 96 channels": ((32, 96, 56, 56), 192, ((3, 3), (2, 2), (1, 1), (1, 1)), 1),
    "3x3 of 48 channels": ((32, 48, 56, 56), 48, ((3, 3), *_SAME), 1),
    "3x3 in 32 groups": ((8, 1024, 28, 28), 1024, ((3, 3), *_SAME), 32),
    "3x3 in groups of 16 results": ((8, 256, 28, 28), 128, ((3, 3), *_SAME), 8),
    "1x1 by 2": ((8, 256, 56, 56), 512, ((1, 1), (2, 2), (0, 0), (1, 1)), 1),
    "7x7 by 2 of 3 channels": ((8, 3, 224, 224), 64, ((7, 7), (2, 2), (3, 3), (1, 1)), 1),
    "3x3 of 16 channels": ((8, 16, 112, 112), 64, ((3, 3), *_SAME), 1),
    "1-d": ((8, 80, 3000), 512, ((3,), (1,), (1,), (1,)), 1),
    "3-d": ((1, 128, 16, 64, 64), 128, ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)), 1),
    "transposed 4x4 by 2": ((8, 256, 32, 32), 128, ((4, 4), (2, 2), (1, 1), (1, 1), (0, 0)), 1),
    "transposed 16 by 8, 1-d": ((1, 512, 200), 256, ((16,), (8,), (4,), (1,), (0,)), 1),
    "transposed 4x4 by 2 of 8 channels": ((8, 8, 32, 32), 64, ((4, 4), (2, 2), (1, 1), (1, 1), (0, 0)), 1),
}
_MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}


def _example(name: str, dtype: torch.dtype, **changes: Any) -> tuple[_Product, Tensor, Geometry]:
    """A case without its data, x and y in channels_last: with a bias, and what else the changes say."""
    shape, n, axes, groups = _CASES[name]
    g = geometry(shape[2:], *axes)

    def empty(*sizes: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    x = empty(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)
    y = empty(shape[0], *g.outer[5 - len(shape) :], n, dtype=dtype).movedim(-1, 1)
    blocks = triton.cdiv(shape[1] // groups * g.taps, BLOCK)
    one, vector = empty(dtype=torch.float32), empty(n, dtype=dtype)
    weight = (empty(n, 8 * blocks), empty(n, blocks), one)
    t = _Product(x, None, None, *weight, vector, None, None, shape[1], groups, "none", "bf16")
    if changes.pop("packed", False):
        lead, x_blocks = (shape[0], *shape[2:]), triton.cdiv(shape[1], BLOCK)
        t = t._replace(x=empty(*lead, 8 * x_blocks), x_scale=empty(*lead, x_blocks), x_global_scale=one)
    if changes.pop("full", False):
        t = t._replace(channel_scale=vector, residual=y, activation="gelu")
    return t._replace(**changes), y, g


def _variant(name: str, call: _Call, target: int) -> Variant:
    """What a launch of this call compiles."""
    signature, constants, aligned = {}, dict(call.constants), []
    for key in call.kernel.arg_names:
        value = call.arguments.get(key)
        if key in call.constants:
            signature[key] = "constexpr"
        elif isinstance(value, Tensor):
            signature[key] = _POINTERS[value.dtype]
            aligned.append(key)
        elif value is None or value == 1:
            signature[key], constants[key] = "constexpr", value
        else:
            signature[key] = "i32"
            if value % 16 == 0:
                aligned.append(key)
    # fewer rows than a warp group multiplies take the older instruction
    matrix = {target: _MATRIX[target] if call.tile.block_n >= 64 else "mma.sync"} if call.kernel is conv_kernel else {}
    return Variant(
        name=name,
        kernel=call.kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(aligned),
        num_warps=call.tile.num_warps,
        num_stages=call.tile.num_stages,
        matrix=matrix,
        targets=(target,),
    )


def variants() -> Iterator[Variant]:
    """For every family each tile of the table, and every case at its own; in bf16, and some in other ways."""
    ways: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
        *((torch.bfloat16, {"packed": True}), (torch.bfloat16, {"full": True}), (torch.float16, {})),
        *((torch.float32, {}), (torch.float32, {"compute": "fp32"})),
    )
    for target in _MATRIX:
        family = f"sm_{target}"
        examples: list[Any] = [(name, torch.bfloat16, {}, {}) for name in _CASES if name != "3x3"]
        examples += [("3x3", dtype, changes, {}) for dtype, changes in ways]
        examples += [("3x3", torch.bfloat16, {}, {"conv": tile}) for tile in tuning.tiles("conv", family)]
        for name, dtype, changes, forced in examples:
            with tuning.forced(**forced):
                calls = tuple(_calls(*_example(name, dtype, **changes), family))
            for call in calls:
                words = [name, *(f"{key} {value}" for key, value in changes.items()), str(dtype).removeprefix("torch.")]
                words += ["x".join(map(str, call.tile[:3])) if call.kernel is conv_kernel else "sum", family]
                yield _variant(", ".join(words), call, target)
