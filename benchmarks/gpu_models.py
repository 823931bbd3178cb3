"""Whole models on a GPU: Inductor in bf16 beside fp4fx, latency, tokens a second, memory.

The decoder is Llama-shaped, 1.5 G parameters, with a cache of keys and values that is written in place, so that a token
is one call of the same shapes: what CUDA graphs need.
"""

from __future__ import annotations

import copy
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp4fx
from benchmarks import gpu_timing, nets
from benchmarks.peers.base import reason
from fp4fx.bench import Timing
from fp4fx.lowering import lowerings_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Of a decoder."""

    dim: int = 2048
    hidden: int = 8192
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    length: int = 512
    """Tokens that the cache holds."""


class _Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape, head = s, s.dim // s.heads
        self.norm1, self.norm2 = nn.RMSNorm(s.dim), nn.RMSNorm(s.dim)
        self.q, self.o = nn.Linear(s.dim, s.dim, bias=False), nn.Linear(s.dim, s.dim, bias=False)
        self.k, self.v = (nn.Linear(s.dim, s.kv_heads * head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(s.dim, s.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(s.hidden, s.dim, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, s.kv_heads, s.length, head))

    def forward(self, x: Tensor, position: Tensor, seen: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (project(h).unflatten(-1, (n, -1)).transpose(1, 2) for project, n in self._projections())
        self.keys.index_copy_(2, position, nets.rotate(k, cos, sin))
        self.values.index_copy_(2, position, v)
        attended = F.scaled_dot_product_attention(
            nets.rotate(q, cos, sin), self.keys, self.values, attn_mask=seen, enable_gqa=True
        )
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def _projections(self) -> tuple[tuple[nn.Module, int], ...]:
        s = self.shape
        return (self.q, s.heads), (self.k, s.kv_heads), (self.v, s.kv_heads)


class Llama(nn.Module):
    """A decoder that takes one token and its position, and gives the next token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.dim)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim)
        self.head = nn.Linear(shape.dim, shape.vocabulary, bias=False)
        half = shape.dim // shape.heads // 2
        angle = torch.arange(shape.length)[:, None] / 500000 ** (torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.register_buffer("positions", torch.arange(shape.length))

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        """Token i64 [1, 1], position i64 [1] -> the next token i64 [1, 1]."""
        x = self.embed(token)
        cos, sin = self.cos[position], self.sin[position]
        seen = (self.positions <= position)[None, None, None]
        for layer in self.layers:
            x = layer(x, position, seen, cos, sin)
        return self.head(self.norm(x)).argmax(-1)


# --- images ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def images(
    make: Callable[[], nn.Module],
    x: Tensor,
    device: torch.device,
    *,
    policy: fp4fx.Policy,
    modes: dict[str, str | None],
    rounds: int,
    end: float,
) -> Iterator[Row]:
    """A model of images beside Inductor, and its memory.

    Args:
        make: the model in fp32 on the CPU.
        x: its input fp32, in channels_last on the device.
        device: where it runs.
        policy: of fp4fx.
        modes: of torch.compile for the peer, by name.
        rounds: measured calls.
        end: `time.perf_counter()` after which no further candidate is begun.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make().eval().to(dtype).to(device).to(memory_format=torch.channels_last)
    x = x.to(dtype)
    expected = model(x).double()
    ways: dict[str, Callable[[], tuple[Any, nn.Module]]] = {"fp4fx": lambda: _ours(model, (x,), policy)}
    for name, mode in modes.items():
        ways[name] = functools.partial(_inductor, model, mode)
    for name, way in ways.items():
        if time.perf_counter() > end:
            yield {"candidate": name, "reason": "out of time"}
            continue
        try:
            yield {"candidate": name, **_measure(way, x, expected, device, rounds)}
        except Exception as error:  # noqa: BLE001  (whatever a compiler raises is the reason of its row)
            yield {"candidate": name, "reason": reason(error)}


def _measure(
    way: Callable[[], tuple[Any, nn.Module]], x: Tensor, expected: Tensor, device: torch.device, rounds: int
) -> Row:
    start = time.perf_counter()
    run, module = way()
    y = run(x)
    first = time.perf_counter() - start
    facts = {"first_call_s": first, "error": float((y.double() - expected).norm() / expected.norm())}
    for _ in range(3):
        run(x)
    facts |= _memory(lambda: run(x), module, device)
    plain = Timing.of([gpu_timing.once(lambda: run(x), device) for _ in range(rounds)])
    replay = gpu_timing.captured([lambda: run(x)]) if device.type == "cuda" else None
    if replay is not None:
        replay()
        facts["graph_ms"] = Timing.of([gpu_timing.once(replay, device) for _ in range(rounds)]).median
    return {"median_ms": plain.median, "p10_ms": plain.p10, "p90_ms": plain.p90, **facts, "kernels": kernels(module)}


def _ours(
    model: nn.Module, inputs: tuple[Tensor, ...], policy: fp4fx.Policy, mode: str | None = None
) -> tuple[Any, nn.Module]:
    packed = fp4fx.quantize(copy.deepcopy(model), policy, example_inputs=inputs)
    return torch.compile(packed, backend="fp4fx", dynamic=False, mode=mode), packed


def _inductor(model: nn.Module, mode: str | None) -> tuple[Any, nn.Module]:
    own = copy.deepcopy(model)
    return torch.compile(own, dynamic=False, mode=mode), own


def kernels(module: nn.Module) -> dict[str, int]:
    """How many packed weights each kernel reads."""
    tensors = (*module.parameters(), *module.buffers())
    return dict(Counter(f"{low.op}: {low.kernel}" for tensor in tensors for low in lowerings_of(tensor)))


def _memory(call: Callable[[], Any], module: nn.Module, device: torch.device) -> Row:
    """Bytes of the weights, and how much a call needs beyond what was there before it."""
    facts: Row = {"weight_bytes": sum(t.nbytes for t in (*module.parameters(), *module.buffers()))}
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        facts |= {"call_bytes": torch.cuda.max_memory_allocated() - before}
    return facts


# --- tokens ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def tokens(shape: Shape, device: torch.device, *, count: int, end: float) -> Iterator[Row]:
    """Tokens a second of the decoder at batch 1: Inductor bf16 and fp4fx, with CUDA graphs by mode and by hand."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(shape).eval().to(dtype)
    example = (torch.zeros(1, 1, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long, device=device))
    policy = fp4fx.Policy(skip_first=0, skip_last=0)
    mode = "reduce-overhead" if device.type == "cuda" else None
    ways: dict[str, Callable[[], tuple[Any, nn.Module]]] = {
        "fp4fx, reduce-overhead": lambda: _ours(model, example, policy, mode),
        "Inductor bf16, reduce-overhead": lambda: _inductor(model, mode),
        "fp4fx, graph by hand": lambda: _ours(model, example, policy),
        "Inductor bf16, max-autotune, graph by hand": lambda: _inductor(
            model, "max-autotune-no-cudagraphs" if device.type == "cuda" else None
        ),
    }
    for name, way in ways.items():
        if time.perf_counter() > end:
            yield {"candidate": name, "reason": "out of time"}
            continue
        try:
            yield {"candidate": name, **_generate(way, example, device, count, by_hand="by hand" in name)}
        except Exception as error:  # noqa: BLE001  (whatever a compiler raises is the reason of its row)
            yield {"candidate": name, "reason": reason(error)}
        torch.compiler.reset()


def _generate(
    way: Callable[[], tuple[Any, nn.Module]],
    example: tuple[Tensor, Tensor],
    device: torch.device,
    count: int,
    *,
    by_hand: bool,
) -> Row:
    start = time.perf_counter()
    run, module = way()
    token, position = (x.clone() for x in example)

    def step() -> None:
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        token.copy_(run(token, position))
        position.add_(1)

    step()
    first = time.perf_counter() - start
    for _ in range(3):  # CUDA graphs are recorded after a warm-up
        step()
    facts = {"first_call_s": first, **_memory(step, module, device)}
    call: Callable[[], Any] = step
    if by_hand and device.type == "cuda":
        replay = gpu_timing.captured([step])
        if replay is None:
            return {"reason": "its step cannot be captured in a CUDA graph", **facts}
        call = replay
    position.zero_()

    def sequence() -> None:
        for _ in range(count):
            call()

    took = Timing.of([_from_start(sequence, position, device) for _ in range(3)]).median
    return {"tokens_per_s": 1e3 * count / took, "median_ms": took / count, **facts, "kernels": kernels(module)}


def _from_start(sequence: Callable[[], None], position: Tensor, device: torch.device) -> float:
    position.zero_()
    return gpu_timing.once(sequence, device)
