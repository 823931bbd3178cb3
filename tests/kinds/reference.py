"""What a quantized model should compute, by a way of its own: matrices quantized one axis at a time, in plain calls."""

import copy

import torch

import fp4fx
from fp4fx import nvfp4
from fp4fx.packed import PARTS, Packed
from fp4fx.report import report

EVERY = fp4fx.Policy(skip_first=0, skip_last=0, compute="fp32")


def rounded(weight, axis):
    """A tensor quantized in blocks along one axis, decoded again."""
    turned = weight.detach().movedim(axis, -1)
    rows = turned.reshape(-1, turned.shape[-1])
    k = rows.shape[-1]
    codes = nvfp4.quantize_rows(rows, scale_rule="unbiased")
    return nvfp4.dequantize_rows(*codes, k, weight.dtype).reshape(turned.shape).movedim(-1, axis)


def with_rounded(model, axes):
    """A dense copy of the model with these parameters rounded along these axes."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, axis in axes.items():
            model.get_parameter(name).copy_(rounded(model.get_parameter(name), axis))
    return model


def check_compiled(model, *inputs, fused=True, tolerance=1e-4, **options):
    """The quantized model compiled equals itself in eager mode; all packed weights are fused, or none is."""
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(*inputs)
        found = torch.compile(model, backend="fp4fx", **options)(*inputs)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    kernels = {row.parameter: row.kernels for row in report(model).rows if row.decision != "kept"}
    for name, used in kernels.items():
        assert used, name
        assert any("dequantize" in kernel for kernel in used) is not fused, (name, used)
    return kernels


def packed_names(model):
    """The parameters that a quantized model holds packed."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, Packed)]
    return sorted(f"{name}.{p}".lstrip(".") for name, module in modules for p in module.nvfp4)


def resident_bits(model, name):
    """Bits per value of a packed parameter."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    parts = [getattr(module, f"{attribute}_{part}") for part in PARTS]
    return sum(p.nbytes for p in parts) * 8 / torch.Size(module.nvfp4[attribute].shape).numel()
