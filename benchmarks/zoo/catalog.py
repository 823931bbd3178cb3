"""Which models there are, how one is made, and on which inputs it may be tried, the smallest first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import language

SIZES = (64, 96, 128, 160, 192, 224, 256)
"""Sides of images that are tried before a model's own."""
OWN_SIZE = ("image_size", "input_size", "img_size")
"""What builders call the side that a model is made for."""


@dataclass(frozen=True)
class Entry:
    """One model."""

    source: str
    """`timm:NAME`, `torchvision:NAME` or `transformers:NAME`."""
    family: str
    """The file that it is written in."""

    @property
    def name(self) -> str:
        """The name within its package."""
        return self.source.partition(":")[2]


@dataclass(frozen=True)
class Trial:
    """One way to make a model and its inputs."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of the images, one batch per argument; empty where `inputs` makes them."""
    inputs: Callable[[], dict[str, Any]] | None = None
    """Keyword arguments of the forward."""
    detector: bool = False
    """The only argument is a list of images, and what comes back depends on thresholds."""
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the forward, from a fixed seed."""
        generator = torch.Generator().manual_seed(1)
        images = tuple(torch.randn(shape, generator=generator).to(device) for shape in self.shapes)
        if self.detector:
            return ([image.sigmoid() for image in images],), {}
        kwargs = self.inputs() if self.inputs else {}
        return images, {key: x.to(device) if isinstance(x, Tensor) else x for key, x in kwargs.items()}


def entries() -> list[Entry]:
    """All models of the installed packages, torchvision's quantized ones left out."""
    import timm  # noqa: PLC0415  (the workers alone import the packages)
    from torchvision import models  # noqa: PLC0415

    found = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            found[name] = Entry(f"timm:{name}", f"timm/{module}")
    missing = set(timm.list_models()) - set(found)
    assert not missing, f"models of no module: {sorted(missing)}"
    torchvision = [
        Entry(
            f"torchvision:{name}",
            f"torchvision/{models.get_model_builder(name).__module__.removeprefix('torchvision.models.')}",
        )
        for name in models.list_models()
        if not name.startswith("quantized_")
    ]
    own = [Entry(f"transformers:{name}", f"transformers/{name}") for name in language.MODELS]
    return [*own, *torchvision, *(found[name] for name in sorted(found))]


def trials(entry: Entry) -> Iterator[Trial]:
    """Ways to make the model, those with the smallest input first; random weights, evaluation mode is the caller's."""
    package = entry.source.partition(":")[0]
    if package == "transformers":
        make, inputs = language.MODELS[entry.name]
        yield Trial(make, inputs=inputs)
    elif package == "torchvision":
        yield from _torchvision(entry.name)
    else:
        yield from _timm(entry.name)


def _timm(name: str) -> Iterator[Trial]:
    import timm  # noqa: PLC0415

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    channels, height, width = config.input_size if config is not None else (3, 224, 224)
    smaller = [side for side in SIZES if side < height]
    for side in smaller:  # a model that is made for one size may still be made for another
        options = {"img_size": side} if config is not None and config.fixed_input_size else {}
        yield Trial(
            lambda options=options: timm.create_model(name, **options), ((1, channels, side, side),), options=options
        )
    yield Trial(lambda: timm.create_model(name), ((1, channels, height, width),))


def _torchvision(name: str) -> Iterator[Trial]:
    from torchvision import models  # noqa: PLC0415

    builder = models.get_model_builder(name)
    kind = builder.__module__.removeprefix("torchvision.models.")
    parameters = inspect.signature(builder).parameters
    plain: dict[str, Any] = {"weights": None}
    if "weights_backbone" in parameters:
        plain["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        plain["init_weights"] = False  # SciPy's truncated normal takes a minute
    if kind.startswith("detection"):
        small = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 192}
        yield Trial(lambda: builder(**plain, **small), ((3, 128, 160),), detector=True, options=small)
        return
    if kind.startswith("optical_flow"):
        yield Trial(lambda: builder(**plain), ((1, 3, 128, 128),) * 2)
        return
    if kind.startswith("video"):
        for frames, side in ((8, 64), (16, 112), (16, 224)):
            yield Trial(lambda: builder(**plain), ((1, 3, frames, side, side),))
        return
    for side in SIZES:
        key = {"vision_transformer": "image_size", "maxvit": "input_size"}.get(kind)
        own: dict[str, Any] = {} if key is None else {key: side if key == "image_size" else (side, side)}
        yield Trial(lambda own=own: builder(**plain, **own), ((1, 3, side, side),), options=own)
    yield Trial(lambda: builder(**plain), ((1, 3, 299, 299),))
