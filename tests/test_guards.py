"""What Dynamo compares on every call of a compiled packed model, and that it sees what changes."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import fp4fx
from fp4fx import capture, folding

ALL = fp4fx.Policy(skip_first=0, skip_last=0)


class Net(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(16, 16, 1, bias=False) for _ in range(layers)))
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        return self.norm(self.body(x))


X = torch.randn(1, 16, 4, 4)


def guards(model):
    """The lines of the tree of guards on the last layer."""
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(X)
    (entry,) = _debug_get_cache_entry_list(Net.forward.__code__)
    return [line for line in str(entry.guard_manager).splitlines() if "['2']" in line]


def test_a_packed_layer_has_the_guards_of_a_plain_one_of_its_tensors_and_of_one_constant():
    plain, packed = guards(Net().eval()), guards(fp4fx.quantize(Net().eval(), ALL))
    others = [line for line in packed if "_buffers" not in line and "weight_nvfp4" not in line]
    assert len(others) == len([line for line in plain if "_parameters['weight']" not in line])
    assert sum("source=" in line and "weight_nvfp4" in line for line in packed) == 1


def test_the_constant_is_immutable_and_follows_the_spec():
    layer = fp4fx.quantize(Net().eval(), ALL).body[0]

    def leaves(value):
        return [x for v in value for x in leaves(v)] if type(value) is tuple else [value]

    assert layer.weight_nvfp4 == ((16, 16, 1, 1), "float32", "conv", 1, "bf16")
    assert {type(x) for x in leaves(layer.weight_nvfp4)} == {int, str}
    assert copy.deepcopy(layer).half().weight_nvfp4[1] == "float16"
    assert "weight_nvfp4" not in layer.state_dict()


def swap(model):
    torch.manual_seed(1)
    model.body[1] = fp4fx.quantize(nn.Conv2d(16, 16, 1, bias=False), ALL)


CHANGES = {
    "an assignment": lambda m: setattr(m.body[0], "weight", torch.randn(16, 16, 1, 1)),
    "an assignment to a norm": lambda m: setattr(m.norm, "weight", nn.Parameter(torch.randn(16))),
    "packed bytes": lambda m: m.load_state_dict(fp4fx.quantize(Net().eval(), ALL).state_dict()),
    "a dense state dict": lambda m: m.load_state_dict(Net().state_dict(), strict=False),
    "another module": swap,
    "calibration": lambda m: fp4fx.calibrate(m, [X], reference=Net().eval(), methods=["gptq"]),
    "statistics": lambda m: (m.norm.train()(3 * X), m.norm.eval()),
}


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    model = fp4fx.quantize(Net().eval(), ALL)
    return model, torch.compile(model, backend="fp4fx", fullgraph=True)


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_change_is_seen_by_the_next_call(compiled, change):
    model, call = compiled
    with torch.no_grad():
        before = call(X)
        torch.manual_seed(2 + list(CHANGES).index(change))  # new weights are other ones
        CHANGES[change](model)
        expected, found = model(X), call(X)
    assert (expected - before).norm() > 0.01 * before.norm()
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_another_dtype_is_seen():
    model = fp4fx.quantize(Net().eval(), ALL)
    call = torch.compile(model, backend="fp4fx", fullgraph=True)
    with torch.no_grad():
        assert call(X).dtype == torch.float32
        model.bfloat16()
        found, expected = call(X.bfloat16()), model(X.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_what_is_read_outside_the_graph_only_is_no_input_of_it(monkeypatch):
    torch._dynamo.reset()
    model, given, lower = fp4fx.quantize(Net().eval(), ALL), [], capture.lower
    monkeypatch.setattr(capture, "lower", lambda gm, inputs, *a: (given.append(inputs), lower(gm, inputs, *a))[1])
    with torch.no_grad():
        torch.compile(model, backend="fp4fx", fullgraph=True)(X)
    (inputs,) = given
    norm = {id(t) for t in (*model.norm.parameters(), *model.norm.buffers())}
    packed = {id(t) for t in model.body.buffers()}
    assert not norm & set(map(id, inputs)) and packed <= set(map(id, inputs))
    assert sorted(tuple(t.shape) for t in inputs if id(t) not in packed) == [(1, 16, 4, 4), (16,), (16,)]


def test_a_leaf_of_two_computations_is_looked_at_once():
    leaves = folding.Leaf(0, nn.Parameter(torch.ones(3))), folding.Leaf(None, torch.ones(2, 2))
    seen = []

    def compute(*tensors):
        seen.append(len(tensors))
        return (sum(t.sum() for t in tensors),)

    folded = [
        folding.Folded(part, compute, compute(*(f.tensor for f in part))) for part in (leaves, leaves[1:], leaves[:1])
    ]
    call = folding.with_parts(lambda *args: args, folded, read=[])
    parameter, fixed = (leaf.tensor for leaf in leaves)
    del seen[:]
    assert call(parameter) == (7, 4, 3) and not seen
    with torch.no_grad():
        parameter.mul_(2)
    assert call(parameter) == (10, 4, 6) and sorted(seen) == [1, 2]
    fixed.numpy()[:] = 2
    assert call(parameter) == (14, 8, 6) and sorted(seen) == [1, 1, 2, 2]
