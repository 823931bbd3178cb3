"""Real data that packages bring along: handwritten digits, photographs, text. The same in every run."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import skimage.data
import sklearn.datasets
import torch
import torch.nn.functional as F
from torch import Tensor

from fp4fx import digits

SIDE = 32
"""Of a digit's image in pixels; scikit-learn's are 8x8 and sampled anew."""
SCENE = 64
"""Side of a composite."""
CONTEXT = 128
"""Characters that the language model sees."""
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
PICTURES = {"train": ("flower.jpg", "astronaut", "coffee", "motorcycle"), "test": ("china.jpg", "chelsea", "rocket")}
SIZES = {"train": (10_000, 2_000, 16_000), "test": (4_000, 400, 256)}
"""Digits, composites and texts of each part."""


@dataclass(frozen=True)
class Data:
    """Inputs [N, ...] and the class of every output [N, ...] int64."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: slice | Tensor) -> Data:
        return Data(self.inputs[index], self.targets[index])

    def batches(self, size: int) -> list[Tensor]:
        """The inputs in parts of up to `size`."""
        return list(self.inputs.split(size))


@functools.cache
def numbers(part: str) -> Data:
    """Distorted, noisy digits fp32 [N, 1, 32, 32] and their labels [N]; the parts are made from different images."""
    generator = _generator(part)
    count = SIZES[part][0]
    images, labels = _distorted(part, count, generator)
    contrast = _uniform((count, 1, 1, 1), 0.6, 1.0, generator)
    noise = torch.randn(images.shape, generator=generator) * 0.2
    return Data(images * contrast + noise - 0.2, labels)


@functools.cache
def scenes(part: str) -> Data:
    """Photographs with one to three digits on them, fp32 [N, 3, 64, 64], and where those are, int64 [N, 64, 64].

    A digit has one of eight colours and lets little through; a pixel is its own where the stroke covers half of it.
    """
    generator = _generator(part)
    count = SIZES[part][1]
    pictures = _pictures(part)
    strokes, _ = _distorted(part, 3 * count, generator)
    images, masks = torch.empty(count, 3, SCENE, SCENE), torch.zeros(count, SCENE, SCENE, dtype=torch.int64)
    for index in range(count):
        picture = pictures[_integer(len(pictures), generator)]
        top, left = (_integer(size - SCENE, generator) for size in picture.shape[1:])
        images[index] = picture[:, top : top + SCENE, left : left + SCENE]
        for stroke in strokes[3 * index : 3 * index + 1 + _integer(3, generator), 0]:
            top, left = (_integer(SCENE - SIDE, generator) for _ in range(2))
            window = (slice(top, top + SIDE), slice(left, left + SIDE))
            opacity = (2 * stroke - 0.5).clamp(0, 1) * _uniform((1,), 0.8, 1.0, generator)
            colour = torch.randint(2, (3, 1, 1), generator=generator).float()
            images[index][:, *window] = images[index][:, *window].lerp(colour.expand(3, SIDE, SIDE), opacity)
            masks[index][window] |= stroke > 0.5
    return Data(images * 2 - 1, masks)


@functools.cache
def texts(part: str) -> Data:
    """Text as indices into the alphabet, int64 [N, 128], and the character after each, int64 [N, 128]."""
    characters = _characters(part)
    length = CONTEXT + 1
    count = min(SIZES[part][2], len(characters) // length)
    lines = characters[: count * length].view(count, length)
    return Data(lines[:, :-1], lines[:, 1:])


def _generator(part: str) -> torch.Generator:
    return torch.Generator().manual_seed(sorted(SIZES).index(part))


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _integer(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))


def _distorted(part: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits of a part, turned, scaled and shifted at random, fp32 [count, 1, 32, 32] in 0..1, and their labels."""
    train, test = digits.load()
    source = {"train": train, "test": test}[part]
    which = torch.randint(len(source.labels), (count,), generator=generator)
    angle = _uniform((count,), -0.25, 0.25, generator)
    scale = _uniform((count,), 0.9, 1.3, generator)
    shift = _uniform((count, 2), -0.15, 0.15, generator)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(count, 2, 3)
    grid = F.affine_grid(theta, [count, 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(source.images[which], grid, align_corners=False), source.labels[which]


def _pictures(part: str) -> list[Tensor]:
    """The photographs of a part at three sizes, fp32 [3, H, W] in 0..1."""
    pictures = []
    for name in PICTURES[part]:
        if name.endswith(".jpg"):
            array = sklearn.datasets.load_sample_image(name)
        elif name == "motorcycle":
            array = skimage.data.stereo_motorcycle()[0]
        else:
            array = getattr(skimage.data, name)()
        image = torch.tensor(array[..., :3]).permute(2, 0, 1)[None] / 255
        for height in (96, 144, 216):
            size = height, math.ceil(image.shape[3] * height / image.shape[2])
            pictures.append(F.interpolate(image, size, mode="bilinear", antialias=True)[0])
    return pictures


@functools.cache
def _characters(part: str) -> Tensor:
    """Docstrings of scikit-learn and the licences of what this runs on, every tenth of them for testing, int64 [N]."""
    documents = sorted({*_docstrings("sklearn"), *_licences("torch", "numpy", "scikit-learn")})
    chosen = [text for index, text in enumerate(documents) if (index % 10 == 0) == (part == "test")]
    order = torch.randperm(len(chosen), generator=_generator(part)).tolist()
    index = {character: place for place, character in enumerate(ALPHABET)}
    text = "\n\n".join(chosen[place] for place in order)
    return torch.tensor([index[character] for character in text if character in index])


def _docstrings(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    files = sorted(Path(spec.origin).parent.rglob("*.py"))
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [text for node in nodes if isinstance(node, kinds) and len(text := ast.get_docstring(node) or "") > 200]


def _licences(*packages: str) -> list[str]:
    files = [file for package in packages for file in importlib.metadata.files(package) or ()]
    found = sorted(str(file.locate()) for file in files if file.name.upper().startswith(("LICENSE", "COPYING")))
    return [Path(path).read_text("utf-8", errors="ignore") for path in found if not path.endswith(".py")]
