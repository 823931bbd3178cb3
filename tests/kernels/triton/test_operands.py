"""Tiles of operands: the PTX, evaluated here, against the codec; the order of K against the order it lies in."""

import re

import pytest
import torch

from fp4fx import nvfp4
from fp4fx.kernels.triton import linear as module
from fp4fx.kernels.triton import operands, tuning
from fp4fx.kernels.triton.linear import linear
from fp4fx.ops import compute as ops


def halves_of(word, dtype):
    """The two 16-bit values in 32 bits, the lower first."""
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.uint16).view(dtype)


def word_of(values):
    low, high = values.view(torch.uint16).tolist()
    return low | high << 16


def run(ptx, arguments, dtype):
    """The few instructions that `operands` uses: {name: u32} -> {name: u32}, `$0` and so on among them."""
    values = dict(arguments)

    def read(name):
        return values[name] if name in values else int(name, 0)

    for statement in ptx.strip("{}\n").replace("\n", " ").split(";"):
        found = re.fullmatch(r"\s*([\w.]+) (.*)", statement)
        if found is None or found[1] == ".reg":
            continue
        to, *names = (name.strip() for name in found[2].split(","))
        a, b, c, *_ = [*map(read, names), 0, 0]
        if found[1] == "prmt.b32":
            both = a | b << 32
            result = sum((both >> 8 * (c >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        elif found[1] == "lop3.b32":
            assert names[3] == "0xEA"
            result = a & b | c
        elif found[1] in ("fma.rn.bf16x2", "mul.rn.f16x2"):
            product = halves_of(a, dtype).float() * halves_of(b, dtype).float()
            plus = halves_of(c, dtype).float() if found[1].startswith("fma") else -torch.zeros(2)
            result = word_of((product + plus).to(dtype))
        else:
            result = {"mov.b32": a, "shl.b32": a << b, "shr.b32": a >> b, "and.b32": a & b}[found[1]]
        values[to] = result & 0xFFFFFFFF
    return values


@pytest.mark.parametrize(
    ("ptx", "dtype", "exponent", "unit"),
    [(operands.DECODE_BF16, torch.bfloat16, 118, 256.0), (operands.DECODE_FP16, torch.float16, 7, 128.0)],
)
def test_ptx(ptx, dtype, exponent, unit):
    """Every byte times two scales: each code's value, sign of zero included."""
    values = nvfp4.decode_e2m1(torch.arange(16, dtype=torch.uint8))
    scales = nvfp4.decode_e4m3(torch.tensor([0x7E, 0x29], dtype=torch.uint8))
    factors = (scales * 2.0**exponent).to(dtype)
    for first in range(0, 256, 2):
        codes = [first, first + 1, first ^ 165, first ^ 90]
        packed = sum(code << 8 * i for i, code in enumerate(codes))
        arguments = {"$4": packed, "$5": word_of(factors[:1].repeat(2)), "$6": word_of(factors[1:].repeat(2))}
        found = run(ptx.value, arguments, dtype)
        for name, shift, at in (("$0", 0, 0), ("$1", 0, 1), ("$2", 4, 0), ("$3", 4, 1)):
            pair = torch.stack([values[code >> shift & 15] for code in codes[2 * at : 2 * at + 2]])
            actual = halves_of(found[name], dtype).float() * unit
            assert torch.equal(actual.view(torch.int32), (pair * scales[at]).view(torch.int32)), (codes, name)


@pytest.mark.parametrize("run", [2, 4])
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_order_of_k(run, block_k, packed, device, monkeypatch):
    """Both operands in another order of K, with a tail: the product is that of the body."""
    if device == "cuda":
        pytest.skip("a GPU has the order of its family")
    monkeypatch.setitem(module._RUN, tuning.INTERPRETER, run)
    monkeypatch.setattr(tuning, "tile", lambda *_: tuning.Tile(16, 16, block_k, 2))
    k = 200
    generator = torch.Generator().manual_seed(0)
    q = nvfp4.quantize_rows(torch.randn(5, k, generator=generator))
    for dtype in (torch.float16, torch.float32):  # pairs, and single values
        x = torch.randn(3, k, generator=generator).to(dtype)
        some = ()
        if packed:
            x, *some = nvfp4.quantize_rows(x)
            some.append(dtype)
        actual = linear(x, *q, None, k, *some, schedule="split_k")
        wide = (x, *some[:2], torch.float64) if packed else (x.double(),)
        torch.testing.assert_close(actual.double(), ops.linear(wide[0], *q, None, k, *wide[1:]), rtol=2e-3, atol=2e-2)
