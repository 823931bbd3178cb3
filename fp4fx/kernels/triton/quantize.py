"""Floating point to packed rows in one kernel, with the bits of `nvfp4.quantize_rows`.

`quantize` is the op; `quantize_with` adds what training and research want from the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from fp4fx import nvfp4
from fp4fx.errors import LayoutError, PolicyError
from fp4fx.kernels.triton import tuning
from fp4fx.kernels.triton.launch import address, device_of, in_memory, launcher
from fp4fx.kernels.triton.quantize_kernels import amax_kernel, quantize_kernel
from fp4fx.kernels.triton.swizzle import padded
from fp4fx.kernels.triton.variant import EXACT, NO_FMA, Variant
from fp4fx.scales import LARGEST_SCALE, check_rule
from fp4fx.site import Order
from fp4fx.sizes import estimate, known_equal

LONGEST = 2**31 - 2**13
"""Values of a row, at most: within a row places are 32-bit numbers, and a tile may end past it."""
_PARTS = 1024
"""Programs that search the greatest value, at most; one alone goes over their results."""

# --- functions --------------------------------------------------------------------------------------------------------


def refuse_quantize(scale_rule: str) -> str | None:
    """Why the kernel does not quantize by this rule, in one line, or None."""
    if scale_rule not in LARGEST_SCALE:
        return f"the kernel has the scale rules {', '.join(map(repr, LARGEST_SCALE))}, found {scale_rule!r}"
    return None


def quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    order: Order = "rows",
    groups: int = 1,
    scale_rule: str = "max",
    block_rows: int = 1,
    *,
    family: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fp4fx::quantize`: packed u8 [..., ceil(K/16)*8], scale u8 [..., ceil(K/16)], global_scale fp32 [].

    A convolution's activation in channels_last is read where it lies; other strides than those of rows cost a copy.
    `family`: of `tuning`, None: that of x's device.

    Raises:
        PolicyError: a rule or block that the kernel does not have.
        LayoutError: order, groups, shape or dtype do not fit.
    """
    if (reason := refuse_quantize(scale_rule)) is not None:
        raise PolicyError(reason)
    return _quantize(nvfp4.to_rows(x, order, groups), global_scale, scale_rule, block_rows, family=family)


