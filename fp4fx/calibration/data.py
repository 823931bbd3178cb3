"""Calibration data: what a user gives, checked, and run through a model batch by batch."""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fp4fx.errors import CalibrationError, Error
from fp4fx.symbolic import UNTRACEABLE, one_line

MAPPED, KEPT = 1 << 20, 1 << 25
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


class Enough(Exception):  # noqa: N818  (it is no error: an observer raises it to end a forward)
    """What is to be seen of a forward has been seen."""


class Batches:
    """Inputs that can be read more than once, each checked as it is read.

    Raises:
        CalibrationError: `batches` is no iterable of inputs; while it is read: it is empty, or a batch holds a NaN, no
            values, or a tensor on another device than the model.
    """

    def __init__(self, batches: Iterable[Batch], model: nn.Module) -> None:
        if isinstance(batches, (Tensor, Mapping, str, bytes)) or not hasattr(batches, "__iter__"):
            found = f"one {type(batches).__name__}"
            raise CalibrationError(f"batches: found {found}, expected an iterable of inputs; pass a list of them")
        self.batches = batches
        self.devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
        self.once = iter(batches) is batches
        """Whether it can be read once only."""

    @cached_property
    def count(self) -> int:
        """How many there are."""
        try:
            return len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            return 1 if self.once else sum(1 for _ in self.batches)

    def __len__(self) -> int:
        """How many there are, for a progress bar; of an iterator that is not known."""
        if self.once:
            raise TypeError("an iterator has no length")
        return self.count

    @cached_property
    def first(self) -> Batch:
        """The first of them."""
        return next(iter(self))

    def __iter__(self) -> Iterator[Batch]:
        number = -1
        for number, batch in enumerate(self.batches):
            check(batch, f"batch {number}", self.devices)
            yield batch
        if number < 0:
            raise CalibrationError("batches: found none, expected at least one input of the model")


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of the forward on one batch."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def check(batch: Batch, where: str, devices: Collection[torch.device]) -> None:
    """Refuse a batch on none of the devices, without values, or with a NaN (an Inf may be part of a mask).

    Raises:
        CalibrationError: naming the batch.
    """
    args, kwargs = arguments(batch)
    for value in chain(args, kwargs.values()):
        if not isinstance(value, Tensor):
            continue
        if value.device not in devices:
            on = ", ".join(sorted(map(str, devices)))
            raise CalibrationError(
                f"{where}: found a tensor on {value.device}, expected {on}, as the model is; move it"
            )
        if value.numel() == 0:
            raise CalibrationError(f"{where}: found a tensor of shape {tuple(value.shape)}, expected values in it")
        if value.is_floating_point() and (bad := int(value.isnan().sum())):
            raise CalibrationError(f"{where}: found {bad} NaN in {value.numel()} values, expected none; clean the data")


@torch.no_grad()
def forward(model: nn.Module, batch: Batch, name: str = "batch") -> None:
    """Run the model on one batch, up to where an observer has `Enough`.

    Raises:
        CalibrationError: the model does not take the batch.
    """
    try:
        run(model, batch, name)
    except Enough as end:
        traceback.clear_frames(end.__traceback__)  # their locals are the activations of the whole forward
    finally:
        give_memory_back()


def give_memory_back() -> None:
    """Return what was freed to the system: glibc keeps it, in pieces that large tensors do not fit."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def large_tensors_mapped() -> Iterator[None]:
    """In this context glibc gives memory of `MAPPED` bytes or more to the system as soon as it is free.

    Without it the limit grows to the largest block that was ever freed, up to `KEPT`, which is where it is left: of
    activations that come and go, about as much again lies in pieces between them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    try:
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, MAPPED)
        yield
    finally:
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, KEPT)
            mallopt(_TRIM_THRESHOLD, 2 * KEPT)


def run(model: nn.Module, batch: Batch, name: str = "batch") -> Any:
    """What the model gives for one batch.

    Raises:
        CalibrationError: the model does not take the batch.
    """
    args, kwargs = arguments(batch)
    try:
        return model(*args, **kwargs)
    except Error:
        raise
    except UNTRACEABLE as error:
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in chain(args, kwargs.values())]
        raise CalibrationError(
            f"{name}: the model does not run on inputs {shapes}: {one_line(error)}; expected a tensor, a tuple of the "
            "forward's arguments or a dict of its keywords, without labels"
        ) from error


def several(method: str, batches: Batches | None) -> int:
    """The number of passes of a method that needs more than one.

    Raises:
        CalibrationError: there is no data.
    """
    if batches is None:
        raise CalibrationError(
            f"{method}: found no batches, expected inputs of the model; pass some, 100 samples or more"
        )
    return 2
