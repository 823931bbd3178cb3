"""Graphs for the tests of the passes: captured by Dynamo as the backend sees them, and run as they stand."""

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fp4fx import capture
from fp4fx.dataflow import op_name as name_of
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
        self.inputs = [int(i) if isinstance(i, torch.SymInt) else i for i in self.inputs]
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
            found = self.gm(*self.inputs)
        found = found[0] if isinstance(self.expected, torch.Tensor) else tuple(found)
        torch.testing.assert_close(found, self.expected, rtol=tolerance, atol=tolerance)


def values(g):
    """The fake value of the last call of each op, by the op's name."""
    return {
        f"{n.target.namespace}.{n.target._opname}": capture.value(n)
        for n in g.gm.graph.nodes
        if n.op == "call_function" and isinstance(n.target, capture.OpOverload)
    }


def copies(g):
    """The calls that move values of two or more dimensions to other places, as seen when the graph runs."""
    moves = ("contiguous", "clone", "reshape", "view", "flatten", "permute", "transpose")
    found = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.op.startswith("call") and name_of(n) in moves and result.dim() > 1:
                places = [t.untyped_storage().data_ptr() for t in (result, self.env[n.args[0]])]
                found.extend([n] if places[0] != places[1] else [])
            return result

    with torch.set_grad_enabled(g.grad):
        Watch(g.gm, garbage_collect_values=False).run(*g.inputs)
    return found


def assert_true_strides(g):
    """Every value of the graph, and every result, has the strides that its node says."""

    class Check(torch.fx.Interpreter):
        def run_node(self, n):
            result, fake = super().run_node(n), capture.value(n)
            if n.op == "output":
                fake = [capture.value(a) if isinstance(a, torch.fx.Node) else a for a in n.args[0]]
            for real, said in zip(tree_leaves(result), tree_leaves(fake), strict=True):
                if isinstance(real, torch.Tensor):
                    assert real.shape == said.shape and real.dtype == said.dtype, n
                    strides = zip(real.shape, real.stride(), said.stride(), strict=True)
                    assert all(size == 1 or a == b for size, a, b in strides), (n, real.stride(), said.stride())
            return result

    with torch.set_grad_enabled(g.grad):
        results = Check(g.gm).run(*g.inputs)
    for mine, theirs in zip(results, tree_leaves(g.expected), strict=True):
        assert mine.stride() == theirs.stride()
