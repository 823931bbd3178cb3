import importlib

import torch

from fp4fx import ops
from fp4fx.kernels import KERNELS
from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.fuse_linear import fuse_linear
from fp4fx.passes.select_kernels import select_kernels
from tests.passes.graphs import Captured, linear

module = importlib.import_module("fp4fx.passes.select_kernels")  # which the function of that name hides


def test_the_first_kernel_that_takes_the_op_is_chosen_and_noted(monkeypatch):
    monkeypatch.setattr(module, "KERNELS", KERNELS[1:])
    layer = linear()
    g = Captured(layer, torch.randn(3, 32))
    assert g.apply(canonicalize, fuse_linear, select_kernels) == 1
    assert ops.linear in [n.target for n in g.gm.graph.nodes]
    ((stored, lowering),) = g.ctx.lowerings
    assert stored is layer.weight_packed
    assert (lowering.op, lowering.kernel, lowering.refusals) == ("linear", "inductor", ())
    g.check()


def test_under_freezing_the_packed_op_stays_opaque_and_says_why(monkeypatch):
    monkeypatch.setattr(module, "KERNELS", KERNELS[1:])
    layer = linear()
    g = Captured(layer, torch.randn(3, 32), freezing=True)
    g.apply(canonicalize, fuse_linear, select_kernels)
    assert g.count("fp4fx.linear") == 1
    ((_, lowering),) = g.ctx.lowerings
    assert lowering.kernel == "reference" and "freezing" in lowering.refusals[0]
    g.check()


def test_a_weight_that_could_not_be_fused_names_its_reader():
    layer = linear()
    g = Captured(lambda x: x @ layer.weight.t(), torch.randn(3, 32))
    g.apply(canonicalize, fuse_linear, select_kernels)
    ((_, lowering),) = g.ctx.lowerings
    assert lowering.op == "dequantize" and "read by aten.t" in lowering.refusals[0]
    g.check()
