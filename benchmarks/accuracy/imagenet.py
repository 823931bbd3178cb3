"""timm's models on a folder of images with a folder for each class, as ImageNet's validation part is laid out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

from benchmarks.accuracy.measure import Task
from fp4fx import models

CALIBRATION = 128
"""Images, spread over the classes, that methods may look at; the others are the test."""
BATCH = 32


class Loaded:
    """Batches of a dataset, read from its files every time."""

    def __init__(self, dataset: Dataset[tuple[Tensor, int]]) -> None:
        self.loader = DataLoader(dataset, BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)


def task(folder: Path, name: str, *, pretrained: bool = True, limit: int | None = None) -> Task:
    """A model of timm on a folder of images, resized, cropped and normalised as its weights expect them.

    Args:
        folder: with one folder per class, named by WordNet id; or as many folders as the model has classes, in order.
        name: of the model, with or without the tag of its weights.
        pretrained: with its trained weights; random ones only try the code out.
        limit: test images, spread over the classes; all if None.

    Raises:
        fp4fx.HubError: the weights are out of reach.
        SystemExit: the folder does not fit the model.
    """
    torch.manual_seed(0)
    model = models.create(f"timm:{name}", pretrained=pretrained).requires_grad_(False)
    images = ImageFolder(str(folder), create_transform(**resolve_model_data_config(model), is_training=False))
    images.target_transform = _classes(model, images.classes, folder).__getitem__
    if len(images) <= CALIBRATION:
        raise SystemExit(f"{folder}: found {len(images)} images, expected more than the {CALIBRATION} to calibrate on")
    seen = set(_spread(len(images), CALIBRATION))
    rest = [index for index in range(len(images)) if index not in seen]
    rest = [rest[place] for place in _spread(len(rest), limit or len(rest))]
    calibration = [inputs for inputs, _ in Loaded(Subset(images, sorted(seen)))]
    return Task(name, 0, model, Loaded(Subset(images, rest)), calibration, "accuracy")


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` places of `count`, evenly apart."""
    wanted = min(wanted, count)
    return [place * count // wanted for place in range(wanted)]


def _classes(model: nn.Module, folders: list[str], path: Path) -> list[int]:
    """The model's class of every folder."""
    subset = infer_imagenet_subset(model)
    labels = ImageNetInfo(subset).label_names() if subset else []
    places = {label: place for place, label in enumerate(labels)}
    if all(name in places for name in folders):
        return [places[name] for name in folders]
    count = int(getattr(model, "num_classes", 0))
    if len(folders) == count:
        return list(range(count))
    raise SystemExit(
        f"{path}: found {len(folders)} folders, the first is {folders[0]!r}; expected WordNet ids such as n01440764, "
        f"or the {count} classes of the model in order"
    )
