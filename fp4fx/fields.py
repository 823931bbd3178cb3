"""Dataclasses from plain JSON values, every type checked against the annotations."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fp4fx.errors import PlanError

T = TypeVar("T")


def read(cls: type[T], data: Any, where: str) -> T:
    """An instance of the dataclass `cls`, nested ones included; lists become tuples; PlanError names the place."""
    if not isinstance(data, Mapping):
        raise PlanError(f"{where}: found {data!r}, expected a mapping with the fields of {cls.__name__}")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = [name for name in data if name not in known]
    missing = [f.name for f in known.values() if f.default is MISSING and f.name not in data]
    if unknown or missing:
        raise PlanError(f"{where}: unknown fields {unknown}, missing fields {missing}; expected {list(known)}")
    hints = get_type_hints(cls)
    return cls(**{name: _value(value, hints[name], f"{where}.{name}") for name, value in data.items()})


def _value(value: Any, hint: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # The only unions in our dataclasses are `X | None`.
        return None if value is None else _value(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        good = any(type(value) is type(a) and value == a for a in args)
    elif origin is tuple:
        if isinstance(value, list | tuple):
            hints = [args[0]] * len(value) if args[-1] is ... else list(args)
            if len(hints) == len(value):
                return tuple(_value(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, hints, strict=True)))
        good = False
    elif isinstance(value, hint):
        good = hint is bool or not isinstance(value, bool)
    elif is_dataclass(hint):
        return read(hint, value, where)  # type: ignore[arg-type]
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    else:
        good = False
    if not good:
        raise PlanError(f"{where}: found {value!r}, expected {hint}")
    return value
