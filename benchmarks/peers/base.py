"""What a peer of a linear layer offers: named candidates, each made from a dense weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Any]


class UnavailableError(Exception):
    """A candidate cannot be measured here; the message is the reason that its row shows."""


@dataclass(frozen=True)
class Layer:
    """One linear layer, y = x Wᵀ, without a bias."""

    at: Callable[[Tensor], Call]
    """x [M, K] of `dtype` -> a call that computes y once and returns when it is done; may compile."""
    weight_bytes: int
    """Of the weight as it is kept, scales included."""
    dense: Tensor | None
    """The weight that it computes with, fp32 [N, K]; None where it cannot be had."""
    output: Callable[[Any], Tensor] = lambda y: y
    """What a call returned -> y [M, N]."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a linear layer."""

    name: str
    dtype: torch.dtype
    """Of x."""
    build: Callable[[Tensor], Layer]
    """Weight fp32 [N, K] -> its layer.

    Raises:
        UnavailableError: with the reason.
    """
    bits: float
    """Per weight, nominal; 4 marks the 4-bit peers."""
    ours: bool = False
    max_m: int | None = field(default=None)
    """Rows of x above which it is not measured, for what takes seconds."""


def unavailable(name: str, reason: str, bits: float = 4) -> Candidate:
    """A candidate that only says why it is not there."""

    def build(_: Tensor) -> Layer:
        raise UnavailableError(reason)

    return Candidate(name, torch.float32, build, bits)


def module_layer(module: nn.Module, dense: Tensor | None, weight_bytes: int, **compile_options: Any) -> Layer:
    """The layer of a torch module; compiled for each shape of x where options are given."""

    def at(x: Tensor) -> Call:
        run = torch.compile(module, dynamic=False, options=compile_options) if compile_options else module

        def call() -> Any:
            with torch.no_grad():
                return run(x)

        return call

    return Layer(at, weight_bytes, dense)


def linear_module(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """Weight [N, K] -> a bias-free nn.Linear in evaluation mode, with a copy of it in `dtype`."""
    n, k = weight.shape
    module = nn.Linear(k, n, bias=False, dtype=dtype, device="meta").eval()
    module.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    return module


def reason(error: BaseException) -> str:
    """The first line of an error, short enough for a table."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    name = "" if isinstance(error, UnavailableError) else f"{type(error).__name__}: "
    return f"{name}{text}"[:200]


def importable(candidates: Callable[[], Iterable[Candidate]], name: str, package: str) -> tuple[Candidate, ...]:
    """The candidates of a package, or one row that says why it cannot be imported."""
    try:
        return tuple(candidates())
    except ModuleNotFoundError as error:
        return (unavailable(name, f"not installed ({error.name}): pip install {package}"),)
    except Exception as error:  # noqa: BLE001  (whatever a package raises at import is the reason of its row)
        return (unavailable(name, reason(error)),)
