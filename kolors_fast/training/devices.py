"""What a step reads is drawn on the CPU, the same whatever computes, and sent from there."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device:
    """Of its parameters; the CPU, where it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def sent(value: Any, device: torch.device) -> Any:
    """Tensors, tuples and dataclasses of them on a device. To a GPU they go from pinned memory: the host does not wait
    for what the GPU is still at."""
    if isinstance(value, Tensor):
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(sent(one, device) for one in value)
    return type(value)(*(sent(getattr(value, field.name), device) for field in dataclasses.fields(value)))


def sent_to(module: nn.Module, *values: Any) -> Any:
    """Values on the device of a module's parameters."""
    return sent(values, device_of(module))
