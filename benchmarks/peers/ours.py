"""fp4fx: `fp4fx_cpu::linear` on the canonical layout, by compute precision and instruction set."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.base import Call, Candidate, Layer, UnavailableError
from fp4fx import nvfp4

BF16 = "fp4fx, bf16 x"


def tiers() -> list[str]:
    """The instruction sets that the library has kernels for on this machine, best first.

    Raises:
        UnavailableError: the library is not there, and why.
    """
    try:
        from fp4fx.kernels.cpu import library  # noqa: PLC0415  (a missing library is a row of the table)
    except ImportError as error:
        raise UnavailableError(f"the CPU kernels cannot be imported: {error}") from error
    why_not = library.load()
    if why_not is not None:
        raise UnavailableError(why_not)
    return list(torch.ops.fp4fx_cpu.tiers())


def candidates(*, tiers: bool = False) -> list[Candidate]:
    """bf16 x in each compute precision it has, fp32 x in bf16 and fp32; with `tiers` also by lower instruction sets."""
    variants = (
        (BF16, torch.bfloat16, "bf16"),
        ("fp4fx, bf16 x, int8 compute", torch.bfloat16, "int8"),
        ("fp4fx, fp32 x", torch.float32, "bf16"),
        ("fp4fx, fp32 x, fp32 compute", torch.float32, "fp32"),
    )
    found = [_candidate(name, dtype, compute, "") for name, dtype, compute in variants]
    if tiers:
        found += [
            _candidate(f"{name} [{tier}]", dtype, compute, tier)
            for tier in _lower_tiers()
            for name, dtype, compute in variants
        ]
    return found


def _lower_tiers() -> list[str]:
    try:
        return tiers()[1:]
    except UnavailableError:
        return []  # the candidates of the best tier say why


def _candidate(name: str, dtype: torch.dtype, compute: str, tier: str) -> Candidate:
    def build(weight: Tensor) -> Layer:
        tiers()
        q = nvfp4.quantize(weight)
        n_bytes = q.packed.nbytes + q.scale.nbytes + q.global_scale.nbytes
        linear = torch.ops.fp4fx_cpu.linear.default

        def at(x: Tensor) -> Call:
            arguments = (x, q.packed, q.scale, q.global_scale, None, weight.shape[1])

            def call() -> Tensor:
                with torch.no_grad():
                    return linear(*arguments, compute=compute, tier=tier)  # type: ignore[no-any-return]

            return call

        return Layer(at, n_bytes, nvfp4.dequantize(q))

    return Candidate(name, dtype, build, 4, ours=True)
