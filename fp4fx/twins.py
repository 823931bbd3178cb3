"""What another value of a weight changes in the output of the op that reads it, while the model runs on its own.

A mode sees every call of a function of torch. What is computed from parameters and buffers alone (a view, a cast, a
standardised weight) it computes a second time from the parameter's twin; where such a value meets an activation, the
function is called a second time with the twin in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fp4fx.batches import tensors

FORM_ONLY = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
"""Functions that read the form, not the values, of the tensors behind the first."""
GATHERS = frozenset({"__getitem__", "index_select"})
"""Functions that take some matrices of a stack, by the numbers in an activation or not."""


@dataclass(frozen=True, eq=False)
class Difference:
    """One call of a function that reads a weight."""

    parameter: str
    output: Tensor
    """Of the function (the first tensor of several); with gradients, ahead of all in-place ops on it."""
    change: Tensor
    """What the twin makes of the output, less the output; same shape."""


class Twins(TorchFunctionMode):
    """Calls `seen` for each function that reads a parameter with a twin and an activation.

    The projections of `torch.nn.functional.multi_head_attention_forward` are in one function, whose output is
    attention's. What scripted functions do is not seen.

    Args:
        model: Runs in this context, on its own weights, any number of times.
        twins: Parameter (as `named_parameters` has it) -> what stands in its place; same shape.
        inputs: Parameter -> what is done to the activation where the twin reads it (quantizing it, for instance).
        seen: Is given each difference.
    """

    def __init__(
        self,
        model: nn.Module,
        twins: Mapping[str, Tensor],
        inputs: Mapping[str, Callable[[Tensor], Tensor]],
        seen: Callable[[Difference], None],
    ) -> None:
        super().__init__()
        self.inputs, self.seen = inputs, seen
        names = {id(p): name for name, p in model.named_parameters()}
        self.own = {
            id(t): (t, {names[id(t)]: twins[names[id(t)]]} if names.get(id(t)) in twins else {})
            for t in (*model.parameters(), *model.buffers())
        }
        self.known = dict(self.own)
        """id of a tensor that no activation goes into -> it, kept alive, and its twins by parameter."""

    def forget(self) -> None:
        """Let go of what was computed from parameters in the last forward."""
        self.known = dict(self.own)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function, and again for the twins among what it reads."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        read = list(tensors((args, kwargs)))
        read = read[:1] if name in FORM_ONLY or name in GATHERS else read
        parameters = {p for t in read if id(t) in self.known for p in self.known[id(t)][1]}
        if all(id(t) in self.known for t in read):
            if next(tensors(result), None) is not None:
                self._know(result, {p: self._again(func, args, kwargs, p) for p in parameters})
        elif parameters and not _in_place(name):
            return self._tell(func, args, kwargs, result, parameters)
        return result

    def _again(self, func: Callable[..., Any], args: Any, kwargs: Any, parameter: str) -> Any:
        def swap(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.known.get(id(value), (value, {}))[1].get(parameter, value)
            if isinstance(value, (tuple, list)):
                return type(value)(swap(item) for item in value)
            return value

        with torch.no_grad():
            return func(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})

    def _know(self, result: Any, others: Mapping[str, Any]) -> None:
        twins: list[dict[str, Tensor]] = [{} for _ in tensors(result)]
        for parameter, other in others.items():
            for own, twin in zip(twins, tensors(other), strict=True):
                own[parameter] = twin
        for tensor, own in zip(tensors(result), twins, strict=True):
            self.known.setdefault(id(tensor), (tensor, own))

    def _tell(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any, parameters: set[str]) -> Any:
        output = next(_floating(result), None)
        if output is None:
            return result
        if torch.is_grad_enabled():
            output = output if output.requires_grad else output.detach().requires_grad_()
        for parameter in sorted(parameters):
            given = args
            if parameter in self.inputs and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                with torch.no_grad():
                    given = (self.inputs[parameter](args[0]), *args[1:])
            twin = next(_floating(self._again(func, given, kwargs, parameter)))
            self.seen(Difference(parameter, output, twin - output.detach()))
        if not torch.is_grad_enabled():
            return result
        onward = output.clone()  # in-place ops behind it leave the output as it is
        return onward if isinstance(result, Tensor) else (onward, *result[1:])


def _floating(result: Any) -> Iterator[Tensor]:
    return (t for t in tensors(result) if t.is_floating_point())


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")
