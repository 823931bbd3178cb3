"""The calls that an epilogue is made of, in every spelling: function, method, operator, overload, in place or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import Node

from fp4fx.capture import OpOverload
from fp4fx.dataflow import TRANSPOSES, op_name, permutation


def _name(node: Node) -> str | None:
    """The name of a call of PyTorch or Python's operators, without the mark of an in-place one; None for any other."""
    if node.op == "call_function" and not isinstance(node.target, OpOverload):
        module = getattr(node.target, "__module__", None) or ""
        if module.partition(".")[0] not in ("torch", "_operator"):
            return None
    elif node.op not in ("call_function", "call_method"):
        return None
    if isinstance(node.target, OpOverload) and node.target.namespace != "aten":
        return None
    name = op_name(node)
    name = {"iadd": "add", "imul": "mul"}.get(name, name)
    return name.removesuffix("_")


def _options(node: Node, *names: str) -> dict[str, Any]:
    """What a call is given after its first argument, by name; `inplace` is left out."""
    given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    given.pop("inplace", None)
    return given


def _bounds(node: Node, low: str, high: str) -> tuple[Any, Any]:
    given = _options(node, low, high)
    return given.get(low), given.get(high)


def _clamp(low: Any, high: Any) -> str | None:
    if low is None or isinstance(low, Node) or isinstance(high, Node) or low != 0:
        return None
    return "relu" if high is None else "relu6" if high == 6 else None


def _gelu(node: Node) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(_options(node, "approximate").get("approximate", "none"))


_ACTIVATIONS: Mapping[str, Callable[[Node], str | None]] = {
    **{name: lambda _, name=name: name for name in ("relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid")},  # type: ignore[misc]
    "gelu": _gelu,
    "hardtanh": lambda node: _clamp(*_bounds(node, "min_val", "max_val")),
    "clamp": lambda node: _clamp(*_bounds(node, "min", "max")),
    "clip": lambda node: _clamp(*_bounds(node, "min", "max")),
    "clamp_min": lambda node: _clamp(_bounds(node, "min", "max")[0], None),
}


def activation_of(node: Node, x: Node) -> str | None:
    """The activation, as the ops name it, that a call applies to x; None if it is no such call."""
    name = _name(node)
    if name is None or name not in _ACTIVATIONS or not node.args or node.args[0] is not x or "out" in node.kwargs:
        return None
    return _ACTIVATIONS[name](node)


def operands_of(node: Node, x: Node) -> tuple[str, Any] | None:
    """("add" or "mul", the other operand) of a sum or product with x; None if it is neither, or writes into another."""
    name = _name(node)
    if name not in ("add", "mul") or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if first is x:
        return name, second
    in_place = str(op_name(node)) in ("iadd", "imul") or op_name(node).endswith("_")
    return (name, first) if second is x and not in_place else None


def permutation_of(node: Node, rank: int) -> tuple[int, ...] | None:
    """The dims of a permutation or transposition of its first argument, not negative; None if it is none."""
    return permutation(node, rank) if _name(node) in TRANSPOSES else None


def is_identity(node: Node) -> bool:
    """Whether a call is a dropout that drops nothing."""
    if _name(node) not in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"):
        return False
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
    return training is False


def inverse(dims: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes another."""
    return tuple(dims.index(d) for d in range(len(dims)))


def is_trivial(dims: tuple[int, ...]) -> bool:
    """Whether a permutation moves nothing."""
    return dims == tuple(range(len(dims)))
