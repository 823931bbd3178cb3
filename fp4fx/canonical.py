"""The ATen spelling of a PyTorch call: one table for the symbolic trace and for the graphs of torch.compile.

`torch.nn.functional.linear`, `torch._C._nn.linear` and `torch.ops.aten.linear.default` are one op here, with one order
of arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F

aten = torch.ops.aten

OpOverload = Callable[..., Any]  # the class of `aten.linear.default` has no public name
Call = tuple[OpOverload, tuple[Any, ...]]
REQUIRED = object()  # the default of an argument that has none


def canonical(
    target: Callable[..., Any] | str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[OpOverload, tuple[Any, ...], dict[str, Any]] | None:
    """(target, args, kwargs) of a `call_function` or `call_method` node -> the same call on an ATen overload, or None.

    `target` is a function or a method's name; arguments may be `fx.Node`s. The answer's arguments are all positional,
    in the schema's order, with defaults filled in and integers widened to one per spatial dimension. None means that
    the call has no entry or no equal ATen call, and that it should be left as it is.
    """
    python = METHODS.get(target) if isinstance(target, str) else FUNCTIONS.get(target)
    if python is None:
        return None
    if python.variadic and len(args) > 2:
        args = (args[0], tuple(args[1:]))
    if len(args) > len(python.arguments) or not kwargs.keys() <= python.arguments.keys():
        return None
    bound = {**python.arguments, **dict(zip(python.arguments, args, strict=False)), **kwargs}
    call = None if any(value is REQUIRED for value in bound.values()) else python.spell(bound)
    return None if call is None else (*call, {})


class Python(NamedTuple):
    """How Python spells an op: its arguments in order with their defaults, and the ATen call for a value of each."""

    arguments: Mapping[str, Any]
    spell: Callable[[dict[str, Any]], Call | None]
    variadic: bool = False
    """True if `f(x, a, b)` stands for `f(x, (a, b))`."""


def _ints(value: Any, rank: int) -> list[Any]:
    """One value per spatial dimension of an int, a SymInt's node, or a sequence of 1 or `rank` of them."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * rank if len(values) == 1 else values


def _conv(rank: int, op: OpOverload, padded: OpOverload) -> Python:
    def spell(a: dict[str, Any]) -> Call:
        named = isinstance(a["padding"], str)
        padding = a["padding"] if named else _ints(a["padding"], rank)
        stride, dilation = _ints(a["stride"], rank), _ints(a["dilation"], rank)
        return (padded if named else op), (a["input"], a["weight"], a["bias"], stride, padding, dilation, a["groups"])

    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return Python({"input": REQUIRED, "weight": REQUIRED, "bias": None, **defaults}, spell)


def _conv_transpose(rank: int, op: OpOverload) -> Python:
    def spell(a: dict[str, Any]) -> Call:
        spatial = (_ints(a[name], rank) for name in ("stride", "padding", "output_padding"))
        return op, (a["input"], a["weight"], a["bias"], *spatial, a["groups"], _ints(a["dilation"], rank))

    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    return Python({"input": REQUIRED, "weight": REQUIRED, "bias": None, **defaults}, spell)


def _embedding(a: dict[str, Any]) -> Call | None:
    padding_idx = -1 if a["padding_idx"] is None else a["padding_idx"]
    if a["max_norm"] is not None:  # rewrites the table in place on every call
        return None
    if a["padding_idx"] is not None and padding_idx < 0:  # counts from the end, where ATen's -1 means "none"
        return None
    return aten.embedding.default, (a["weight"], a["input"], padding_idx, a["scale_grad_by_freq"], a["sparse"])


def _per_channel_norm(op: OpOverload, mean: Any, training: Mapping[str, bool]) -> Python:
    def spell(a: dict[str, Any]) -> Call:
        statistics = (a["running_mean"], a["running_var"], *(a[name] for name in training), a["momentum"], a["eps"])
        return op, (a["input"], a["weight"], a["bias"], *statistics, torch.backends.cudnn.enabled)

    affine = {"running_mean": mean, "running_var": mean, "weight": None, "bias": None}
    return Python({"input": REQUIRED, **affine, **training, "momentum": 0.1, "eps": 1e-5}, spell)


def _layer_norm(a: dict[str, Any]) -> Call:
    shape = list(a["normalized_shape"])
    return aten.layer_norm.default, (a["input"], shape, a["weight"], a["bias"], a["eps"], torch.backends.cudnn.enabled)


def _group_norm(a: dict[str, Any]) -> Call:
    enabled = torch.backends.cudnn.enabled
    return aten.group_norm.default, (a["input"], a["num_groups"], a["weight"], a["bias"], a["eps"], enabled)


def _sized(op: OpOverload, name: str) -> Python:
    def spell(a: dict[str, Any]) -> Call | None:
        sizes = a[name]
        if isinstance(sizes, (torch.fx.Node, torch.dtype)):  # one size or a whole shape? the node does not say
            return None
        return op, (a["input"], list(sizes) if isinstance(sizes, (tuple, list)) else [sizes])

    return Python({"input": REQUIRED, name: REQUIRED}, spell, variadic=True)


