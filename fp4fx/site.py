"""What a site is: one use of one parameter by one compute op."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Order = Literal["rows", "columns", "channels", "conv", "conv_transpose"]
Op = Literal[
    "linear",
    "bilinear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "embedding",
    "norm",
]


@dataclass(frozen=True)
class Note:
    """Something the tracer saw and left alone, and why."""

    name: str
    """Qualified name of the parameter or module ("" is the root)."""
    reason: str
    """One clause for a reader, e.g. `used in aten.matmul, which is not a linear, a convolution or an embedding`."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One use of one parameter by one compute op, found by following data through a trace."""

    parameter: str
    """Qualified name in `named_parameters()`, e.g. `layer1.0.conv1.weight`; the first of a tied tensor's names."""
    op: Op
    """The op that eats it: `linear` for any product that is one, `norm` for any normalisation's affine weight."""
    shape: tuple[int, ...]
    """Shape of the parameter as stored."""
    order: Order
    """How the parameter's values line up as rows of blocks (see `nvfp4.to_rows`)."""
    groups: int = 1
    index: int = 0
    """Position in execution order among all sites of the trace, from 0."""
    called_in: str = ""
    """Qualified name of the innermost module whose forward ran the op ("" is the root)."""
    own_input: bool = False
    """True if a stock layer (Linear, convolution) owns the parameter and runs the op on its own input."""
    activation: int = -1
    """Number of the activation read by the op; sites of one number are siblings (q/k/v, gate/up). -1: unknown."""
    siblings: tuple[str, ...] = ()
    """Parameters of the other linears and convolutions that read the same activation, in execution order."""
    normed_by: str = ""
    """The weight of the normalisation that made the activation, with nothing behind it but ReLU, dropout, casts,
    padding and views; "": another op made it, or one without a weight."""
    rectified: bool = False
    """True if a ReLU is among what lies between the activation and the op that made it."""
    tied: tuple[str, ...] = ()
    """Other qualified names of the very same tensor."""
    transform: str | None = None
    """The op the parameter passes through before the compute op (weight standardisation, weight norm), or None."""
    settled: bool = False
    """True if the module computes this weight from parameters, and is to hold what comes out instead."""
    refusal: str | None = None
    """Why this use cannot be quantized at all (several parameters in one weight, one that depends on data), or None."""
    kurtosis: float | None = None
    """Excess kurtosis of the parameter's values (0 for a Gaussian); None on the meta device."""
    numel: int = 0

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def attribute(self) -> str:
        """Name of the parameter within its module."""
        return self.parameter.rpartition(".")[2]

    @property
    def rows(self) -> tuple[int, int]:
        """The weight as a matrix: (N, K), K being the reduction axis along which blocks run."""
        if self.order == "conv_transpose":
            n = self.shape[1] * self.groups
        elif self.order == "conv":
            n = self.shape[0]
        elif self.order == "columns":
            n = self.numel // self.shape[-2]
        else:
            n = math.prod(self.shape[:-1])
        return n, self.numel // n

    @property
    def channels(self) -> int:
        """Input channels per group: the K that one tap of the kernel reduces over."""
        if self.order == "conv_transpose":
            return self.shape[0] // self.groups
        return self.shape[{"conv": 1, "columns": -2}.get(self.order, -1)]

    @property
    def depthwise(self) -> bool:
        """True for a convolution with one input channel per group and more than one group."""
        return self.op.startswith("conv") and self.groups > 1 and self.channels == 1

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self.__dict__.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        """Inverse of `to_dict`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)
