"""Kernel selection: the first that does not refuse, with the reasons of those before it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp4fx import ops
from fp4fx.kernels import KERNELS
from fp4fx.registry import Kernel, Request, select
from fp4fx.target import Target, target_of

REQUEST = Request(
    op="linear",
    target=Target("cpu", "a processor", frozenset({"avx2"})),
    dtype=torch.float32,
    n=8,
    k=32,
    quantized_input=False,
    freezing=False,
)


def kernel(name, reason):
    return Kernel(name=name, ops=frozenset({"linear"}), refuse=lambda request: reason, lower=lambda node: None)


def test_the_first_that_does_not_refuse_is_taken_with_the_reasons_before_it():
    fast, middle, last = kernel("fast", "needs AMX"), kernel("middle", None), kernel("last", None)
    assert select(REQUEST, [fast, middle, last]) == (middle, ("fast: needs AMX",))
    assert select(REQUEST, [last, fast]) == (last, ())


def test_a_kernel_of_another_op_is_not_asked():
    def never(request):
        raise AssertionError("was asked")

    other = Kernel(name="other", ops=frozenset({"conv"}), refuse=never, lower=lambda node: None)
    assert select(REQUEST, [other, kernel("last", None)])[1] == ()


def test_a_list_without_a_last_resort_is_an_error():
    with pytest.raises(LookupError, match="reference body"):
        select(REQUEST, [kernel("fast", "no")])


def test_the_reference_body_is_last_and_takes_everything():
    assert KERNELS[-1].name == "reference"
    for op in ops.__all__:
        for freezing in (False, True):
            chosen, refusals = select(replace(REQUEST, op=op, freezing=freezing), KERNELS[-1:])
            assert chosen.name == "reference" and refusals == ()


def test_scales_that_are_searched_are_left_to_kernels_and_bodies():
    request = replace(REQUEST, op="quantize", n=None, k=None)
    inductor = [kernel for kernel in KERNELS if kernel.name in ("inductor", "reference")]
    assert select(replace(request, scale_rule="four_over_six"), inductor)[0].name == "inductor"
    for rule in ("search", "unbiased"):
        chosen, reasons = select(replace(request, scale_rule=rule), inductor)
        assert chosen.name == "reference" and "tries eleven scales" in reasons[0]
    chosen, reasons = select(replace(request, scale_rule="unbiased"), KERNELS)  # whose factor no kernel has
    assert chosen.name == "reference" and len(reasons) == 2


def test_the_target_names_this_machine():
    cpu = target_of(torch.device("cpu"))
    assert cpu.device == "cpu" and cpu.name
    info = Path("/proc/cpuinfo")
    if info.exists() and " avx2 " in info.read_text():
        assert "avx2" in cpu.features
    assert target_of(torch.device("meta")).features == frozenset()
