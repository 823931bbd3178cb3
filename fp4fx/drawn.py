"""Inputs of a layer without data: drawn from what the normalisation ahead of it makes, else from a unit normal.

A normalisation gives channel c the mean beta_c and the standard deviation gamma_c, and a ReLU clips the normal
distribution of that kind (Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp4fx import nvfp4
from fp4fx.site import Site

ROWS = 256
"""Rows that are drawn; sums over a layer's outputs then vary by less than 1 %."""


def energies(site: Site, weight: Tensor, twin: Tensor, model: nn.Module, quantizes: bool) -> tuple[float, float, str]:
    """Sum of y² and of (change of y)² for inputs drawn for a site, and what they are drawn from.

    Channels and the taps of a kernel are independent of each other; the rows of an embedding are equally frequent.

    Args:
        site: Whose weight it is.
        weight: As it is, of the parameter's shape.
        twin: As it is quantized.
        model: Holds the normalisation.
        quantizes: The input is quantized to NVFP4 where the twin reads it.
    """
    own, other = (nvfp4.to_rows(w.float(), site.order, site.groups) for w in (weight, twin))
    if site.op == "embedding":
        return _energy(own), _energy(other - own), "every row once"
    groups, taps = site.groups, site.rows[1] // site.channels
    gamma, beta, source = _statistics(site, model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS * taps, groups * site.channels, generator=generator).to(own.device) * gamma + beta
    x = x.relu() if site.rectified else x
    x = x.reshape(len(x), groups, -1)
    read = torch.ops.fp4fx.fake_quantize.default(x) if quantizes else x

    def output(x: Tensor, rows: Tensor) -> Tensor:
        patches = x.reshape(ROWS, taps, groups, -1).permute(2, 0, 1, 3).flatten(2)
        y: Tensor = patches @ rows.reshape(groups, -1, patches.shape[-1]).mT
        return y

    y = output(x, own)
    return _energy(y), _energy(output(read, other) - y), source


def _statistics(site: Site, model: nn.Module) -> tuple[Tensor | float, Tensor | float, str]:
    """Gamma and beta fp32 [channels] of a site's input, and in words what they are of."""
    clipped = ", ReLU" if site.rectified else ""
    path, _, attribute = site.normed_by.rpartition(".")
    if site.normed_by:
        norm, channels = model.get_submodule(path), site.groups * site.channels
        gamma, beta = getattr(norm, attribute), getattr(norm, attribute.replace("weight", "bias"), None)
        if gamma.numel() == channels and (beta is None or beta.numel() == channels):
            shift = 0.0 if beta is None or beta is gamma else beta.detach().float()
            return gamma.detach().float(), shift, f"{path or attribute}{clipped}"
    return 1.0, 0.0, f"unit normal{clipped}"


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