def quantize_with(
    x: Tensor,
    global_scale: Tensor | None,
    *,
    stochastic: int | Tensor | None = None,
    hadamard: Tensor | None = None,
    swizzled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [..., K] -> what `quantize` gives, with more done in the same pass.

    Args:
        x: fp32, fp16, bf16 or fp64.
        global_scale: fp32 [], or None: from the amax of what is quantized, after `hadamard`.
        stochastic: a seed; codes are then rounded to one of their neighbours with the value as the mean, and a scale is
            made for 17/16 of its block's amax, so that none saturates. The same seed gives the same codes. An int is
            part of a CUDA graph, which rounds alike at every replay; i64 [] on x's device is read when the kernel runs,
            so that `torch.randint(2**63 - 1, (), device=x.device)` inside the graph draws anew each time.
        hadamard: fp32 [16, 16], any matrix; each block of 16 values is multiplied with it, b -> b · H, in fp32.
        swizzled: the scales as `swizzle.to_blocked` orders them, u8 [padded rows * padded blocks].

    Raises:
        LayoutError: shape or dtype do not fit.
    """
    if hadamard is not None and (hadamard.shape != (16, 16) or hadamard.dtype != torch.float32):
        found = f"{hadamard.dtype} {tuple(hadamard.shape)}"
        raise LayoutError(f"hadamard must be fp32 [16, 16], found {found}")
    if isinstance(stochastic, Tensor):
        if stochastic.shape != () or stochastic.dtype != torch.int64 or stochastic.device != x.device:
            found = f"{stochastic.dtype} {tuple(stochastic.shape)} on {stochastic.device}"
            raise LayoutError(f"stochastic must be an int or i64 [] on {x.device}, found {found}; convert it")
    elif stochastic is not None:
        stochastic = torch.full((), stochastic, dtype=torch.int64, device=x.device)
    nvfp4.row_length(x.shape, "rows")
    return _quantize(x, global_scale, "max", 1, stochastic, hadamard, swizzled)


def _quantize(
    x: Tensor,
    global_scale: Tensor | None,
    scale_rule: str,
    block_rows: int,
    seed: Tensor | None = None,
    hadamard: Tensor | None = None,
    swizzled: bool = False,
    family: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [..., K], K not 0."""
    if not x.is_floating_point():
        raise LayoutError(f"only floating-point values can be quantized, found {x.dtype}; convert them first")
    check_rule(scale_rule, block_rows)
    if global_scale is not None and (global_scale.dim() or global_scale.dtype != torch.float32):
        found = f"{global_scale.dtype} of shape {tuple(global_scale.shape)}"
        raise LayoutError(f"global_scale must be one fp32 value of shape (), found {found}")
    *lead, k = x.shape
    if k > LONGEST:
        raise LayoutError(f"a row has at most {LONGEST} values here, found {k}; reshape it to shorter ones")
    rows, blocks = _as_matrix(x), triton.cdiv(k, nvfp4.BLOCK)
    m = rows.shape[0]
    packed = x.new_empty((*lead, 8 * blocks), dtype=torch.uint8)
    scale = _new_swizzled(x, m, blocks) if swizzled else x.new_empty((*lead, blocks), dtype=torch.uint8)
    matrix = None if hadamard is None else hadamard.contiguous()
    family = family or tuning.family_of(x.device)
    with device_of(x):
        if global_scale is None:
            used = given = _global_scale(rows, matrix, nvfp4.E2M1_MAX * LARGEST_SCALE[scale_rule], family)
        else:
            used, given = torch.empty_like(global_scale), in_memory(global_scale)
        if known_equal(m, 0):
            return packed, scale, used.copy_(given.view(()))

        tall = block_rows > 1
        matrices, last = (m // x.shape[-2], x.shape[-2]) if tall and x.dim() > 1 else (1, m)  # which tiles end with
        t = tile_of("quantize", last, k, family, block_rows)
        columns, whole = triton.cdiv(blocks, t["BLOCKS"]), _whole(rows)
        launcher(quantize_kernel, packed)[(matrices * triton.cdiv(last, t["ROWS"]) * columns,)](
            rows, given, given if matrix is None else matrix, packed, scale, used, given if seed is None else seed,
            last, k, rows.stride(0) // 16 if whole else rows.stride(0), columns, blocks, TALL=tall, WHOLE=whole,
            RULE=scale_rule, HADAMARD=matrix is not None, STOCHASTIC=seed is not None,
            SWIZZLED=swizzled, COPY=global_scale is not None, **EXACT, **t,
        )  # fmt: skip
    return packed, scale, used


def _new_swizzled(x: Tensor, m: int, blocks: int) -> Tensor:
    """Room for swizzled scales; the kernel writes those that there are, the padding is zeros."""
    high, wide = padded(m, blocks)
    new = x.new_empty if (high, wide) == (m, blocks) else x.new_zeros
    return new((high * wide,), dtype=torch.uint8)


def _global_scale(rows: Tensor, hadamard: Tensor | None, limit: float, family: str) -> Tensor:
    """Rows [M, K] -> the global scale fp32 [], amax / limit: the maxima of parts, then theirs."""
    (m, k), whole = rows.shape, _whole(rows)
    t = tile_of("quantize", m, k, family)
    columns = triton.cdiv(k, 16 * t["BLOCKS"])
    tiles = triton.cdiv(m, t["ROWS"]) * columns
    programs = max(min(estimate(tiles), _PARTS), 1) if estimate(m) * k > _PARTS else 1
    last = programs == 1
    found = rows.new_empty(() if last else (1, programs), dtype=torch.float32)
    launcher(amax_kernel, found)[(programs,)](
        rows, rows if hadamard is None else hadamard, found, m, k, rows.stride(0) // 16 if whole else rows.stride(0),
        columns, tiles, limit, WHOLE=whole, HADAMARD=hadamard is not None, LAST=last, **EXACT, **t,
    )  # fmt: skip
    return found if last else _global_scale(found, None, limit, family)


def _as_matrix(x: Tensor) -> Tensor:
    """Rows [..., K] of any strides -> [M, K], its last axis dense, in a dtype that the kernel reads."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        rows = rows.float()
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _whole(rows: Tensor) -> bool:
    """Whether a matrix is made of whole blocks that can be read as words of two values."""
    whole = rows.shape[1] % 16 == 0 and known_equal(rows.stride(0) % 16, 0)
    return whole and address(rows) % (2 * rows.element_size()) == 0


def tile_of(op: str, m: tuning.Size, k: int, family: str, least: int = 1) -> dict[str, Any]:
    """The constants of a launch over [m, k]: the tile of the table, bent to a matrix that is smaller than it.

    `least`: the fewest rows that a tile may have.
    """
    m = estimate(m)
    tile = tuning.tile(op, family, m, 1, k)
    values = max(tile.block_m * tile.block_k, 16 * least)
    width = min(max(tile.block_k, 16), triton.next_power_of_2(max(k, 16)))
    rows = max(min(values // width, triton.next_power_of_2(max(m, 1))), least)
    return {"ROWS": rows, "BLOCKS": min(width, values // rows) // 16, "num_warps": tile.num_warps}


# --- for ahead-of-time compilation ------------------------------------------------------------------------------------

_OPTIONS = ("TALL", "HADAMARD", "STOCHASTIC", "SWIZZLED")
_RULES = tuple(rule.upper() for rule in LARGEST_SCALE if rule != "max")


def variants() -> Iterator[Variant]:
    """The tiles that the table gives for one row, for rows of 64 and for large ones, and each option once."""
    found: dict[str, Variant] = {}
    for target in (80, 90, 100, 120):
        for m, k in ((1, 4096), (4096, 64), (4096, 4096)):
            plain, tall = (tile_of("quantize", m, k, f"sm_{target}", least) for least in (1, 16))
            cases = [(plain, x, whole, "") for x in ("bf16", "fp16", "fp32") for whole in (True, False)]
            cases += [(tall if o == "TALL" else plain, "bf16", True, o) for o in (*_OPTIONS, *_RULES)]
            for shape, x, whole, option in cases:
                tile = f"{x}-{shape['ROWS']}x{16 * shape['BLOCKS']}" + ("" if whole else "-ragged")
                kernels = [("quantize", quantize_kernel)] + [("amax", amax_kernel)] * (option in ("", "HADAMARD"))
                for name, kernel in kernels:
                    full = "-".join(filter(None, (name, tile, option.lower())))
                    targets = (*found[full].targets, target) if full in found else (target,)
                    found[full] = _variant(full, kernel, x, whole, option, shape, targets)
    yield from found.values()


def _variant(
    name: str, kernel: Any, x: str, whole: bool, option: str, shape: dict[str, Any], targets: tuple[int, ...]
) -> Variant:
    types = {"x_ptr": f"*{x}", "packed_ptr": "*u8", "scale_ptr": "*u8", "seed_ptr": "*i64", "limit": "fp32"}
    types |= dict.fromkeys(("global_ptr", "hadamard_ptr", "used_ptr", "out_ptr"), "*fp32")
    flags = dict.fromkeys(_OPTIONS, False) | {"COPY": False, "LAST": False, "WHOLE": whole, "RULE": "max"} | shape
    if option in _RULES:
        flags["RULE"] = option.lower()
    elif option:
        flags[option] = True
    constants = {a: flags[a] for a in kernel.arg_names if a in flags}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    aligned = tuple(a for a in signature if a.endswith("_ptr")) + ("k", "stride") * whole
    return Variant(
        name=name, kernel=kernel, signature=signature, constants=constants, aligned=aligned,
        num_warps=shape["num_warps"], targets=tuple(dict.fromkeys(targets)), options=EXACT,
        absent=() if option == "HADAMARD" else NO_FMA,
    )  # fmt: skip
