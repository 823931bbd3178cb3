"""Batches of data as a user has them -> arguments of a model's forward, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fp4fx.errors import CalibrationError

FORM = "a tensor, a tuple of positional arguments or a dictionary of keyword arguments"


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of one forward."""

    number: int
    """Which of the batches it is, from 0."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Any = None
    """What the loss compares the output with; None without a loss."""

    def run(self, model: nn.Module) -> Any:
        """The model's output.

        Raises:
            CalibrationError: the model does not take these arguments, or gives NaN for them.
        """
        try:
            output = model(*self.args, **self.kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors((self.args, self.kwargs)))
            reason = str(error).strip().partition("\n")[0]
            raise CalibrationError(
                f"batch {self.number}: the model fails on inputs of shape {shapes}: {type(error).__name__}: {reason}; "
                "give what its forward takes"
            ) from error
        for tensor in tensors(output):
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise CalibrationError(
                    f"batch {self.number}: found NaN in the model's output, expected numbers; leave this batch out, or "
                    "repair the model"
                )
        return output


def checked(batches: Any, model: nn.Module, *, targets: bool = False) -> Iterator[Batch]:
    """The batches one after the other, each checked when its turn comes.

    Args:
        batches: an iterable of inputs (a tensor, a tuple or list of positional arguments, or a dictionary of keyword
            arguments), or of pairs (inputs, target) with `targets`; a tensor alone is one batch.
        model: whose device the tensors must be on, in evaluation mode.
        targets: a batch is a pair.

    Raises:
        CalibrationError: there is no batch; or one is of another form, empty, has a NaN, or is on another device.
    """
    if model.training:
        raise CalibrationError("found a model in training mode, expected evaluation; call model.eval()")
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping)):
        raise CalibrationError(f"batches: found {type(batches).__name__}, expected an iterable; each item is {FORM}")
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    number = -1
    for number, item in enumerate([batches] if isinstance(batches, Tensor) else batches):
        inputs, target = _pair(item, number) if targets else (item, None)
        batch = _arguments(inputs, number, target)
        _check(batch, devices)
        yield batch
    if number < 0:
        raise CalibrationError("batches: found none, expected one or more; an iterator that was read before is empty")


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def _pair(item: Any, number: int) -> tuple[Any, Any]:
    if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, Sequence) else ""
        raise CalibrationError(
            f"batch {number}: found {type(item).__name__}{size}, expected a pair (inputs, target), as a loss is given"
        )
    return item[0], item[1]


def _arguments(inputs: Any, number: int, target: Any) -> Batch:
    if isinstance(inputs, Tensor):
        return Batch(number, (inputs,), {}, target)
    if isinstance(inputs, Mapping):
        return Batch(number, (), dict(inputs), target)
    if isinstance(inputs, (tuple, list)):
        return Batch(number, tuple(inputs), {}, target)
    raise CalibrationError(f"batch {number}: found {type(inputs).__name__}, expected {FORM}")


def _check(batch: Batch, devices: Iterable[Any]) -> None:
    found = list(tensors((batch.args, batch.kwargs)))
    if not found or not all(t.numel() for t in found):
        shapes = ", ".join(str(tuple(t.shape)) for t in found) or "no tensor"
        raise CalibrationError(f"batch {batch.number}: found {shapes}, expected tensors that are not empty")
    for tensor in found:
        if tensor.device not in devices:
            where = ", ".join(sorted(map(str, devices)))
            raise CalibrationError(
                f"batch {batch.number}: found a tensor on {tensor.device}, the model is on {where}; move one of them"
            )
        if tensor.is_floating_point() and (bad := int(tensor.isnan().sum())):
            raise CalibrationError(
                f"batch {batch.number}: found {bad} NaN among {tensor.numel()} values of a tensor of shape "
                f"{tuple(tensor.shape)}, expected none; repair the data or leave this batch out"
            )
