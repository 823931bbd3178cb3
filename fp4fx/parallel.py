"""Tensor parallelism for packed layers: the styles of `torch.distributed.tensor.parallel`, which shard packed bytes.

Packed weights are buffers, which torch's own styles do not shard: `RowwiseParallel` fails on a packed layer and
`ColwiseParallel` leaves it whole on every rank. Those here shard codes and scales along the rows, or along K in whole
blocks of 16, and treat any dense layer as torch's do.

Importing this module teaches DTensor the ops `fp4fx::dequantize` and `fp4fx::fake_quantize`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel as TorchColwiseParallel
from torch.distributed.tensor.parallel import RowwiseParallel as TorchRowwiseParallel
from torch.nn.functional import pad

from fp4fx import nvfp4
from fp4fx.errors import LayoutError
from fp4fx.ops.library import LIBRARY
from fp4fx.packed import PARTS, Packed

__all__ = ["ColwiseParallel", "RowwiseParallel"]


class ColwiseParallel(TorchColwiseParallel):
    """`torch.distributed.tensor.parallel.ColwiseParallel` for packed and dense Linear and Embedding modules.

    Raises:
        LayoutError: the columns of a packed embedding cannot be divided into whole blocks of 16.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _shard(module, device_mesh, 0, self.src_data_rank)
        super()._partition_linear_fn(name, module, device_mesh)  # type: ignore[no-untyped-call]

    def _partition_embedding_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _shard(module, device_mesh, 1, self.src_data_rank)
        super()._partition_embedding_fn(name, module, device_mesh)  # type: ignore[no-untyped-call]


class RowwiseParallel(TorchRowwiseParallel):
    """`torch.distributed.tensor.parallel.RowwiseParallel` for packed and dense Linear and Embedding modules.

    Raises:
        LayoutError: K of a packed Linear cannot be divided into whole blocks of 16.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not _shard(module, device_mesh, 1, self.src_data_rank):
            super()._partition_linear_fn(name, module, device_mesh)  # type: ignore[no-untyped-call]
        elif isinstance(module.bias, nn.Parameter):
            bias = distribute_tensor(module.bias, device_mesh, [Replicate()], src_data_rank=self.src_data_rank)
            module.bias = nn.Parameter(bias, requires_grad=module.bias.requires_grad)

    def _partition_embedding_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _shard(module, device_mesh, 0, self.src_data_rank)
        super()._partition_embedding_fn(name, module, device_mesh)  # type: ignore[no-untyped-call]


def _shard(module: nn.Module, mesh: DeviceMesh, dim: int, source: int | None) -> bool:
    """Shard a packed weight [N, K] along N (0) or K (1); False if the weight is not packed."""
    if not isinstance(module, Packed) or "weight" not in module.nvfp4:
        return False
    k = module.nvfp4["weight"].shape[1]
    if dim == 1 and k % (nvfp4.BLOCK * mesh.size()):
        raise LayoutError(
            f"{type(module).__name__}: found K={k} for {mesh.size()} ranks, expected a multiple of "
            f"{nvfp4.BLOCK * mesh.size()}: a packed row is divided in whole blocks of {nvfp4.BLOCK}; shard the other "
            "dimension, or exclude this layer from the policy"
        )
    for part in PARTS:
        placement: Placement = Replicate() if part == "global_scale" else Shard(dim)
        whole = module.get_buffer(f"weight_{part}")
        module.register_buffer(f"weight_{part}", distribute_tensor(whole, mesh, [placement], src_data_rank=source))
    return True


# --- the ops on distributed tensors -----------------------------------------------------------------------------------


@torch.no_grad()
def _dequantize(cls: type, op: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    """Every rank decodes what it holds: rows, or blocks of all rows."""
    packed, scale, global_scale, shape, *rest = args
    codes, scales = packed.to_local(), scale.to_local()
    here = list(shape)
    for placement in packed.placements:
        if not placement.is_replicate():
            here = (
                [codes.shape[0], nvfp4.BLOCK * scales.shape[1]] if placement.is_shard(1) else [codes.shape[0], here[1]]
            )
    local = op(codes, scales, _whole(global_scale), here, *rest, **kwargs)
    return _distributed(local, packed.device_mesh, packed.placements, shape)


@torch.no_grad()
def _fake_quantize(cls: type, op: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    """Every rank rounds what it holds, by a global scale that all ranks share."""
    x, global_scale, *rest = (*args, None)[: max(2, len(args))]
    mesh = x.device_mesh
    placements = tuple(Replicate() if p.is_partial() else p for p in x.placements)
    x = x.redistribute(placements=placements)
    axis = 1 if rest[:1] == ["channels"] else x.dim() - 1
    ranks = math.prod(mesh.size(i) for i, p in enumerate(placements) if p.is_shard(axis))
    if ranks > 1 and x.shape[axis] % (nvfp4.BLOCK * ranks):
        raise LayoutError(
            f"fp4fx::fake_quantize: found {x.shape[axis]} values on {ranks} ranks, expected a multiple of "
            f"{nvfp4.BLOCK * ranks}: a block of {nvfp4.BLOCK} stays on one rank; replicate the activation instead"
        )
    if global_scale is None:
        amax = pad(x.to_local().nan_to_num(0.0, 0.0, 0.0).abs().flatten(), (0, 1)).amax()
        largest = [Partial("max") if p.is_shard() else Replicate() for p in placements]
        amax = DTensor.from_local(amax, mesh, largest, run_check=False)
        global_scale = nvfp4.global_scale(_whole(amax), *rest[2:3])
    local = op(x.to_local(), _whole(global_scale), *rest, **kwargs)
    return _distributed(local, mesh, placements, x.shape)


def _whole(tensor: Any) -> Tensor:
    """A replicated tensor as a plain one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _distributed(local: Tensor, mesh: DeviceMesh, placements: Any, shape: Any) -> Tensor:
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides)


torch.library.register_torch_dispatch("fp4fx::dequantize", DTensor, _dequantize, lib=LIBRARY)
torch.library.register_torch_dispatch("fp4fx::fake_quantize", DTensor, _fake_quantize, lib=LIBRARY)
