"""Graphs for the tests of the passes: captured by Dynamo as the backend sees them, and run as they stand."""

import torch
from torch import nn

from fp4fx import capture
from fp4fx.packed import PackedSpec, encode, pack
from fp4fx.pipeline import Context, aten_name, op_name


def packed(module, name="weight", order="rows", groups=1, activations=None):
    """The module with one parameter packed, in place."""
    dense = module._parameters[name]
    spec = PackedSpec(shape=tuple(dense.shape), order=order, groups=groups, dtype=dense.dtype)
    pack(module, {name: encode(dense, spec, name)}, activations)
    return module


def linear(k=32, n=8, **kwargs):
    return packed(nn.Linear(k, n, **kwargs))


def conv(cls=nn.Conv2d, *args, activations=None, **kwargs):
    module = cls(*args, **kwargs)
    return packed(
        module, order="conv_transpose" if module.transposed else "conv", groups=module.groups, activations=activations
    )


class Captured:
    """One Dynamo graph with its context; `graph(*passes)` rewrites it, `run()` executes it on the captured inputs."""

    def __init__(self, function, *inputs, policy=None, freezing=False, grad=False):
        torch._dynamo.reset()
        found = []

        def keep(gm, example_inputs):
            found.append((gm, list(example_inputs)))
            return gm

        with torch.set_grad_enabled(grad):
            self.expected = torch.compile(function, backend=keep, fullgraph=True)(*inputs)
        ((gm, self.inputs),) = found
        self.gm = capture.own_copy(gm)
        self.ctx = Context(real=capture.real_tensors(self.gm, self.inputs), policy=policy, freezing=freezing)
        self.grad = grad

    def apply(self, *passes):
        """Run passes; the number of rewrites of the last."""
        with torch.set_grad_enabled(self.grad):
            for rewrite in passes:
                count = rewrite(self.gm, self.ctx)
                capture.eliminate_dead_code(self.gm)
                self.gm.graph.lint()
        self.gm.recompile()
        return count

    def count(self, name):
        """How many calls of an op: `fp4fx.linear`, `aten.conv2d`."""
        namespace, _, op = name.partition(".")
        of = op_name if namespace == "fp4fx" else aten_name
        return sum(of(node) == op for node in self.gm.graph.nodes)

    def check(self, tolerance=1e-5):
        """The rewritten graph gives what the original gave."""
        with torch.set_grad_enabled(self.grad):
            torch.testing.assert_close(self.gm(*self.inputs)[0], self.expected, rtol=tolerance, atol=tolerance)
