"""Choices that hold for the whole test run."""

import os

import torch

# Triton decides once, at import, whether kernels are interpreted; without a GPU the interpreter is all there is
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# one worker a core already: more threads than cores only wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
