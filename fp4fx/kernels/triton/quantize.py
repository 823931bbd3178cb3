"""Floating point to packed rows in one kernel, with the bits of `nvfp4.quantize_rows`.

A program reads a tile of whole blocks once: block maxima, scales, codes, and two codes to a byte. The even and the odd
values of a row are apart from the load on, so that packing needs no exchange between threads.

`quantize` is the op; `quantize_with` adds what training and research want from the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4fx import nvfp4
from fp4fx.errors import LayoutError, PolicyError
from fp4fx.kernels.triton import tuning
from fp4fx.kernels.triton.codec import decode_e2m1, decode_e4m3, encode_e2m1, encode_e4m3
from fp4fx.kernels.triton.swizzle import padded
from fp4fx.kernels.triton.variant import Variant
from fp4fx.site import Order

_INFINITY = tl.constexpr(0x7F800000)
_PARTS = 1024
"""Programs that search the greatest value, at most: the second pass over their results is one tile wide."""

# --- pieces -----------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(t, rows, columns, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Number of a tile -> rows i64 [ROWS, 1, 1] of x, whether its matrix has them, and blocks i32 [1, BLOCKS, 1].

    A tile ends with its matrix of `rows` rows; `columns` tiles lie side by side.
    """
    high = tl.cdiv(rows, ROWS)
    down = t // columns
    inside = (down % high) * ROWS + tl.arange(0, ROWS)[:, None, None]
    row = (down // high).to(tl.int64) * rows + inside
    block = (t % columns) * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
    return row, inside < rows, block


@triton.jit
def _load(x_ptr, at, mask):
    """Values as fp32, zeros outside of the mask; those of bf16 by their bits, which the interpreter also has exact."""
    if x_ptr.dtype.element_ty == tl.bfloat16:
        bits = tl.load(x_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + at, mask=mask, other=0)
        x = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _halves(x_ptr, hadamard_ptr, row, row_ok, block, stride, k, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
            WHOLE: tl.constexpr, HADAMARD: tl.constexpr):  # fmt: skip
    """The even and the odd values of a tile, fp32 [ROWS, BLOCKS, 8] each; zeros beyond the edges.

    WHOLE: k and the stride are whole blocks, the stride counts them, and pairs of values are read as words.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    unit: tl.constexpr = 16 if WHOLE else 1
    if HADAMARD:
        i = tl.arange(0, 16)
        x = _load(x_ptr, row * stride * unit + block * 16 + i, row_ok & (block * 16 + i < k))
        flat = tl.reshape(x, (ROWS * BLOCKS, 16))
        at = i[:, None] * 16 + 2 * tl.arange(0, 8)[None, :]
        even = tl.reshape(tl.dot(flat, tl.load(hadamard_ptr + at), input_precision="ieee"), (ROWS, BLOCKS, 8))
        odd = tl.reshape(tl.dot(flat, tl.load(hadamard_ptr + at + 1), input_precision="ieee"), (ROWS, BLOCKS, 8))
    elif WHOLE:
        word: tl.constexpr = tl.int64 if dtype == tl.float32 else tl.int32
        at = (row * stride + block) * 8 + tl.arange(0, 8)[None, None, :]
        pair = tl.load(x_ptr.to(tl.pointer_type(word), bitcast=True) + at, mask=row_ok & (block * 16 < k), other=0)
        if dtype == tl.float32:
            even = pair.to(tl.int32).to(tl.float32, bitcast=True)
            odd = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        elif dtype == tl.bfloat16:
            even = (pair << 16).to(tl.float32, bitcast=True)
            odd = (pair & -65536).to(tl.float32, bitcast=True)
        else:
            even = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            odd = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        i = block * 16 + 2 * tl.arange(0, 8)[None, None, :]
        even = _load(x_ptr, row * stride + i, row_ok & (i < k))
        odd = _load(x_ptr, row * stride + i + 1, row_ok & (i + 1 < k))
    return even, odd


@triton.jit
def _magnitude(x):
    """Values fp32 -> the bits of their magnitudes i32, which are ordered like them; infinities give 0, NaN the most."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(bits == _INFINITY, 0, bits)


@triton.jit
def _stochastic_e2m1(x, random):
    """Values fp32 [...] and random u32 [...] -> codes i32 [...]: of the two neighbours the nearer one oftener.

    The mean is the value, up to 6 where it saturates; NaN gives 0.
    """
    bits = x.to(tl.int32, bitcast=True)
    a = tl.minimum(tl.abs(x), 6.0)
    t = tl.where(a < 2.0, a * 2.0, tl.where(a < 4.0, a, a * 0.5))  # codes in steps of one
    below = t.to(tl.int32)
    up = (random >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 < t - below.to(tl.float32)
    code = below + tl.where(a < 2.0, 0, tl.where(a < 4.0, 2, 4)) + up.to(tl.int32)
    code = code | tl.where((bits < 0) & (bits & 0x7FFFFFFF != 0), 8, 0)
    return tl.where(bits & 0x7FFFFFFF > _INFINITY, 0, code)


@triton.jit
def _search(even, odd, start, g):
    """Halves fp32 [R, B, 8], scales i32 [R, B] of "max" -> those of "search", as `nvfp4._search` finds them."""
    unit = decode_e4m3(start)
    whole = (unit * g)[:, :, None]
    even = tl.minimum(tl.div_rn(_finite_abs(even), whole), 16.0)
    odd = tl.minimum(tl.div_rn(_finite_abs(odd), whole), 16.0)
    best = start
    least = tl.full(start.shape, 0x7FFFFFFF, tl.int32)
    for step in range(-3, 8):
        tried = tl.minimum(tl.maximum(start + step, 1), 0x7E)
        s = tl.div_rn(decode_e4m3(tried), unit)[:, :, None]
        error = tl.sum(_square_error(even, s) + _square_error(odd, s), 2)
        best = tl.where(error < least, tried, best)
        least = tl.minimum(error, least)
    return best


@triton.jit
def _square_error(x, s):
    """Magnitudes fp32 in steps of s -> the squared error of their codes in units of 2**-19, i32."""
    difference = x - decode_e2m1(encode_e2m1(tl.div_rn(x, s))) * s
    return (difference * difference * 524288.0).to(tl.int32)


@triton.jit
def _finite_abs(x):
    """Magnitudes fp32, 0 where there is none."""
    bits = _magnitude(x)
    return tl.where(bits > _INFINITY, 0, bits).to(tl.float32, bitcast=True)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _amax_kernel(x_ptr, hadamard_ptr, out_ptr, rows, k, stride, columns, tiles, limit, ROWS: tl.constexpr,
                 BLOCKS: tl.constexpr, WHOLE: tl.constexpr, HADAMARD: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """The greatest finite magnitude of every `num_programs`-th tile, fp32 [programs]; LAST: the global scale."""
    most = tl.zeros((ROWS, BLOCKS, 8), tl.int32)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, row_ok, block = _tile(t, rows, columns, ROWS, BLOCKS)
        even, odd = _halves(x_ptr, hadamard_ptr, row, row_ok, block, stride, k, ROWS, BLOCKS, WHOLE, HADAMARD)
        even, odd = _magnitude(even), _magnitude(odd)
        most = tl.maximum(most, tl.where(even > _INFINITY, 0, even))
        most = tl.maximum(most, tl.where(odd > _INFINITY, 0, odd))
    result = tl.max(tl.reshape(most, (ROWS * BLOCKS * 8,)), 0).to(tl.float32, bitcast=True)
    if LAST:
        g = tl.maximum(tl.div_rn(result, limit), 1.1754943508222875e-38)  # 2**-126
        result = tl.where(result == 0.0, 1.0, g)
    tl.store(out_ptr + tl.program_id(0), result)


@triton.jit(do_not_specialize=["seed"])
def _quantize_kernel(x_ptr, global_ptr, hadamard_ptr, packed_ptr, scale_ptr, used_ptr, seed, rows, k, stride, columns,
                     blocks, ROWS: tl.constexpr, BLOCKS: tl.constexpr, TALL: tl.constexpr, WHOLE: tl.constexpr,
                     SEARCH: tl.constexpr, HADAMARD: tl.constexpr, STOCHASTIC: tl.constexpr, SWIZZLED: tl.constexpr,
                     COPY: tl.constexpr):  # fmt: skip
    """One tile of x -> its packed codes and scales. TALL: a scale is that of 16 rows; COPY: also the global scale."""
    t = tl.program_id(0)
    g = tl.load(global_ptr)
    if COPY:
        tl.store(used_ptr, g, mask=t == 0)
    row, row_ok, block = _tile(t, rows, columns, ROWS, BLOCKS)
    even, odd = _halves(x_ptr, hadamard_ptr, row, row_ok, block, stride, k, ROWS, BLOCKS, WHOLE, HADAMARD)

    most = tl.max(tl.maximum(_magnitude(even), _magnitude(odd)), 2)
    if TALL:
        tall = tl.max(tl.reshape(most, (ROWS // 16, 16, BLOCKS)), 1)
        most = tl.reshape(tl.broadcast_to(tall[:, None, :], (ROWS // 16, 16, BLOCKS)), (ROWS, BLOCKS))
    amax = most.to(tl.float32, bitcast=True)
    if STOCHASTIC:
        amax = amax * 1.0625  # a stored scale lies at most 1/17 below: nothing saturates, which would bias the mean
    s = tl.div_rn(amax, 6.0 * g)
    s = tl.minimum(tl.maximum(s, 0.001953125), 448.0)
    scale = encode_e4m3(tl.where(most == 0, 1.0, s)).to(tl.int32)
    scale = tl.where(most > _INFINITY, 0x7F, scale)
    if SEARCH:
        scale = tl.where((most == 0) | (most > _INFINITY), scale, _search(even, odd, scale, g))

    step = (decode_e4m3(scale) * g)[:, :, None]
    even, odd = tl.div_rn(even, step), tl.div_rn(odd, step)
    byte = (row * blocks + block) * 8 + tl.arange(0, 8)[None, None, :]
    if STOCHASTIC:
        first, second, _, _ = tl.randint4x(seed, byte)
        low, high = _stochastic_e2m1(even, first), _stochastic_e2m1(odd, second)
    else:
        low, high = encode_e2m1(even), encode_e2m1(odd)
    mask = row_ok & (block < blocks)
    tl.store(packed_ptr + byte, (low | (high << 4)).to(tl.uint8), mask=mask)

    at = row * blocks + block
    if SWIZZLED:
        tile = (row // 128) * tl.cdiv(blocks, 4) + block // 4
        at = tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + block % 4
    tl.store(scale_ptr + at, scale[:, :, None].to(tl.uint8), mask=mask)


# --- functions --------------------------------------------------------------------------------------------------------


def refuse_quantize(scale_rule: str) -> str | None:
    """Why the kernel does not quantize by this rule, in one line, or None."""
    if scale_rule not in nvfp4.LARGEST_SCALE:
        return f"the kernel has the scale rules {', '.join(map(repr, nvfp4.LARGEST_SCALE))}, found {scale_rule!r}"
    return None


def quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    order: Order = "rows",
    groups: int = 1,
    scale_rule: str = "max",
    block_rows: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fp4fx::quantize`: packed u8 [..., ceil(K/16)*8], scale u8 [..., ceil(K/16)], global_scale fp32 [].

    A convolution's activation in channels_last is read where it lies; other strides than those of rows cost a copy.

    Raises:
        PolicyError: a rule or block that the kernel does not have.
        LayoutError: order, groups, shape or dtype do not fit.
    """
    if (reason := refuse_quantize(scale_rule)) is not None:
        raise PolicyError(reason)
    return _quantize(nvfp4.to_rows(x, order, groups), global_scale, scale_rule, block_rows)


def quantize_with(
    x: Tensor,
    global_scale: Tensor | None,
    *,
    stochastic: int | None = None,
    hadamard: Tensor | None = None,
    swizzled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [..., K] -> what `quantize` gives, with more done in the same pass.

    Args:
        x: fp32, fp16, bf16 or fp64.
        global_scale: fp32 [], or None: from the amax of what is quantized, after `hadamard`.
        stochastic: a seed; codes are then rounded to one of their neighbours with the value as the mean, and a scale is
            made for 17/16 of its block's amax, so that none saturates. The same seed gives the same codes.
        hadamard: fp32 [16, 16], any matrix; each block of 16 values is multiplied with it, b -> b · H, in fp32.
        swizzled: the scales as `swizzle.to_blocked` orders them, u8 [padded rows * padded blocks].

    Raises:
        LayoutError: shape or dtype do not fit.
    """
    if hadamard is not None and (hadamard.shape != (16, 16) or hadamard.dtype != torch.float32):
        found = f"{hadamard.dtype} {tuple(hadamard.shape)}"
        raise LayoutError(f"hadamard must be fp32 [16, 16], found {found}")
    nvfp4.row_length(x.shape, "rows")
    return _quantize(x, global_scale, "max", 1, stochastic, hadamard, swizzled)


def _quantize(
    x: Tensor,
    global_scale: Tensor | None,
    scale_rule: str,
    block_rows: int,
    stochastic: int | None = None,
    hadamard: Tensor | None = None,
    swizzled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [..., K], K not 0."""
    if not x.is_floating_point():
        raise LayoutError(f"only floating-point values can be quantized, found {x.dtype}; convert them first")
    if block_rows not in (1, nvfp4.BLOCK):
        raise PolicyError(f"a block has 1 or {nvfp4.BLOCK} rows, found block_rows={block_rows}")
    if scale_rule == "search" and block_rows != 1:
        raise PolicyError("scale_rule='search' chooses a scale per 16 values; a 16x16 block needs scale_rule='max'")
    if global_scale is not None and (global_scale.dim() or global_scale.dtype != torch.float32):
        found = f"{global_scale.dtype} of shape {tuple(global_scale.shape)}"
        raise LayoutError(f"global_scale must be one fp32 value of shape (), found {found}")
    *lead, k = x.shape
    rows, blocks = _as_matrix(x), triton.cdiv(k, nvfp4.BLOCK)
    m = rows.shape[0]
    packed = x.new_empty((*lead, 8 * blocks), dtype=torch.uint8)
    scale = _new_swizzled(x, m, blocks) if swizzled else x.new_empty((*lead, blocks), dtype=torch.uint8)
    matrix = None if hadamard is None else hadamard.contiguous()
    if global_scale is None:
        used = given = _global_scale(rows, matrix, nvfp4.E2M1_MAX * nvfp4.LARGEST_SCALE[scale_rule])
    else:
        used, given = torch.empty_like(global_scale), global_scale
    if m == 0:
        return packed, scale, used.copy_(given)

    tall = block_rows > 1
    last = x.shape[-2] if tall and x.dim() > 1 else m  # rows of a matrix, which tiles end with
    t = tile_of("quantize", last, k, tuning.family_of(x.device), block_rows)
    columns, whole = triton.cdiv(blocks, t["BLOCKS"]), _whole(rows)
    _quantize_kernel[(m // last * triton.cdiv(last, t["ROWS"]) * columns,)](
        rows, given, given if matrix is None else matrix, packed, scale, used, stochastic or 0, last, k,
        rows.stride(0) // 16 if whole else rows.stride(0), columns, blocks, TALL=tall, WHOLE=whole,
        SEARCH=scale_rule == "search", HADAMARD=matrix is not None, STOCHASTIC=stochastic is not None,
        SWIZZLED=swizzled, COPY=global_scale is not None, enable_fp_fusion=False, **t,
    )  # fmt: skip
    return packed, scale, used


def _new_swizzled(x: Tensor, m: int, blocks: int) -> Tensor:
    """Room for swizzled scales; the kernel writes those that there are, the padding is zeros."""
    high, wide = padded(m, blocks)
    new = x.new_empty if (high, wide) == (m, blocks) else x.new_zeros
    return new((high * wide,), dtype=torch.uint8)


def _global_scale(rows: Tensor, hadamard: Tensor | None, limit: float) -> Tensor:
    """Rows [M, K] -> the global scale fp32 [], amax / limit: the maxima of parts, then theirs."""
    (m, k), whole = rows.shape, _whole(rows)
    t = tile_of("quantize", m, k, tuning.family_of(rows.device))
    columns = triton.cdiv(k, 16 * t["BLOCKS"])
    tiles = triton.cdiv(m, t["ROWS"]) * columns
    programs = max(min(tiles, _PARTS), 1)
    last = programs == 1
    found = rows.new_empty(() if last else (1, programs), dtype=torch.float32)
    _amax_kernel[(programs,)](
        rows, found if hadamard is None else hadamard, found, m, k, rows.stride(0) // 16 if whole else rows.stride(0),
        columns, tiles, limit, WHOLE=whole, HADAMARD=hadamard is not None, LAST=last, enable_fp_fusion=False, **t,
    )  # fmt: skip
    return found if last else _global_scale(found, None, limit)


def _as_matrix(x: Tensor) -> Tensor:
    """Rows [..., K] of any strides -> [M, K], its last axis dense, in a dtype that the kernel reads."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        rows = rows.float()
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _whole(rows: Tensor) -> bool:
    """Whether a matrix is made of whole blocks that can be read as words of two values."""
    return not (rows.shape[1] % 16 or rows.stride(0) % 16 or rows.data_ptr() % (2 * rows.element_size()))


def tile_of(op: str, m: int, k: int, family: str, least: int = 1) -> dict[str, Any]:
    """The constants of a launch over [m, k]: the tile of the table, bent to a matrix that is smaller than it.

    `least`: the fewest rows that a tile may have.
    """
    tile = tuning.tile(op, family, m, 1, k)
    values = max(tile.block_m * tile.block_k, 16 * least)
    width = min(max(tile.block_k, 16), triton.next_power_of_2(max(k, 16)))
    rows = max(min(values // width, triton.next_power_of_2(max(m, 1))), least)
    return {"ROWS": rows, "BLOCKS": min(width, values // rows) // 16, "num_warps": tile.num_warps}


# --- for ahead-of-time compilation ------------------------------------------------------------------------------------

_OPTIONS = ("TALL", "SEARCH", "HADAMARD", "STOCHASTIC", "SWIZZLED")


def variants() -> Iterator[Variant]:
    """The tiles that the table gives for one row, for rows of 64 and for large ones, and each option once."""
    found: dict[str, Variant] = {}
    for target in (80, 90, 100, 120):
        for m, k in ((1, 4096), (4096, 64), (4096, 4096)):
            plain, tall = (tile_of("quantize", m, k, f"sm_{target}", least) for least in (1, 16))
            cases = [(plain, x, whole, "") for x in ("bf16", "fp16", "fp32") for whole in (True, False)]
            cases += [(plain, "bf16", True, option) for option in _OPTIONS[1:]] + [(tall, "bf16", True, "TALL")]
            for shape, x, whole, option in cases:
                tile = f"{x}-{shape['ROWS']}x{16 * shape['BLOCKS']}" + ("" if whole else "-ragged")
                kernels = [("quantize", _quantize_kernel)] + [("amax", _amax_kernel)] * (option in ("", "HADAMARD"))
                for name, kernel in kernels:
                    full = "-".join(filter(None, (name, tile, option.lower())))
                    targets = (*found[full].targets, target) if full in found else (target,)
                    found[full] = _variant(full, kernel, x, whole, option, shape, targets)
    yield from found.values()


def _variant(
    name: str, kernel: Any, x: str, whole: bool, option: str, shape: dict[str, Any], targets: tuple[int, ...]
) -> Variant:
    types = {"x_ptr": f"*{x}", "packed_ptr": "*u8", "scale_ptr": "*u8", "limit": "fp32"}
    types |= dict.fromkeys(("global_ptr", "hadamard_ptr", "used_ptr", "out_ptr"), "*fp32")
    flags = dict.fromkeys(_OPTIONS, False) | {"COPY": False, "LAST": False, "WHOLE": whole} | shape
    if option:
        flags[option] = True
    constants = {a: flags[a] for a in kernel.arg_names if a in flags}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    aligned = tuple(a for a in signature if a.endswith("_ptr")) + ("k", "stride") * whole
    return Variant(
        name=name, kernel=kernel, signature=signature, constants=constants, aligned=aligned,
        num_warps=shape["num_warps"], targets=tuple(dict.fromkeys(targets)),
    )  # fmt: skip
