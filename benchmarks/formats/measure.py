"""The rows of the tables: relative errors of formats, output error of products, effects of a static global scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.formats.codecs import NVFP4, Codec, Format
from benchmarks.peers.base import reason
from fp4fx import nvfp4

Row = dict[str, Any]

WIDTH = 2048


def _student(n: int, generator: torch.Generator, freedom: int) -> Tensor:
    squares = torch.zeros(n)
    for _ in range(freedom):
        squares += torch.randn(n, generator=generator).square()
    return torch.randn(n, generator=generator) / (squares / freedom).sqrt()


DISTRIBUTIONS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "N(0,1)": lambda n, g: torch.randn(n, generator=g),
    "Laplace": lambda n, g: torch.empty(n).exponential_(generator=g) - torch.empty(n).exponential_(generator=g),
    "t5": lambda n, g: _student(n, g, 5),
    "t3": lambda n, g: _student(n, g, 3),
    "U(-1,1)": lambda n, g: torch.rand(n, generator=g) * 2 - 1,
    "ReLU(N)": lambda n, g: torch.randn(n, generator=g).relu(),
}


def samples(distribution: str, count: int, seed: int = 0) -> Tensor:
    """`count` values, a multiple of 2**15, as fp32 [count / 2048, 2048]."""
    return DISTRIBUTIONS[distribution](count, torch.Generator().manual_seed(seed)).view(-1, WIDTH)


def relative_error(x: Tensor, y: Tensor) -> float:
    """Sum of (y - x)² by the sum of x², in fp64."""
    return 10 ** (-nvfp4.sqnr(x, y) / 10)


def errors(formats: Iterable[Format], count: int, seed: int = 0) -> list[Row]:
    """Each format on each distribution; a peer that fails has its reason for a row."""
    data = {name: samples(name, count, seed) for name in DISTRIBUTIONS}
    rows: list[Row] = []
    for form in tqdm(list(formats), unit="format", disable=None):
        row = {"section": "error", "format": form.name, "bits": form.bits, "peer": form.peer}
        for name, x in data.items():
            try:
                rows.append({**row, "distribution": name, "error": relative_error(x, form.codec(x))})
            except Exception as error:
                if not form.peer:
                    raise
                rows.append({**row, "distribution": name, "reason": reason(error)})
                break
    return rows


PRODUCTS: dict[str, tuple[str | None, str | None]] = {
    "W4A16": ("nearest", None),
    "W4A16, four over six": ("four over six, MSE", None),
    "W4A16, scale search": ("scale search", None),
    "W4A4": ("nearest", "nearest"),
    "W4A4, four over six both": ("four over six, MSE", "four over six, MSE"),
    "W4A4, scale search and four over six": ("scale search", "four over six, MSE"),
    "W4A4, scale search both": ("scale search", "scale search"),
    "W4A4, 16x16 tiles and nearest": ("16x16 tiles", "nearest"),
}
"""By name, the rule of the weight and that of the activation; None leaves it as it is."""


def products(size: int, seed: int = 0) -> list[Row]:
    """y = x · Wᵀ of Gaussians [size, size]: the signal to noise ratio of y in dB."""
    generator = torch.Generator().manual_seed(seed)
    w, x = (torch.randn(size, size, generator=generator) for _ in range(2))
    exact = x.double() @ w.double().T

    def rounded(rule: str | None, t: Tensor) -> Tensor:
        return t if rule is None else NVFP4[f"NVFP4, {rule}"](t)

    rows = []
    for name, (of_w, of_x) in PRODUCTS.items():
        y = rounded(of_x, x).double() @ rounded(of_w, w).double().T
        rows.append({"section": "product", "format": name, "size": size, "sqnr": nvfp4.sqnr(exact, y)})
    return rows


FACTORS = (1 / 16, 1 / 4, 1 / 2, 1 / 1.5, 1, 2, 8, 64, 1024, 8192, 65536)
PERCENTILES = (99.0, 99.9, 99.99, 99.999)


def global_scales(count: int, seed: int = 0) -> list[Row]:
    """The error under a static global scale: a factor of the one from amax, or from a percentile of the magnitudes."""

    def static(g: Tensor) -> Codec:
        return lambda x: nvfp4.dequantize(nvfp4.quantize(x, global_scale=g))

    rows: list[Row] = []
    for name in ("N(0,1)", "t5"):
        x = samples(name, count, seed)
        g, row = nvfp4.global_scale(x), {"section": "global scale", "distribution": name}
        for factor in FACTORS:
            error = relative_error(x, static(g * factor)(x))
            rows.append({**row, "factor": factor, "error": error})
        magnitudes = x.abs().flatten().sort().values
        for percentile in PERCENTILES:
            at = magnitudes[round((count - 1) * percentile / 100)]
            error = relative_error(x, static(at / 2688)(x))
            rows.append({**row, "percentile": percentile, "factor": float(at / magnitudes[-1]), "error": error})
    return rows
