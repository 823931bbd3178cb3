"""Small networks of every kind, trained here in about a minute each, and kept under build/ for the next time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2
from tqdm import tqdm

from benchmarks.accuracy import data
from benchmarks.accuracy.data import Data

CACHE = Path(__file__).resolve().parents[2] / "build" / "accuracy"
SEEDS = (0, 1, 2)


def resnet() -> nn.Module:
    """ResNet-18's layout with half of its widths, without the zeros that its branches may start with."""
    widths = (32, 64, 128, 256)
    return ResNet(BasicBlock, (2, 2, 2, 2), 10, in_chans=1, channels=widths, zero_init_last=False)


def mobilenet() -> nn.Module:
    """MobileNetV2 with fewer and narrower blocks."""
    blocks = [[1, 16, 1, 1], [6, 32, 2, 2], [6, 64, 2, 2], [6, 96, 1, 1]]  # expansion, channels, count, stride
    net = MobileNetV2(10, inverted_residual_setting=blocks, dropout=0.0)
    net.features[0][0] = nn.Conv2d(1, 32, 3, 2, 1, bias=False)
    return net


def convnext() -> nn.Module:
    """ConvNeXt with few and narrow blocks; their scales start where few steps suffice."""
    return ConvNeXt(1, 10, depths=(1, 1, 3, 1), dims=(32, 64, 128, 192), ls_init_value=0.1)


def vit() -> nn.Module:
    """ViT with 16 patches of 8x8 pixels."""
    return VisionTransformer(32, 8, 1, 10, embed_dim=128, depth=4, num_heads=4, global_pool="avg", class_token=False)


class UNet(nn.Module):
    """Three levels down and up, GroupNorm, transposed convolutions, skips: images [B, 3, H, W] -> [B, 2, H, W]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width << level for level in range(4)]
        self.down = nn.ModuleList(_double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.rise = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(_double(a, b) for a, b in pairs)
        self.out = nn.Conv2d(width, 2, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], H and W multiples of 8 -> scores [B, 2, H, W]."""
        skips: list[Tensor] = []
        for block in self.down:
            skips.append(block(F.max_pool2d(skips[-1], 2) if skips else x))
        x = skips.pop()
        for rise, block in zip(self.rise, self.up, strict=True):
            x = block(torch.cat([skips.pop(), rise(x)], 1))
        return self.out(x)


def _double(channels: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for c in (channels, out):
        layers += [nn.Conv2d(c, out, 3, padding=1, bias=False), nn.GroupNorm(8, out), nn.ReLU()]
    return nn.Sequential(*layers)


class Block(nn.Module):
    """A transformer layer with its norms in front; a position sees itself and what is before it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class CharTransformer(nn.Module):
    """GPT over characters: indices [B, T] int64, T <= 128 -> scores of the next one [B, characters, T]."""

    def __init__(self, dim: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(len(data.ALPHABET), dim)
        self.position = nn.Parameter(torch.zeros(data.CONTEXT, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, len(data.ALPHABET))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Indices [B, T] -> scores [B, characters, T]."""
        x = self.token(x) + self.position[: x.shape[1]]
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


@dataclass(frozen=True)
class Recipe:
    """How a network is made and trained."""

    make: Callable[[], nn.Module]
    data: Callable[[str], Data]
    metric: str
    """"accuracy" or "mIoU", in percent."""
    steps: int
    batch: int = 64
    lr: float = 3e-3
    """The highest of the one-cycle schedule of AdamW."""


RECIPES = {
    "resnet": Recipe(resnet, data.numbers, "accuracy", 400),
    "mobilenet": Recipe(mobilenet, data.numbers, "accuracy", 400),
    "convnext": Recipe(convnext, data.numbers, "accuracy", 900),
    "vit": Recipe(vit, data.numbers, "accuracy", 1800, lr=1e-3),
    "unet": Recipe(UNet, data.scenes, "mIoU", 450, batch=16, lr=5e-3),
    "chars": Recipe(CharTransformer, data.texts, "accuracy", 500, batch=32),
}


def trained(name: str, seed: int = 0, *, steps: int | None = None, cache: Path | None = None) -> nn.Module:
    """The network of that name trained with that seed, fp32, in evaluation mode, parameters frozen.

    Args:
        name: of `RECIPES`.
        seed: of the initial weights and of the order of the data.
        steps: fewer than the recipe's, to try something out.
        cache: folder for trained weights, `CACHE` if None; a change of these networks or data trains them anew.
    """
    recipe = RECIPES[name] if steps is None else replace(RECIPES[name], steps=steps)
    sources = "".join(Path(module).read_text("utf-8") for module in (__file__, data.__file__))
    key = hashlib.sha256(f"{sources}{recipe.steps}".encode()).hexdigest()[:12]
    path = (cache or CACHE) / f"{name}-{seed}-{key}.pt"
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = recipe.make()
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            train(model, recipe, f"training {name}, seed {seed}")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
    return model.eval().requires_grad_(False)


def train(model: nn.Module, recipe: Recipe, title: str) -> None:
    """Train in place: AdamW, one cycle, cross entropy."""
    source = recipe.data("train")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=recipe.steps)
    order = torch.randperm(len(source))
    with tqdm(range(recipe.steps), desc=title, unit="step", disable=None, leave=False) as bar:
        for step in bar:
            batch = source[order.roll(-step * recipe.batch)[: recipe.batch]]
            loss = F.cross_entropy(model(batch.inputs), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}")
