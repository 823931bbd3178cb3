"""Packed rows to floating point, with the bits of `nvfp4.dequantize_rows`; all rows, or those that indices name.

A program writes a tile of whole blocks. Of rows of whole blocks both values of a byte are written as one word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4fx import nvfp4
from fp4fx.errors import LayoutError
from fp4fx.kernels.triton import tuning
from fp4fx.kernels.triton.codec import decode_e2m1, decode_e4m3
from fp4fx.kernels.triton.launch import device_of, in_memory, launcher
from fp4fx.kernels.triton.quantize import LONGEST, tile_of
from fp4fx.kernels.triton.variant import EXACT, NO_FMA, Variant
from fp4fx.ops.library import check_weight
from fp4fx.policy import Compute
from fp4fx.site import Order
from fp4fx.sizes import known_equal

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _dequantize_kernel(packed_ptr, scale_ptr, global_ptr, index_ptr, out_ptr, table, rows, k, blocks, columns,
                       ROWS: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr,
                       GATHER: tl.constexpr):  # fmt: skip
    """One tile of out [rows, k]; GATHER: row i is row index[i] of a table of so many. WHOLE: k is a multiple of 16."""
    t = tl.program_id(0)
    row = (t // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    block = (t % columns) * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
    j = tl.arange(0, 8)[None, None, :]
    row_ok = row < rows
    source = row
    mask = row_ok & (block < blocks)
    if GATHER:
        source = tl.load(index_ptr + row, mask=row_ok, other=0).to(tl.int64)
        known = (source >= 0) & (source < table)
        tl.device_assert(known, "embedding: index out of range")
        mask = mask & known
    at = source * blocks + block
    byte = tl.load(packed_ptr + at * 8 + j, mask=mask, other=0).to(tl.int32)
    step = decode_e4m3(tl.load(scale_ptr + at, mask=mask, other=0)) * tl.load(global_ptr)

    dtype: tl.constexpr = out_ptr.dtype.element_ty
    even = (decode_e2m1(byte) * step).to(dtype)
    odd = (decode_e2m1(byte >> 4) * step).to(dtype)
    if WHOLE:
        half: tl.constexpr = tl.int32 if dtype == tl.float32 else tl.int16
        word: tl.constexpr = tl.int64 if dtype == tl.float32 else tl.int32
        bits: tl.constexpr = 32 if dtype == tl.float32 else 16
        low = even.to(half, bitcast=True).to(word) & ((1 << bits) - 1)
        pair = low | (odd.to(half, bitcast=True).to(word) << bits)
        words = out_ptr.to(tl.pointer_type(word), bitcast=True)
        tl.store(words + ((row * blocks + block) * 8 + j), pair, mask=row_ok & (block < blocks))
    else:
        i = block * 16 + 2 * j
        at = out_ptr + (row * k + i)
        end = tl.where(row_ok, k, 0)
        tl.store(at, even, mask=i < end)
        tl.store(at + 1, odd, mask=i + 1 < end)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    order: Order = "rows",
    groups: int = 1,
    compute: Compute = "bf16",
    *,
    family: str | None = None,
) -> Tensor:
    """`fp4fx::dequantize`: a contiguous tensor of the shape and dtype. An order that permutes axes costs a copy.

    `compute` is a message to the op that reads the result. `family`: of `tuning`, None: that of the device.

    Raises:
        LayoutError: order, groups or shape do not fit, or a dtype other than fp32, fp16 and bf16.
    """
    del compute
    k = nvfp4.row_length(tuple(shape), order, groups)
    rows = _decode(packed, scale, global_scale, None, packed.shape[:-1], k, dtype, family)
    return nvfp4.from_rows(rows, tuple(shape), order, groups).contiguous()


def embedding(
    indices: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    embedding_dim: int,
    dtype: torch.dtype,
    *,
    family: str | None = None,
) -> Tensor:
    """`fp4fx::embedding`: indices i32 or i64 [...], packed table of V rows -> rows [..., D] of dtype.

    An index outside of [0, V) stops the device with an assertion, as in torch's embedding on CUDA; nothing is read for
    it. Neither counts negative indices from the end.

    Raises:
        LayoutError: a dtype other than fp32, fp16 and bf16.
    """
    torch._check(indices.dtype in (torch.int32, torch.int64), lambda: f"indices must be integers, are {indices.dtype}")
    return _decode(packed, scale, global_scale, indices.contiguous(), indices.shape, embedding_dim, dtype, family)


def _decode(
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    indices: Tensor | None,
    lead: Sequence[int],
    k: int,
    dtype: torch.dtype,
    family: str | None,
) -> Tensor:
    """-> [*lead, k] of dtype: all rows of the packed, or those of dense indices [*lead]."""
    if k > LONGEST:
        raise LayoutError(f"a row has at most {LONGEST} values here, found {k}; decode shorter ones")
    if dtype not in DTYPES:
        raise LayoutError(f"the kernel decodes to float32, float16 and bfloat16, found {dtype}; cast its result")
    check_weight(packed, scale, global_scale, k)
    packed, scale = packed.contiguous(), scale.contiguous()
    out = packed.new_empty((*lead, k), dtype=dtype)
    m, blocks = math.prod(lead), scale.shape[-1]
    if known_equal(m, 0):
        return out
    t = tile_of("dequantize", m, k, family or tuning.family_of(out.device))
    columns = triton.cdiv(blocks, t["BLOCKS"])
    gather = indices is not None
    with device_of(out):
        launcher(_dequantize_kernel, out)[(triton.cdiv(m, t["ROWS"]) * columns,)](
            packed, scale, in_memory(global_scale), scale if indices is None else indices, out,
            scale.numel() // blocks, m, k, blocks, columns, WHOLE=k % 16 == 0, GATHER=gather, **_options(gather), **t,
        )  # fmt: skip
    return out


def _options(gather: bool) -> Mapping[str, Any]:
    """Triton leaves assertions in when it debugs, and would then also check integers for overflow."""
    return {**EXACT, "debug": True, "sanitize_overflow": False} if gather else EXACT


# --- for ahead-of-time compilation ------------------------------------------------------------------------------------


def variants() -> Iterator[Variant]:
    """The tiles that the table gives for one row, for rows of 64 and for large ones."""
    found: dict[str, Variant] = {}
    for target in (80, 90, 100, 120):
        for m, k in ((1, 4096), (4096, 64), (4096, 4096)):
            shape = tile_of("dequantize", m, k, f"sm_{target}")
            for y in ("bf16", "fp16", "fp32"):
                for whole, gather in ((True, False), (False, False), (True, True)):
                    name = f"{'embedding' if gather else 'dequantize'}-{y}-{shape['ROWS']}x{16 * shape['BLOCKS']}"
                    name += "" if whole else "-ragged"
                    flags = {"WHOLE": whole, "GATHER": gather} | shape
                    constants = {a: flags[a] for a in _dequantize_kernel.arg_names if a in flags}
                    types = {"global_ptr": "*fp32", "out_ptr": f"*{y}", "index_ptr": "*i64" if gather else "*u8"}
                    types |= {"packed_ptr": "*u8", "scale_ptr": "*u8"} | dict.fromkeys(constants, "constexpr")
                    signature = {a: types.get(a, "i32") for a in _dequantize_kernel.arg_names}
                    targets = (*found[name].targets, target) if name in found else (target,)
                    found[name] = Variant(
                        name=name, kernel=_dequantize_kernel, signature=signature, constants=constants,
                        aligned=tuple(a for a in signature if a.endswith("_ptr")), num_warps=shape["num_warps"],
                        targets=tuple(dict.fromkeys(targets)), options=_options(gather), absent=NO_FMA,
                    )  # fmt: skip
    yield from found.values()
