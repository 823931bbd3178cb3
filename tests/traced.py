"""Models that the tests of the trace look into."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import StdConv2d
from torch import nn
from torch.nn.utils import parametrizations
from transformers import LlamaConfig, LlamaForCausalLM


class Residual(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, padding="same", padding_mode="reflect")
        self.bn2 = nn.GroupNorm(2, c)
        self.skip = nn.Conv2d(c, c, 1)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


class Upsampler(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2, groups=2)
        self.norm = nn.InstanceNorm2d(4, affine=True)

    def forward(self, x):
        return self.norm(self.up(self.down(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.twice(self.twice(self.embed(ids))))


class Normed(nn.Module):
    """Weights that reach their op through a transform."""

    def __init__(self):
        super().__init__()
        self.std = StdConv2d(4, 8, 3, padding=1)
        self.new = parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        with pytest.warns(FutureWarning):
            self.old = torch.nn.utils.weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.old_spectral = torch.nn.utils.spectral_norm(nn.Linear(8, 8))

    def forward(self, x):
        x = self.new(self.std(x)).mean((2, 3))
        return self.old_spectral(self.spectral(self.old(x)))


class SelfAndCross(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)

    def forward(self, x):
        y = self.own(x, x, x, need_weights=False)[0]
        z, weights = self.cross(x, y, y)
        return self.encoder(z) + weights.sum()


class DifferentWidths(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=5)

    def forward(self, x):
        return self.attend(x, x[..., :6], x[..., :5])[0]


class Cross(nn.Module):
    """Attention between three different values."""

    def __init__(self, kind=nn.MultiheadAttention, **options):
        super().__init__()
        self.attend = kind(8, 2, batch_first=True, **options)

    def forward(self, query, key, value):
        return self.attend(query, key=key, value=value)[0]


class Calling(nn.MultiheadAttention):
    def forward(self, query, key, value):
        return super().forward(query, key, value, need_weights=False)


class Deciding(nn.MultiheadAttention):
    def forward(self, query, key, value):
        return super().forward(query if query.sum() > 0 else -query, key, value)


class Router(nn.Module):
    """Python that depends on data."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 1)
        self.left, self.right = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        if self.gate(x).sum() > 0:
            return self.left(x)
        return F.linear(self.right(x), self.weight)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.router, self.last = nn.Linear(4, 4), Router(), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.router(self.first(x)))


class Pyramid(nn.Module):
    """Modules that take and return lists and dictionaries."""

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList([Pair() for _ in range(2)])
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})

    def forward(self, x):
        for level in self.levels:
            both = level(x)
            x = both[0] + both[1]
        left, right = self.levels[0](x)
        return {name: head(left + right) for name, head in self.heads.items()}


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return [self.a(x), self.b(x)]


class QKV(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        x = self.drop(self.norm(x))
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Regions(nn.Module):
    """Layers under no_grad and under autocast, which export wraps in higher-order ops."""

    def __init__(self):
        super().__init__()
        self.frozen, self.low, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            x = self.frozen(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.low(x)
        return self.head(x.float())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.yes, self.no = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cond(x.sum() > 0, self.yes, self.no, (x,))


class Forgetful(nn.Module):
    """Writes to itself when it runs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))
        self.plain = torch.zeros(())
        self.cache, self.features, self.calls = None, [], {"n": 0}

    def forward(self, x):
        self.cache = x
        self.features.append(x)
        self.calls["n"] += 1
        self.seen += 1
        self.plain += 1
        noise = torch.rand(4) * random.random()
        return self.norm(self.fc(x)) + noise + np.float32(1)


def small_llama(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **options)).eval()


def on_meta(make, *args, **kwargs):
    with torch.device("meta"):
        return make(*args, **kwargs).eval()
