"""The ops `fp4fx_cpu::*`: loads the library that defines them, gives them fakes, and lets the codec's ops use them.

They take the arguments of `fp4fx::<op>` and a last `tier`, '' for the best that the machine can run; before it `linear`
takes a `quantize_x` (see `fused`) and `quantize` the weights of errors. Nothing of this happens on import: compiling a
graph builds the library, quantizing a model takes it if it is there.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any

import torch
from torch import Tensor

from fp4fx import nvfp4, ops
from fp4fx.errors import KernelError
from fp4fx.kernels.cpu import build as builder
from fp4fx.ops.library import LIBRARY, Body
from fp4fx.scales import UNBIASED, check_rule, searched, weights_of
from fp4fx.site import Order

log = logging.getLogger(__name__)

OPS = ("conv", "conv_transpose", "dequantize", "embedding", "linear", "quantize")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_lock = threading.Lock()
_answers: dict[bool, str | None] = {}
"""Why there is no library, or None, as found with and without leave to build."""


def load(*, build: bool = True) -> str | None:
    """Make `torch.ops.fp4fx_cpu` work; returns one line that says why it does not, or None.

    Without `build`, a library that the cache does not have stays unbuilt until somebody asks with it.
    """
    with _lock:
        if True not in _answers and (build or False not in _answers):
            try:
                _load(build)
                _answers[True] = None
            except KernelError as error:
                log.info("no CPU kernels: %s", error)
                _answers[build] = str(error)
        return _answers[max(_answers)]


def _load(build: bool) -> None:
    path = builder.library(build=build)
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise KernelError(f"the CPU kernels cannot be loaded: {error}") from error
    for name in OPS:
        torch.library.register_fake(f"fp4fx_cpu::{name}", _fake(name))
    for name, through in _EAGER.items():
        LIBRARY.impl(name, functools.partial(getattr(ops, name), **through), "CPU")


def _fake(name: str) -> Body:
    """The op's fake is that of `fp4fx::<name>`, which has all its arguments but those of the CPU."""
    takes = [argument.name for argument in getattr(torch.ops.fp4fx_cpu, name).default._schema.arguments]
    body = getattr(torch.ops.fp4fx, name).default

    def fake(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(takes, args, strict=False)), **kwargs}
        for extra in ("quantize_x", "weights", "tier"):
            given.pop(extra, None)
        return body(**given)

    return fake


# --- eager mode: the codec, with the same bits ------------------------------------------------------------------------


def _encode(
    rows: Tensor, global_scale: Tensor | None = None, *, scale_rule: str = "max", block_rows: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """As `nvfp4.quantize_rows`, which also has the words for what cannot be."""
    if rows.dtype not in DTYPES or scale_rule not in nvfp4.LARGEST_SCALE or block_rows not in (1, nvfp4.BLOCK):
        return nvfp4.quantize_rows(rows, global_scale, scale_rule=scale_rule, block_rows=block_rows)
    parts: tuple[Tensor, Tensor, Tensor] = torch.ops.fp4fx_cpu.quantize.default(
        rows.detach(), global_scale, "rows", 1, scale_rule, block_rows
    )
    return parts


def _decode(packed: Tensor, scale: Tensor, global_scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """As `nvfp4.dequantize_rows`."""
    if dtype not in DTYPES:
        return nvfp4.dequantize_rows(packed, scale, global_scale, k, dtype)
    rows: Tensor = torch.ops.fp4fx_cpu.dequantize.default(packed, scale, global_scale, (*packed.shape[:-1], k), dtype)
    return rows


def _balance(rows: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor, taps: int) -> Tensor:
    """As `balance.balanced`."""
    rows = rows.detach().float().contiguous()
    codes: Tensor = torch.ops.fp4fx_cpu.balance.default(rows, packed, scale, global_scale, taps)
    return codes


_EAGER: dict[str, dict[str, Body]] = {
    "quantize": {"encode": _encode, "decode": _decode, "balance": _balance},
    "fake_quantize": {"encode": _encode, "decode": _decode},
    "dequantize": {"decode": _decode},
    "embedding": {"decode": _decode},
}
"""The bodies around the kernels. Those of linear and convolutions stay: kernels compute in less than fp32."""


def quantize(
    x: Tensor, scale_rule: str, block_rows: int, order: Order, groups: int, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A tensor on the CPU by the kernel, see `fp4fx.kernels.encoding`; None if the library is not in the cache."""
    if x.dtype not in DTYPES or load(build=False) is not None:
        return None
    if importance is None:
        parts: tuple[Tensor, Tensor, Tensor] = torch.ops.fp4fx.quantize.default(
            x, None, order, groups, scale_rule, block_rows
        )
        return parts
    check_rule(scale_rule, block_rows, weighted=True)
    rows = nvfp4.to_rows(x, order, groups)
    weights = weights_of(importance, rows)
    packed, scale, used = torch.ops.fp4fx_cpu.quantize.default(rows, scale_rule=searched(scale_rule), weights=weights)
    if scale_rule == UNBIASED:
        taps = nvfp4.taps(x.shape, order)
        packed, used = nvfp4.unbiased(rows, packed, scale, used, taps, decode=_decode, balance=_balance)
    return packed, scale, used
