"""What the launchers ask of a device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

# in interpreter mode programs run one after the other: few of them, but enough that splits are exercised
INTERPRETED_MULTIPROCESSORS = 2


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors the grid has to fill."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


_NO_GUARD: AbstractContextManager = nullcontext()


def guard(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU current: Triton launches on the current device, whatever its arguments say."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(tensor.device)


@cache
def architecture(device: torch.device) -> int:
    """Compute capability as in sm_90; 0 in interpreter mode."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
