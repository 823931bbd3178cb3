"""Kernels run on the GPU, or interpreted where there is none: in float16 and float32, whose arithmetic NumPy has."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import pytest


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def dtypes(device):
    return (torch.float16, torch.float32, torch.bfloat16) if device == "cuda" else (torch.float16, torch.float32)