def _same(op: OpOverload, **more: Any) -> Python:
    """An op whose arguments stand in the same order in Python and in ATen; named dimensions have no ATen equal."""

    def spell(a: dict[str, Any]) -> Call | None:
        return None if any(isinstance(value, str) for value in a.values()) else (op, tuple(a.values()))

    return Python({"input": REQUIRED, **more}, spell)


def _attribute(a: dict[str, Any]) -> Call | None:
    op = {"T": aten.numpy_T.default, "mT": aten.mT.default}.get(a["name"])
    return None if op is None else (op, (a["input"],))


def _contiguous(a: dict[str, Any]) -> Call | None:
    return (aten.contiguous.default, (a["input"],)) if a["memory_format"] is torch.contiguous_format else None


def _split(a: dict[str, Any]) -> Call:
    value, sizes, dim = a.values()
    if isinstance(sizes, (tuple, list)):
        return aten.split_with_sizes.default, (value, list(sizes), dim)
    return aten.split.Tensor, (value, sizes, dim)


METHODS: Mapping[str, Python] = {
    "chunk": _same(aten.chunk.default, chunks=REQUIRED, dim=0),
    "contiguous": Python({"input": REQUIRED, "memory_format": torch.contiguous_format}, _contiguous),
    "flatten": _same(aten.flatten.using_ints, start_dim=0, end_dim=-1),
    "permute": _sized(aten.permute.default, "dims"),
    "reshape": _sized(aten.reshape.default, "shape"),
    "split": Python({"input": REQUIRED, "split_size": REQUIRED, "dim": 0}, _split),
    "t": _same(aten.t.default),
    "transpose": _same(aten.transpose.int, dim0=REQUIRED, dim1=REQUIRED),
    "unbind": _same(aten.unbind.int, dim=0),
    "view": _sized(aten.view.default, "size"),
}
"""Methods of `Tensor` that are views."""

FUNCTIONS: Mapping[Callable[..., Any], Python] = {
    F.linear: _same(aten.linear.default, weight=REQUIRED, bias=None),
    F.conv1d: _conv(1, aten.conv1d.default, aten.conv1d.padding),
    F.conv2d: _conv(2, aten.conv2d.default, aten.conv2d.padding),
    F.conv3d: _conv(3, aten.conv3d.default, aten.conv3d.padding),
    F.conv_transpose1d: _conv_transpose(1, aten.conv_transpose1d.default),
    F.conv_transpose2d: _conv_transpose(2, aten.conv_transpose2d.input),
    F.conv_transpose3d: _conv_transpose(3, aten.conv_transpose3d.input),
    F.embedding: Python(
        {
            "input": REQUIRED,
            "weight": REQUIRED,
            "padding_idx": None,
            "max_norm": None,
            "norm_type": 2.0,
            "scale_grad_by_freq": False,
            "sparse": False,
        },
        _embedding,
    ),
    torch.embedding_bag: _same(
        aten.embedding_bag.padding_idx,
        indices=REQUIRED,
        offsets=REQUIRED,
        scale_grad_by_freq=False,
        mode=0,
        sparse=False,
        per_sample_weights=None,
        include_last_offset=False,
        padding_idx=None,
    ),
    F.bilinear: _same(aten.bilinear.default, input2=REQUIRED, weight=REQUIRED, bias=None),
    F.layer_norm: Python(
        {"input": REQUIRED, "normalized_shape": REQUIRED, "weight": None, "bias": None, "eps": 1e-5}, _layer_norm
    ),
    F.group_norm: Python(
        {"input": REQUIRED, "num_groups": REQUIRED, "weight": None, "bias": None, "eps": 1e-5}, _group_norm
    ),
    F.rms_norm: _same(aten.rms_norm.default, normalized_shape=REQUIRED, weight=None, eps=None),
    torch.rms_norm: _same(aten.rms_norm.default, normalized_shape=REQUIRED, weight=None, eps=None),
    F.batch_norm: _per_channel_norm(aten.batch_norm.default, REQUIRED, {"training": False}),
    F.instance_norm: _per_channel_norm(aten.instance_norm.default, None, {"use_input_stats": True}),
    getattr: Python({"input": REQUIRED, "name": REQUIRED}, _attribute),
    torch.chunk: _same(aten.chunk.default, chunks=REQUIRED, dim=0),
    torch.flatten: _same(aten.flatten.using_ints, start_dim=0, end_dim=-1),
    torch.permute: _sized(aten.permute.default, "dims"),
    torch.reshape: _sized(aten.reshape.default, "shape"),
    torch.split: Python({"tensor": REQUIRED, "split_size_or_sections": REQUIRED, "dim": 0}, _split),
    torch.t: _same(aten.t.default),
    torch.transpose: _same(aten.transpose.int, dim0=REQUIRED, dim1=REQUIRED),
    torch.unbind: _same(aten.unbind.int, dim=0),
}
"""Functions that have an ATen equal; `F.linear` and `F.conv2d` are the builtins that Dynamo puts into its graphs."""
