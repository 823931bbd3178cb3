"""The two models of the benchmark that no package has, and example inputs of all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, HIDDEN, LAYERS, CACHED = 2048, 16, 5632, 6, 256


def double_conv(channels: int, out: int) -> nn.Sequential:
    """Twice a 3x3 convolution, BatchNorm, ReLU."""
    layers: list[nn.Module] = []
    for c in (channels, out):
        layers += [nn.Conv2d(c, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """The classic one: four levels down and up, transposed convolutions, 31 M parameters."""

    def __init__(self, channels: int = 3, classes: int = 2, width: int = 64) -> None:
        super().__init__()
        widths = [width << level for level in range(5)]
        self.down = nn.ModuleList(double_conv(a, b) for a, b in zip([channels, *widths], widths, strict=False))
        pairs = list(zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True))
        self.rise = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(double_conv(a, b) for a, b in pairs)
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], H and W multiples of 16 -> scores [B, classes, H, W]."""
        skips = []
        for block in self.down[:-1]:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.down[-1](x)
        for rise, block in zip(self.rise, self.up, strict=True):
            x = block(torch.cat([skips.pop(), rise(x)], 1))
        return self.out(x)


class DecoderLayer(nn.Module):
    """As in Llama: RMSNorm, attention with rotated queries and keys, RMSNorm, gated MLP; no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(DIM, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor, cache: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, DIM], keys and values so far [2, B, HEADS, S, DIM/HEADS] -> [B, T, DIM]."""
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k = torch.cat([cache[0], rotate(k, cos, sin)], 2)
        v = torch.cat([cache[1], v], 2)
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [..., T, D] turned by their positions' angles [T, D/2]."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class Decoder(nn.Module):
    """Six layers, without embedding and head: one token from hidden state to hidden state, with a cache of 256."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(LAYERS))
        half = DIM // HEADS // 2
        angle = CACHED / 10000 ** (torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        """x [B, 1, DIM], keys and values [LAYERS, 2, B, HEADS, CACHED, DIM/HEADS] -> [B, 1, DIM]."""
        for index, layer in enumerate(self.layers):
            x = layer(x, cache[index], self.cos, self.sin)
        return x


OWN = {"unet_256": UNet, "llama_6x2048": Decoder}
VISION = ("resnet50", "convnext_tiny", "vit_base_patch16_224", "mobilenetv3_large_100", "unet_256")


def create(name: str) -> nn.Module:
    """A model in evaluation mode with random weights; no branch starts at zero, and statistics are those of inputs."""
    torch.manual_seed(0)
    model = OWN[name]() if name in OWN else _timm(name)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
            norm.momentum = None  # an average over what is seen
        for path, parameter in model.named_parameters():
            if path.endswith(".gamma"):  # a factor for a branch
                parameter.uniform_(0.1, 0.5)
        if norms:
            model.train()(*inputs(name, 4))
    return model.eval()


def _timm(name: str) -> nn.Module:
    import timm  # noqa: PLC0415  (where it is missing its models are, not ours)

    model: nn.Module = timm.create_model(name)
    return model


def inputs(name: str, batch: int) -> tuple[Tensor, ...]:
    """Example inputs in fp32."""
    torch.manual_seed(1)
    if name == "llama_6x2048":
        cache = torch.randn(LAYERS, 2, batch, HEADS, CACHED, DIM // HEADS)
        return torch.randn(batch, 1, DIM), cache
    side = 256 if name == "unet_256" else 224
    return (torch.randn(batch, 3, side, side),)


def batches(name: str) -> tuple[int, ...]:
    """The batch sizes that are measured."""
    return (1, 8) if name in VISION else (1,)
