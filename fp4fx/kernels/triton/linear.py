"""`fp4fx::linear` on NVIDIA GPUs: which kernel for which number of rows, and how it is launched.

* gemv: few rows, no matrix unit.
* split_k: few tiles, so K is cut too, and a second kernel adds the parts up, in order.
* gemm: one program per tile of the result.
* decode: so many rows that decoding the weight once, for the library's product, costs less.

The first three read the canonical bytes and round once. `decode` rounds the product to x's dtype before an epilogue, as
a library does, and with `compute="fp32"` it is as precise as `torch.backends.cuda.matmul` lets the library be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fp4fx.capture import is_traced
from fp4fx.kernels.triton import tuning
from fp4fx.kernels.triton.gemm import gemm, reduce
from fp4fx.kernels.triton.gemv import gemv
from fp4fx.kernels.triton.launch import address, in_memory, launcher
from fp4fx.kernels.triton.variant import FUSED, Variant
from fp4fx.ops.epilogue import check_epilogue
from fp4fx.ops.library import check_input, check_weight
from fp4fx.policy import Compute
from fp4fx.sizes import estimate, known_equal

_RUN = {tuning.INTERPRETER: 0, "sm_80": 4, "sm_90": 2, "sm_100": 0, "sm_120": 4}
"""RUN of `operands.spread` for the matrix unit of a family; tcgen05 gives a whole row to a thread as it is."""
Schedule = Literal["gemv", "split_k", "gemm", "decode"]

_REDUCE_BLOCK = 1024
_GEMV_ROWS = 4
"""Rows of x that `gemv` is compiled for; a thread holds their sums."""


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    x_scale: Tensor | None = None,
    x_global_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    channel_scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    compute: Compute = "bf16",
    *,
    schedule: Schedule | None = None,
    family: str | None = None,
) -> Tensor:
    """x [..., K] fp or packed, weight of N rows -> y [..., N], contiguous: see `fp4fx.ops.compute.linear`.

    `schedule` None is the one of the table in `tuning` for `family`, None: that of x's device. A packed x has no
    "gemv", nor has a symbolic number of rows, which else gets the schedule and the tile of the example's.
    """
    check_weight(packed, scale, global_scale, in_features)
    check_input(x, x_scale, dtype, in_features, -1)
    if x_scale is None and dtype is not None:
        x = x.to(dtype)  # operands are of the result's dtype
    out_dtype = x.dtype if dtype is None else dtype
    check_epilogue(residual, out_dtype, activation, compute)
    if x.is_cuda and not is_traced(x) and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # a kernel is launched on the current one
            return linear(x, packed, scale, global_scale, bias, in_features, x_scale, x_global_scale, dtype,
                          channel_scale, residual, activation, compute, schedule=schedule, family=family)  # fmt: skip
    n = packed.shape[0]
    shape = (*x.shape[:-1], n)
    y = torch.empty(shape, dtype=out_dtype, device=x.device)
    found = y.shape if residual is None else residual.shape
    torch._check(found == y.shape, lambda: f"residual: found {list(found)}, expected the result's {list(y.shape)}")
    m = math.prod(shape[:-1])
    if known_equal(m, 0) or n == 0:
        return y
    after = _Epilogue(_contiguous(channel_scale), _contiguous(bias), _contiguous(residual), activation)
    operands = _Operands(_rows(x, m), None if x_scale is None else _rows(x_scale, m),
                         None if x_global_scale is None else in_memory(x_global_scale), packed.contiguous(),
                         scale.contiguous(), in_memory(global_scale), in_features, compute)  # fmt: skip
    family = family or tuning.family_of(x.device)
    chosen = schedule or _schedule(operands, m, family)
    if chosen == "decode":
        _decode(operands, after, y.view(m, n), family)
    elif chosen == "gemv":
        _gemv(operands, after, y, m, n, _gemv_tile(tuning.tile("gemv", family, m, n, in_features), m))
    else:
        _gemm(operands, after, y, m, n, tuning.tile(chosen, family, m, n, in_features), family)
    return y


# --- arguments --------------------------------------------------------------------------------------------------------


class _Operands(NamedTuple):
    """x [M, K] (or packed, with its scales) and the weight [N, K]."""

    x: Tensor
    x_scale: Tensor | None
    x_global_scale: Tensor | None
    packed: Tensor
    scale: Tensor
    global_scale: Tensor
    k: int
    compute: Compute


class _Epilogue(NamedTuple):
    """What follows the product; all contiguous."""

    channel_scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    activation: str

    def pointers(self, unused: Tensor) -> tuple[Tensor, ...]:
        """Three arguments of a kernel; for one that is not there `unused`, which is not read."""
        return tuple(unused if t is None else t for t in (self.channel_scale, self.bias, self.residual))

    def flags(self) -> dict[str, Any]:
        """The constexpr arguments."""
        given = (self.channel_scale is not None, self.bias is not None, self.residual is not None)
        return dict(zip(("HAS_SCALE", "HAS_BIAS", "HAS_RESIDUAL"), given, strict=True), ACTIVATION=self.activation)


_NOTHING = _Epilogue(None, None, None, "none")


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def _rows(x: Tensor, m: tuning.Size) -> Tensor:
    """x [..., K] -> [M, K], a view where that is possible with values of a row side by side; bytes contiguous."""
    x = x.reshape(m, x.shape[-1])
    return x.contiguous() if x.dtype == torch.uint8 or x.stride(-1) != 1 else x


def _pairs(x: Tensor) -> int:
    """PAIRS of `operands.pair_tile` for rows [M, K]."""
    even = known_equal(x.stride(0) % 2, 0) and x.shape[1] % 2 == 0
    aligned = x.element_size() == 2 and even and address(x) % 4 == 0
    return math.gcd(x.shape[1], 16) if aligned else 0


def _operand(dtype: torch.dtype, packed: bool, compute: Compute, interpreted: bool) -> Any:
    """The dtype of the dots for an x of `dtype`."""
    if dtype == torch.float16:
        return tl.float16
    if interpreted or (compute == "fp32" and dtype == torch.float32 and not packed):
        return tl.float32
    return tl.bfloat16


def _schedule(operands: _Operands, m: tuning.Size, family: str) -> Schedule:
    limits = tuning.largest_m(family)
    few = operands.x_scale is None and isinstance(m, int) and m <= min(limits["gemv"], _GEMV_ROWS)
    if few and address(operands.packed) % 8 == 0:
        return "gemv"
    m = estimate(m)
    native = operands.x_scale is not None and family in tuning.NATIVE
    return "split_k" if m <= limits["split_k"] else "gemm" if m <= limits["gemm"] or native else "decode"


def _ceil(a: tuning.Size, b: int) -> Any:
    return -(-a // b)


# --- launches ---------------------------------------------------------------------------------------------------------


def _gemv(operands: _Operands, after: _Epilogue, y: Tensor, m: int, n: int, tile: tuning.Tile) -> None:
    torch._check(operands.x_scale is None and m <= _GEMV_ROWS, lambda: f"gemv: up to {_GEMV_ROWS} unpacked rows of x")
    x, packed, scale = operands.x, operands.packed, operands.scale
    launcher(gemv, y)[(_ceil(n, tile.block_n),)](
        x, packed, scale, operands.global_scale, y, *after.pointers(scale),
        n, operands.k, x.stride(0), scale.shape[1],
        M=m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, **after.flags(),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **FUSED,
    )  # fmt: skip


def _gemm(operands: _Operands, after: _Epilogue, y: Tensor, m: tuning.Size, n: int, tile: tuning.Tile,
          family: str) -> None:  # fmt: skip
    x, scale, x_packed = operands.x, operands.scale, operands.x_scale is not None
    interpreted = family == tuning.INTERPRETER
    op = _operand(y.dtype, x_packed, operands.compute, interpreted)
    precise = op == tl.float32 and operands.compute == "fp32"
    native = _native_tile(tile, family) if x_packed else None
    tile = native or (_precise_tile(tile) if precise else tile)
    pairs = 0 if x_packed else _pairs(x)
    parts = max(min(tile.split_k, _ceil(operands.k, tile.block_k)), 1)
    out, following = (y, after) if parts == 1 else (y.new_empty((parts, m, n), dtype=torch.float32), _NOTHING)
    launcher(gemm, y)[(_ceil(n, tile.block_n) * _ceil(m, tile.block_m), parts)](
        x, operands.x_scale if x_packed else scale, operands.x_global_scale if x_packed else scale,
        operands.packed, scale, operands.global_scale, out,
        *following.pointers(scale), m, n, operands.k,
        x.stride(0) // 2 if pairs else x.stride(0), scale.shape[1],
        OP=op, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, X_PACKED=x_packed, PAIRS=pairs,
        PRECISE=precise, PTX=not interpreted,
        RUN=_RUN[family], NATIVE=native is not None, PARTIAL=parts > 1, **following.flags(),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **FUSED,
    )  # fmt: skip
    if parts > 1:
        _reduce(out, after, y.view(m, n), parts, scale)


def _reduce(part: Tensor, after: _Epilogue, y: Tensor, parts: int, unused: Tensor) -> None:
    m, n = y.shape
    launcher(reduce, y)[(_ceil(n, _REDUCE_BLOCK) * m,)](
        part, y, *after.pointers(unused), m, n, parts, BLOCK=_REDUCE_BLOCK, **after.flags(), **FUSED
    )  # fmt: skip


def _decode(operands: _Operands, after: _Epilogue, y: Tensor, family: str) -> None:
    """The weight (and a packed x) decoded to dense operands for the library's product."""
    from fp4fx.kernels.triton.dequantize import dequantize  # noqa: PLC0415  (only this schedule needs it)

    inner = y.dtype if y.dtype != torch.float32 or operands.compute == "fp32" or not y.is_cuda else torch.bfloat16
    (m, n), k = y.shape, operands.k
    x = operands.x
    if operands.x_scale is not None and operands.x_global_scale is not None:
        x = dequantize(x, operands.x_scale, operands.x_global_scale, (m, k), inner, family=family)
    weight = dequantize(operands.packed, operands.scale, operands.global_scale, (n, k), inner, family=family)
    if inner != y.dtype:
        torch.mm(x.to(inner), weight.t(), out_dtype=y.dtype, out=y)
    elif after.bias is not None and after.bias.dtype == y.dtype and after.channel_scale is None:
        torch.addmm(after.bias, x, weight.t(), out=y)
        after = after._replace(bias=None)
    else:
        torch.mm(x, weight.t(), out=y)
    if after != _NOTHING:
        _reduce(y, after, y, 1, operands.scale)


