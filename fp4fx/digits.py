"""A small ResNet trained on real data in seconds: scikit-learn's handwritten digits, in fp32, W4A16 and W4A4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from tqdm import tqdm

from fp4fx.models import require
from fp4fx.policy import Policy
from fp4fx.quantize import quantize
from fp4fx.report import report

BATCH = 64


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        same = cin == cout and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X [B, cin, H, W] -> [B, cout, H / stride, W / stride]."""
        y = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Sequential):
    """8x8 images of digits [B, 1, 8, 8] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            Block(32, 32, 1),
            Block(32, 64, 2),
            Block(64, 64, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


@dataclass(frozen=True)
class Digits:
    """Images [B, 1, 8, 8] fp32 in 0..1 and labels [B] int64."""

    images: Tensor
    labels: Tensor


def load() -> tuple[Digits, Digits]:
    """Training and test part of scikit-learn's digits: 1257 and 540 images, split once, every digit alike in both."""
    data = require("sklearn.datasets", "demo").load_digits()
    split = require("sklearn.model_selection", "demo").train_test_split
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    parts = split(range(len(labels)), test_size=0.3, random_state=0, stratify=data.target)
    train, test = (Digits(images[list(part)], labels[list(part)]) for part in parts)
    return train, test


def train(data: Digits, epochs: int = 6, seed: int = 0) -> DigitNet:
    """A network trained on this data, the same for the same seed and threads; the caller's random state stays."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = DigitNet()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        steps = -(-len(data.labels) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs * steps)
        for _ in tqdm(range(epochs), desc="training on digits", unit="epoch", disable=None, leave=False):
            order = torch.randperm(len(data.labels))
            for start in range(0, len(order), BATCH):
                batch = order[start : start + BATCH]
                loss = cross_entropy(model(data.images[batch]), data.labels[batch])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, data: Digits) -> Tensor:
    """The digit [B] int64 that the model sees in each image."""
    logits: Tensor = model(data.images)
    return logits.argmax(1)


@dataclass(frozen=True)
class Result:
    """One precision of the network on the test images."""

    precision: str
    quantized: float
    """Share of the parameters in NVFP4."""
    weights: int
    """Bytes of parameters and buffers."""
    accuracy: float
    changed: int
    """Test images that fp32 gives another digit."""


def compare(model: nn.Module, test: Digits) -> tuple[Result, ...]:
    """Accuracy of the network in fp32, with NVFP4 weights, and with NVFP4 weights and activations."""
    dense = predict(model, test)

    def result(precision: str, policy: Policy | None) -> Result:
        if policy is None:
            stored = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            return Result(precision, 0.0, stored, float((dense == test.labels).double().mean()), 0)
        packed = quantize(model, policy, test.images[:1])
        seen, stored_as = predict(packed, test), report(packed)
        share = stored_as.quantized / stored_as.numel
        accuracy = float((seen == test.labels).double().mean())
        return Result(precision, share, stored_as.resident, accuracy, int((seen != dense).sum()))

    return (
        result("fp32", None),
        result("W4A16", Policy.weight_only()),
        result("W4A4", Policy.w4a4()),
    )


def table(results: tuple[Result, ...]) -> str:
    """The results for a terminal."""
    rows = [(r.precision, f"{r.quantized:.1%}", r.weights, f"{r.accuracy:.2%}", r.changed) for r in results]
    headers = ("precision", "parameters in NVFP4", "bytes", "test accuracy", "digits changed")
    return str(tabulate(rows, headers, colalign=("left", "right", "right", "right", "right")))
