"""Small models that several tests quantize."""

import torch
import torch.nn.functional as F
from torch import nn


class ConvNet(nn.Module):
    """Convolutions, a grouped one, BatchNorm, a residual and a head."""

    def __init__(self, channels=32):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.body = nn.Conv2d(channels, channels, 3, padding=1)
        self.grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)
        self.head = nn.Linear(channels, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = x + F.relu(self.body(x))
        x = self.grouped(x).mean((2, 3))
        return self.head(x)


class UNet(nn.Module):
    """GroupNorm, skip connection, transposed convolution, output convolution."""

    def __init__(self, channels=16):
        super().__init__()
        self.down = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.deep = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(4, 2 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.merge = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, 2, 1)

    def forward(self, x):
        skip = F.relu(self.norm(self.down(x)))
        x = F.relu(self.norm2(self.deep(skip)))
        x = self.merge(torch.cat([skip, self.up(x)], 1))
        return self.out(F.silu(x))


class Attention(nn.Module):
    """nn.MultiheadAttention between two linears."""

    def __init__(self, dim=32):
        super().__init__()
        self.embed = nn.Linear(8, dim)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class Tied(nn.Module):
    """An embedding whose table is also the head."""

    def __init__(self, vocabulary=40, dim=32):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.body = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i):
        return self.head(torch.tanh(self.body(self.embed(i))))
