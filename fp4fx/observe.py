"""What the ops of a running model read and gave, by site: found by following data, so that any module will do.

Below autograd every linear is a product of matrices (`mm`, `addmm`, `bmm`) and every convolution `aten.convolution`. A
mode sees each of these calls and knows its weight by the memory it is in: that of a parameter, of what was computed
from parameters and buffers alone, or of what `fp4fx::dequantize` gave for a packed parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fp4fx.capture import DispatchMode
from fp4fx.packed import Packed
from fp4fx.site import Site

aten = torch.ops.aten

PRODUCTS = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.mv.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
    aten.addmv.default: 1,
}
"""Products of two matrices, with the place of the left one; ahead of it is what they are added to."""
EMBEDDINGS = frozenset({aten.embedding.default, aten._embedding_bag.default, aten._embedding_bag_forward_only.default})
GEOMETRY = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a compute op."""

    site: Site
    """Whose weight it read; of several uses of one parameter by the same kind of op, the first."""
    x: Tensor
    """The activation as the op read it: linear [..., M, K], convolution [B, C, *s], embedding int [...]."""
    weight: Tensor
    """The weight as the op read it: linear [..., N, K], otherwise in the parameter's own form."""
    output: Tensor
    """Linear [..., M, N], convolution [B, N, *s'], embedding [..., D] (of a bag, its sums)."""
    start: int
    """The first row of the parameter (as `nvfp4.to_rows` has them) that `weight` holds; 0 but for a part of a stack."""
    arguments: Mapping[str, Any]
    """What else the op was given: `bias` (a tensor or None), and the geometry of a convolution by its ATen names."""

    def again(self, weight: Tensor, x: Tensor | None = None) -> Tensor:
        """What the op gives with another weight of the same form, and another activation if there is one.

        Of an embedding only plain look-ups can be made again.
        """
        x = self.x if x is None else x
        if "stride" in self.arguments:
            bias, *geometry = (self.arguments[name] for name in ("bias", *GEOMETRY))
            return torch.convolution(x, weight, bias, *geometry)
        if self.site.op == "embedding":
            return nn.functional.embedding(x, weight)
        y, bias = x @ weight.mT, self.arguments["bias"]
        return y if bias is None else y + bias


