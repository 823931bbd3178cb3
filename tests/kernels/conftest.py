"""The library that tests of kernels use has one tier more: AMX in plain C++, for machines without it."""

import pytest

from fp4fx.kernels.cpu import build, library

build.extra_tiers = ("amx_emulated",)


@pytest.fixture(scope="session")
def cpu_ops():
    """`torch.ops.fp4fx_cpu`, or a skip with the reason why there is none."""
    import torch

    reason = library.load()
    if reason is not None:
        pytest.skip(reason)
    return torch.ops.fp4fx_cpu


@pytest.fixture(params=list(build.TIERS))
def tier(request, cpu_ops):
    """Every tier that this machine can run."""
    if request.param not in cpu_ops.tiers():
        pytest.skip(f"this processor has no {request.param}")
    return request.param
