"""Choices that hold for the whole test run."""

import os

import torch

# Triton decides once, at import, whether kernels are interpreted; without a GPU the interpreter is all there is
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
