"""Kernels that the ahead-of-time checker has to tell apart: good ones, and one of each kind of trouble."""

import multiprocessing
import os
import sys

import triton
import triton.language as tl

from fp4fx.kernels.triton.variant import EXACT, NO_FMA, Variant


@triton.jit
def multiply(x_ptr, w_ptr, y_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y [M, N] = x [M, K] · w [N, K]ᵀ."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + m[:, None] * K + start + k[None, :])
        w = tl.load(w_ptr + n[None, :] * K + start + k[:, None])
        total = tl.dot(x, w, total)
    tl.store(y_ptr + m[:, None] * N + n[None, :], total)


@triton.jit
def sort_rows(x_ptr, SIZE: tl.constexpr):
    """All rows of a square in the registers of one warp, each against each."""
    i = tl.arange(0, SIZE)
    square = tl.load(x_ptr + i[:, None] * SIZE + i[None, :])
    total = square
    for shift in tl.static_range(1, 4):
        other = tl.load(x_ptr + i[:, None] * SIZE * shift + i[None, :])
        total += tl.sum(square * other, 0)[None, :] * other
    tl.store(x_ptr + i[:, None] * SIZE + i[None, :], total + square)


@triton.jit
def broken(x_ptr, SIZE: tl.constexpr):
    tl.static_assert(SIZE == 1, "only one")
    tl.store(x_ptr, 0.0)


@triton.jit
def multiply_and_add(x_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x * x + 1.5)


MATRIX = {80: "mma.sync m16n8k16", 90: "wgmma bf16", 100: "tcgen05.mma kind::f16", 120: "mma.sync bf16"}


def product(name, m, n, k, stages=2, warps=4, **more):
    return Variant(
        name=name,
        kernel=multiply,
        signature={"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*fp32", "K": "i32"}
        | dict.fromkeys(("M", "N", "BLOCK_K"), "constexpr"),
        constants={"M": m, "N": n, "BLOCK_K": k},
        aligned=("x_ptr", "w_ptr", "y_ptr", "K"),
        num_warps=warps,
        num_stages=stages,
        **more,
    )


def alone(name, kernel, size, **more):
    signature = {"x_ptr": "*fp32", "SIZE": "constexpr"}
    return Variant(name=name, kernel=kernel, signature=signature, constants={"SIZE": size}, num_warps=1, **more)


def variants():
    if "FP4FX_TEST_DEADLY" in os.environ and multiprocessing.parent_process() is not None:
        print("LLVM ERROR: what it says\nten thousand lines", file=sys.stderr, flush=True)
        os._exit(1)  # as LLVM ends a process that it cannot go on in
    yield product("good", 64, 64, 64, matrix=MATRIX)
    yield product("large", 128, 128, 128, stages=3, warps=8, targets=(90, 120))  # of shared memory
    yield product("no matrix", 64, 64, 64, targets=(90,), matrix={90: "tcgen05.mma"})
    yield alone("spilling", sort_rows, 128, targets=(90,))
    yield alone("broken", broken, 2, targets=(80,))
    yield alone("exact", multiply_and_add, 128, targets=(90,), options=EXACT, absent=NO_FMA)
    yield alone("contracted", multiply_and_add, 128, targets=(90,), absent=NO_FMA)
    yield alone("later", broken, 2, since={90: "99.0"}, targets=(80, 90))