@contextmanager
def observe(model: nn.Module, sites: Iterable[Site], seen: Callable[[Call], Tensor | None]) -> Iterator[None]:
    """Call `seen` after each op that reads the weight of one of the sites, while the model runs in this context.

    A tensor that `seen` returns takes the place of the output; an exception from it ends the forward. Works on dense
    and on packed models in eager mode; what is inside a compiled graph is not seen, and neither is an op whose weight
    is made from several sites or depends on data. PyTorch's fused attention is closed meanwhile.

    Args:
        model: The module that is going to run, or one that holds it.
        sites: Sites of its trace, by their parameters; one that is not there is never seen.
        seen: Is given each call.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _Observer(model, sites, seen):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _Observer(DispatchMode):
    """Knows of memory what it was computed from, where that is parameters and buffers alone."""

    def __init__(self, model: nn.Module, sites: Iterable[Site], seen: Callable[[Call], Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen
        self.sites: dict[str, list[Site]] = {}
        for site in sites:
            self.sites.setdefault(site.parameter, []).append(site)
        self.origins = {_memory(t): frozenset[str]() for t in (*model.parameters(), *model.buffers())}
        """The sites' parameters that the values in a storage come from; a storage with other values is not in it."""
        self.bound = 2 * len(self.origins) + 1000
        self.offsets: dict[str, int] = {}
        for name in self.sites:
            stored = _stored(model, name)
            if stored is not None:
                self.origins[_memory(stored)] = frozenset({name})
                self.offsets[name] = 0 if stored.dtype == torch.uint8 else int(stored.storage_offset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # under inference_mode a composition arrives whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if func in PRODUCTS:
            return self._product(PRODUCTS[func], args, kwargs, result)
        if func is aten.convolution.default:
            x, weight, bias, *geometry = args
            arguments = {"bias": bias, **dict(zip(GEOMETRY, geometry, strict=True))}
            replaced = self._tell("conv", x, weight, result, arguments)
        elif func in EMBEDDINGS:
            weight, x = args[:2]
            output = result if isinstance(result, Tensor) else result[0]
            replaced = self._tell("embedding", x, weight, output, {"bias": None})
            if not isinstance(result, Tensor):
                return result if replaced is None else (replaced, *result[1:])
        else:
            self._follow(func, (*args, *kwargs.values()), result)
            return result
        return result if replaced is None else replaced

    def _product(self, place: int, args: Any, kwargs: Any, result: Tensor) -> Tensor:
        """A product of which one factor is a weight; the other way round if it is the left one."""
        left, right = args[place : place + 2]
        bias = args[0] if place else None
        scaled = kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1
        if scaled or (self._origin(left) is None) == (self._origin(right) is None):
            self._follow(None, args, result)
            return result
        output = result
        if right.dim() == 1:
            right, output = right.unsqueeze(-1), result.unsqueeze(-1)
            bias = None if bias is None else bias.unsqueeze(-1)
        x, weight = left, right.mT
        is_left = self._origin(left) is not None
        if is_left:
            x, weight, bias, output = weight, left, None if bias is None else bias.expand(output.shape).mT, output.mT
        if weight.dim() == 3 and bias is None and (weight.shape[0] == 1 or weight.stride(0) == 0):
            replaced = self._tell("linear", x.flatten(0, 1), weight[0], output.flatten(0, 1), {"bias": None})
        else:
            replaced = self._tell("linear", x, weight, output, {"bias": bias})
        if replaced is None:
            return result
        replaced = replaced.reshape(output.shape)
        return (replaced.mT if is_left else replaced).reshape(result.shape)

    def _tell(self, op: str, x: Tensor, weight: Tensor, output: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """Call `seen` if the weight is that of one site."""
        names = self._origin(weight) or ()
        site = next((s for name in names for s in self.sites[name] if s.op.startswith(op)), None)
        if site is None or len(names) != 1:
            return None
        offset = int(weight.storage_offset()) - self.offsets[site.parameter]
        return self.seen(Call(site, x, weight, output, _first_row(site, offset), arguments))

    def _follow(self, func: Any, inputs: Iterable[Any], result: Any) -> None:
        """Note what an op's result comes from, if it comes from constants alone."""
        if func is torch.ops.fp4fx.dequantize.default:
            inputs = tuple(inputs)[:1]
        tensors = [t for value in inputs for t in (value if isinstance(value, (tuple, list)) else (value,))]
        origins = [self._origin(t) for t in tensors if isinstance(t, Tensor)]
        results = [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(t, Tensor)]
        known = [names for names in origins if names is not None]
        if origins and len(known) == len(origins):
            for tensor in results:
                self.origins.setdefault(_memory(tensor), frozenset[str]().union(*known))
            if len(self.origins) > self.bound:
                alive = ((m, names) for m, names in self.origins.items() if not m.expired())  # type: ignore[no-untyped-call]
                self.origins = dict(alive)
                self.bound = 2 * len(self.origins)
        elif known and func is not None and func._schema.is_mutable:
            for tensor in results:
                self.origins.pop(_memory(tensor), None)

    def _origin(self, value: Any) -> frozenset[str] | None:
        return self.origins.get(_memory(value)) if value.layout == torch.strided else None


def _memory(tensor: Tensor) -> StorageWeakRef:
    """The storage of a tensor: while this stands, no other storage is taken for it."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _stored(model: nn.Module, name: str) -> Tensor | None:
    """The tensor that holds a parameter, or its codes if it is packed."""
    path, _, attribute = name.rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    if isinstance(module, Packed) and attribute in module.nvfp4:
        return module.get_buffer(f"{attribute}_packed")
    return None if module is None else module._parameters.get(attribute)


def _first_row(site: Site, offset: int) -> int:
    """The row, as `nvfp4.to_rows` has them, of the value that lies `offset` behind the parameter's first."""
    if site.order == "columns":
        k, n = site.shape[-2:]
        return offset // (k * n) * n + offset % n
    return 0 if site.order == "conv_transpose" else offset // (site.numel // site.rows[0])
