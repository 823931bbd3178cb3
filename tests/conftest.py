"""Fixtures of more than one test file."""

import pytest
import torch

import fp4fx
from tests.checkpoints import IMAGE, STATIC
from tests.models import ConvNet


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A process that is done takes tests from another: the last models of one file are minutes."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True)
def _seed():
    """Random numbers of a test do not depend on which ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A quantized ConvNet with static activations, in a file."""
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    fp4fx.save(fp4fx.quantize(ConvNet().eval(), STATIC, IMAGE), path)
    return path
