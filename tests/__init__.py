"""Without a GPU, Triton kernels are interpreted. Triton reads the variable when it is imported, so it is set here."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
