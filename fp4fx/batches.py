"""Batches of data one after the other, with or without what a loss compares the output with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fp4fx.calibration.data import Batches, arguments, check, run
from fp4fx.errors import CalibrationError


@dataclass(frozen=True, eq=False)
class Batch:
    """The inputs of one forward."""

    number: int
    """Which of the batches it is, from 0."""
    inputs: Any
    """A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""
    target: Any = None
    """What the loss compares the output with; None without a loss."""

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, as `fp4fx.quantize` takes them."""
        return arguments(self.inputs)

    def run(self, model: nn.Module) -> Any:
        """The model's output.

        Raises:
            CalibrationError: the model does not take these inputs, or gives NaN for them.
        """
        output = run(model, self.inputs, f"batch {self.number}")
        if any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors(output)):
            raise CalibrationError(
                f"batch {self.number}: found NaN in the model's output, expected numbers; leave this batch out, or "
                "repair the model"
            )
        return output


def checked(batches: Any, model: nn.Module, *, targets: bool = False) -> Iterator[Batch]:
    """The batches, each checked when its turn comes.

    Args:
        batches: an iterable of inputs (a tensor, a tuple or list of positional arguments, or a dictionary of keyword
            arguments), or of pairs (inputs, target) with `targets`.
        model: whose device the tensors must be on, in evaluation mode.
        targets: a batch is a pair.

    Raises:
        CalibrationError: there is no batch; or one is of another form, empty, has a NaN, or is on another device.
    """
    if model.training:
        raise CalibrationError("found a model in training mode, expected evaluation; call model.eval()")
    read = Batches(batches, model)
    for number, item in enumerate(read):
        inputs, target = _pair(item, number) if targets else (item, None)
        check(inputs, f"batch {number}", read.devices)
        yield Batch(number, inputs, target)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)


def _pair(item: Any, number: int) -> tuple[Any, Any]:
    if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, Sequence) else ""
        raise CalibrationError(
            f"batch {number}: found {type(item).__name__}{size}, expected a pair (inputs, target), as a loss is given"
        )
    return item[0], item[1]
