"""What the tests of checkpoints share: comparing models and files bit by bit."""

import torch
from safetensors import safe_open
from torch import nn

import fp4fx
from fp4fx.packed import Packed

ALL = fp4fx.Policy(skip_first=0, skip_last=0)
W4A4 = fp4fx.Policy.w4a4(skip_first=0, skip_last=0)
STATIC = fp4fx.Policy(activations="nvfp4-static", skip_first=0, skip_last=0)
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Rotary(nn.Module):
    """A linear and a non-persistent buffer."""

    def __init__(self, dim=32):
        super().__init__()
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(dim) / dim), persistent=False)
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x):
        return self.proj(x) * self.inv_freq


def everything(model):
    """All tensors by name, non-persistent buffers and the names of tied ones included."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a[name], b[name])]
        assert torch.equal(*bits), name


def snapshot(model):
    """What must not change about a model that is loaded into."""
    tensors = everything(model)
    kept = {name: t if t.is_meta else t.detach().clone() for name, t in tensors.items()}
    return [(type(m), m.training, set(m.__dict__)) for m in model.modules()], [id(t) for t in tensors.values()], kept


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now[:2] == before[:2]
    assert_same_bits(
        {n: t for n, t in now[2].items() if not t.is_meta}, {n: t for n, t in before[2].items() if not t.is_meta}
    )


def contents(path):
    """Tensors and metadata of a file, to be damaged."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.offset_keys()}, file.metadata()


def assert_same_contents(path, other):
    """Not the bytes: safetensors writes its metadata in any order."""
    (tensors, metadata), (others, other_metadata) = contents(path), contents(other)
    assert metadata == other_metadata
    assert_same_bits(tensors, others)


def packed_modules(model):
    """The packed modules of a model by qualified name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Packed)}