def _gemv_tile(tile: tuning.Tile, m: int) -> tuning.Tile:
    """A tile whose sums fit the registers."""
    return tile._replace(block_n=min(tile.block_n, 8 if m <= 2 else 4))


def _precise_tile(tile: tuning.Tile) -> tuning.Tile:
    """A tile for fp32 operands, which take twice the room, and x two of them."""
    return tile._replace(block_m=min(tile.block_m, 32), block_n=min(tile.block_n, 64), block_k=min(tile.block_k, 32))


def _native_tile(tile: tuning.Tile, family: str) -> tuning.Tile | None:
    """The tile of a product of two packed operands that the matrix unit reads itself; None where it cannot."""
    if family == "sm_100":
        return tile._replace(block_n=max(tile.block_n, 128))  # rows of the left operand that its instruction takes
    return tile if family in tuning.NATIVE else None


# --- ahead of time ----------------------------------------------------------------------------------------------------

_POINTERS = {tl.bfloat16: "*bf16", tl.float16: "*fp16", tl.float32: "*fp32"}
_MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "sm_120": "mma.sync"}
_BARE = {"HAS_SCALE": False, "HAS_BIAS": False, "HAS_RESIDUAL": False, "ACTIVATION": "none"}
_FULL = {"HAS_SCALE": True, "HAS_BIAS": True, "HAS_RESIDUAL": True, "ACTIVATION": "silu"}


