"""Fixtures of more than one test file."""

import pytest

import fp4fx
from tests.checkpoints import IMAGE, STATIC
from tests.models import ConvNet


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A quantized ConvNet with static activations, in a file."""
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    fp4fx.save(fp4fx.quantize(ConvNet().eval(), STATIC, IMAGE), path)
    return path
