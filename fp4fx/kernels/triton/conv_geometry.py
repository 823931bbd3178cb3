"""Where a convolution reads and writes: three axes always, missing ones of size 1 in front."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from fp4fx.errors import LayoutError
from fp4fx.kernels.triton.launch import address
from fp4fx.sizes import known_equal

Axes = tuple[int, int, int]
_T = TypeVar("_T")


class Geometry(NamedTuple):
    """A plain convolution, or a transposed one as `volume(phases)` of them side by side.

    Output `o` of a plain one reads the inputs `o·stride − padding + tap·dilation`. In phase `p` of a transposed one lie
    the outputs `p, p + stride, ...`; its `j`-th tap is `first + j·stride/common`, and output `p + o·stride` reads the
    input `o + offset − j·dilation/common` there, so that a phase is a plain convolution of stride 1.
    """

    kernel: Axes
    stride: Axes
    padding: Axes
    dilation: Axes
    inner: Axes
    """Size of x."""
    outer: Axes
    """Size of y."""
    transposed: bool
    phases: Axes
    common: Axes
    """Greatest common divisor of stride and dilation."""
    inverse: Axes
    """Of dilation/common modulo stride/common: what turns the place of a phase into its first tap."""
    bounded: tuple[bool, bool, bool]
    """Whether a tap can lie outside x."""

    @property
    def taps(self) -> int:
        """Of the whole kernel."""
        return math.prod(self.kernel)

    @property
    def pixels(self) -> int:
        """Outputs of one image in the largest phase."""
        return math.prod(-(-n // p) for n, p in zip(self.outer, self.phases, strict=True))

    @property
    def is_pointwise(self) -> bool:
        """Every pixel by itself."""
        return not self.transposed and self.taps == 1 and not any(self.padding) and set(self.stride) == {1}

    def near(self, pixels: Tensor) -> Tensor:
        """x [B, *spatial, C] as it lies, or a copy if what one output reads is further apart than 31 bits.

        Raises:
            LayoutError: it still is.
        """
        for copy in (False, True):
            x = pixels.contiguous() if copy else pixels
            strides = (*(0,) * (5 - x.dim()), *x.stride()[1:-1])
            axes = zip(self.kernel, self.stride, self.padding, self.dilation, strides, strict=True)
            if sum((p + s + d * k) * apart for k, s, p, d, apart in axes) < 2**31:
                return x
        raise LayoutError(f"a tap reads over 2**31 values of x away from another: {self.kernel} of {self.inner} pixels")


@functools.lru_cache(maxsize=1024)
def geometry(
    inner: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    output_padding: tuple[int, ...] | None = None,
) -> Geometry:
    """The geometry for an x of spatial size `inner`; transposed if an output padding is given.

    Raises:
        LayoutError: other than one to three axes, arguments that do not fit them, or an empty result.
    """
    rank, transposed = len(kernel), output_padding is not None
    extra = output_padding or (0,) * rank
    if not 1 <= rank <= 3 or {len(a) for a in (inner, stride, padding, dilation, extra)} != {rank}:
        raise LayoutError(
            "a convolution has one to three spatial axes, and as many of everything; found x "
            f"{inner}, kernel {kernel}, stride {stride}, padding {padding}, dilation {dilation}, output_padding {extra}"
        )
    if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0:
        raise LayoutError(
            f"kernel, stride and dilation must be positive and padding not negative; "
            f"found kernel {kernel}, stride {stride}, dilation {dilation}, padding {padding}"
        )
    outer = []
    for i, k, s, p, d, e in zip(inner, kernel, stride, padding, dilation, extra, strict=True):
        reach = d * (k - 1) + 1
        outer.append((i - 1) * s - 2 * p + reach + e if transposed else (i + 2 * p - reach) // s + 1)
    if min(outer) < 1:
        raise LayoutError(f"kernel {kernel} with dilation {dilation} and padding {padding} does not fit into x {inner}")
    common = [math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    bounded = [
        p > 0 or (transposed and (k, s, e) != (1, 1, 0))
        for p, k, s, e in zip(padding, kernel, stride, extra, strict=True)
    ]
    return Geometry(
        kernel=_axes(kernel, 1),
        stride=_axes(stride, 1),
        padding=_axes(padding, 0),
        dilation=_axes(dilation, 1),
        inner=_axes(inner, 1),
        outer=_axes(outer, 1),
        transposed=transposed,
        phases=_axes([min(s, o) for s, o in zip(stride, outer, strict=True)], 1) if transposed else (1, 1, 1),
        common=_axes(common, 1),
        inverse=_axes([pow(d // g, -1, s // g) for s, d, g in zip(stride, dilation, common, strict=True)], 0),
        bounded=_axes(bounded, False),
    )


def _axes(values: Sequence[_T], fill: _T) -> tuple[_T, _T, _T]:
    first, second, third = (*(fill,) * (3 - len(values)), *values)
    return first, second, third


def side_by_side(pixels: Tensor, channels: int) -> int:
    """How many values of x [B, *spatial, C] lie side by side at an aligned place: 0, 2, 4 or 8."""
    lead = zip(pixels.stride()[:-1], pixels.shape[:-1], strict=True)
    strides = [s if isinstance(s, int) else 1 for s, n in lead if not known_equal(n, 1)]
    unit = math.gcd(channels, *strides, address(pixels) // 2, 8)
    return unit if pixels.element_size() == 2 and unit > 1 else 0
