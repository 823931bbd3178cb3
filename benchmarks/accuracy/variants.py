"""The columns of the comparison: fp4fx in its variants, and its peers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fp4fx
from benchmarks.accuracy import peers
from benchmarks.accuracy.measure import Made, Task, Variant
from benchmarks.peers import UnavailableError
from fp4fx import Policy
from fp4fx.site import Site

FP32, DEFAULT = "fp32", "W4A16 (default)"
CALIBRATED = "W4A4 static + GPTQ + bias correction"
TORCHAO, AS_TORCHAO = "torchao NVFP4 weight-only", "W4A16, torchao's layers"


def variants() -> tuple[Variant, ...]:
    """All of them, in the order of the tables."""
    weights, both = functools.partial(_ours, "W4A16"), functools.partial(_ours, "W4A4")
    return (
        Variant(FP32, "reference", lambda task: Made(task.model, {}, 32, nbytes(task.model))),
        Variant("bf16", "reference", _bf16),
        weights("W4A16 max", scale_rule="max"),
        weights("W4A16 four-over-six", scale_rule="four_over_six"),
        weights("W4A16 search", scale_rule="search"),
        weights(DEFAULT),
        weights("W4A16 GPTQ", ("gptq",)),
        weights("W4A16 AdaRound", ("adaround",)),
        both("W4A4 dynamic"),
        both("W4A4 dynamic, four-over-six", activation_scale_rule="four_over_six"),
        both("W4A4 static", ("static_scales",)),
        both("W4A4 static + bias correction", ("static_scales", "bias_correction")),
        both(CALIBRATED, ("static_scales", "gptq", "bias_correction")),
        both("W4A4 smoothing + " + CALIBRATED[5:], ("smoothing", "static_scales", "gptq", "bias_correction")),
        Variant(TORCHAO, "peer", lambda task: _torchao(task)[0]),
        Variant(AS_TORCHAO, "W4A16", _as_torchao),
        _peer("ModelOpt NVFP4", peers.on_rows(peers.modelopt)),
        _peer("ModelOpt NVFP4, scale sweep", peers.on_rows(peers.modelopt_sweep)),
        _peer("ModelOpt NVFP4, last axis", peers.modelopt_last_axis),
        _peer("INT4-g32 RTN", peers.on_rows(peers.int4)),
        _peer("bitsandbytes NF4-g64", peers.on_rows(peers.nf4)),
        _peer("FP8 E4M3 per tensor", peers.on_rows(functools.partial(peers.fp8, per_row=False))),
        _peer("FP8 E4M3 per channel", peers.on_rows(functools.partial(peers.fp8, per_row=True))),
    )


def nbytes(model: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def sites(task: Task) -> tuple[Site, ...]:
    """What fp4fx's default policy packs."""
    plan = fp4fx.plan(task.model, Policy.weight_only(), task.calibration[0][:1])
    return tuple({decision.site.parameter: decision.site for decision in plan.quantized}.values())


def _ours(kind: str, name: str, methods: Sequence[str] = (), **changes: Any) -> Variant:
    def make(task: Task) -> Made:
        preset = {"W4A16": Policy.weight_only, "W4A4": Policy.w4a4}[kind]
        return packed(task, preset(**changes), methods)

    return Variant(name, kind, make)


def packed(task: Task, policy: Policy, methods: Sequence[str] = ()) -> Made:
    """The network packed by a policy and, with methods, calibrated."""
    result = fp4fx.quantize(task.model, policy, task.calibration[0][:1])
    if methods:
        result = fp4fx.calibrate(result, task.calibration, reference=task.model, methods=list(methods))
    report = fp4fx.report(result)
    names = dict.fromkeys(row.parameter for row in report.rows if row.decision != "kept")
    return Made(result, decoded(result, names), report.bits, report.resident)


def decoded(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights of these names as the model computes with them, in fp32."""
    weights = {name: getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
    return {name: (w.dequantize() if hasattr(w, "tensor_data_names") else w).float() for name, w in weights.items()}


def _bf16(task: Task) -> Made:
    model = copy.deepcopy(task.model).to(torch.bfloat16)

    def run(x: Tensor) -> Tensor:
        return model(x.to(torch.bfloat16) if x.is_floating_point() else x)  # type: ignore[no-any-return]

    return Made(run, decoded(model, dict(model.named_parameters())), 16, nbytes(model))


def _peer(name: str, codec: peers.Codec) -> Variant:
    def make(task: Task) -> Made:
        chosen = sites(task)
        model, stored = peers.replaced(task.model, chosen, codec)
        return _stored(task, model, [site.parameter for site in chosen], stored)

    return Variant(name, "peer", make)


def _stored(task: Task, model: nn.Module, names: Sequence[str], stored: int) -> Made:
    """A network of which these weights take so many bytes."""
    if not names:
        raise UnavailableError("no weight is quantized")
    weights = decoded(model, names)
    numel = sum(weight.numel() for weight in weights.values())
    return Made(model, weights, 8 * stored / numel, nbytes(task.model) - 4 * numel + stored)


def _torchao(task: Task) -> tuple[Made, tuple[str, ...]]:
    model, names, stored = peers.torchao(task.model)
    return _stored(task, model, names, stored), names


def _as_torchao(task: Task) -> Made:
    names = _torchao(task)[1]
    return packed(task, Policy.weight_only(include=names, skip_first=0, skip_last=0))