def _variant(name: str, kernel: Any, pointers: dict[str, str], sizes: tuple[str, ...], constants: dict[str, Any],
             family: str, tile: tuning.Tile, matrix: str | None = None) -> Variant:  # fmt: skip
    target = int(family.removeprefix("sm_"))
    return Variant(
        name=f"{name} {family} {tile.block_m}x{tile.block_n}x{tile.block_k} warps={tile.num_warps}"
        f" stages={tile.num_stages}",
        kernel=kernel,
        signature={**pointers, **dict.fromkeys(sizes, "i32"), **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        aligned=(*pointers, *(size for size in sizes if size not in ("M", "parts"))),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        matrix={} if matrix is None else {target: matrix},
        targets=(target,),
    )


def _gemv_variant(family: str, tile: tuning.Tile, x: Any, m: int, after: dict[str, Any]) -> Variant:
    fp, u8, fp32 = _POINTERS[x], "*u8", "*fp32"
    pointers = {"x_ptr": fp, "packed_ptr": u8, "scale_ptr": u8, "global_ptr": fp32, "out_ptr": fp,
                "channel_scale_ptr": fp32, "bias_ptr": fp, "residual_ptr": fp}  # fmt: skip
    constants = {"M": m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, **after}
    name = f"gemv {x} M={m} {after['ACTIVATION']}"
    return _variant(name, gemv, pointers, ("N", "K", "x_row", "blocks"), constants, family, tile)


def _gemm_variant(family: str, tile: tuning.Tile, x: Any, after: dict[str, Any], *, partial: bool = False,
                  packed: bool = False, native: bool = False, precise: bool = False,
                  pairs: int = 16) -> Variant:  # fmt: skip
    fp, u8, fp32 = _POINTERS[x], "*u8", "*fp32"
    pointers = {"x_ptr": u8 if packed else fp, "x_scale_ptr": u8, "x_global_ptr": fp32, "packed_ptr": u8,
                "scale_ptr": u8, "global_ptr": fp32, "out_ptr": fp32 if partial else fp, "channel_scale_ptr": fp32,
                "bias_ptr": fp, "residual_ptr": fp}  # fmt: skip
    op = tl.float32 if precise else tl.float16 if x == tl.float16 else tl.bfloat16
    constants = {"OP": op, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
                 "X_PACKED": packed, "PAIRS": 0 if packed or x == tl.float32 else pairs, "PRECISE": precise,
                 "PTX": True, "RUN": _RUN[family], "NATIVE": native, "PARTIAL": partial, **after}  # fmt: skip
    kind = "native w4a4" if native else "w4a4" if packed else f"pairs={constants['PAIRS']}"
    name = f"gemm {x} {kind}{' precise' * precise}{' partial' * partial} {after['ACTIVATION']}"
    matrix = "block_scale" if native else _MATRIX[family]
    return _variant(name, gemm, pointers, ("M", "N", "K", "x_row", "blocks"), constants, family, tile, matrix)


def _reduce_variant(family: str, x: Any) -> Variant:
    fp, fp32 = _POINTERS[x], "*fp32"
    pointers = {"part_ptr": fp32, "out_ptr": fp, "channel_scale_ptr": fp32, "bias_ptr": fp, "residual_ptr": fp}
    tile = tuning.Tile(1, _REDUCE_BLOCK, 1)
    constants = {"BLOCK": _REDUCE_BLOCK, **_FULL}
    return _variant(f"reduce {x}", reduce, pointers, ("M", "N", "parts"), constants, family, tile)


def variants() -> Iterator[Variant]:
    """Every tile of the table with bf16 operands, bare or in parts and with a full epilogue; some with the others."""
    yield from {variant.name: variant for variant in _variants()}.values()  # tiles differ in their parts of K alone


def _variants() -> Iterator[Variant]:
    bf16, fp16, fp32 = tl.bfloat16, tl.float16, tl.float32
    for family in tuning.FAMILIES:
        yield _reduce_variant(family, bf16)
        for m in range(1, _GEMV_ROWS + 1):
            for tile in dict.fromkeys(_gemv_tile(tile, m) for tile in tuning.tiles("gemv", family)):
                yield _gemv_variant(family, tile, bf16, m, _FULL)
        for tile in tuning.tiles("split_k", family):
            yield _gemm_variant(family, tile, bf16, _BARE, partial=True)
            yield from _packed_variants(family, tile, partial=True)
        for tile in tuning.tiles("gemm", family):
            yield _gemm_variant(family, tile, bf16, _FULL)
            yield from _packed_variants(family, tile)
        tile = tuning.tile("gemm", family, 32, 4096, 4096)
        yield _gemm_variant(family, tile, fp16, _FULL)
        yield _gemm_variant(family, tile, bf16, _BARE, pairs=0)
        yield _gemm_variant(family, tile, fp32, _BARE)
        yield _gemm_variant(family, _precise_tile(tile), fp32, _BARE, precise=True)
        yield _gemv_variant(family, tuning.tile("gemv", family, 1, 4096, 4096), fp32, 1, _BARE)


def _packed_variants(family: str, tile: tuning.Tile, partial: bool = False) -> Iterator[Variant]:
    after, native = _BARE if partial else _FULL, _native_tile(tile, family)
    yield _gemm_variant(family, native or tile, tl.bfloat16, after, partial=partial, packed=True,
                        native=native is not None)  # fmt: skip
