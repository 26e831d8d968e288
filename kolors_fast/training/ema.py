"""Exponential moving average of a module's parameters."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .parallel import locals_of


class EMA:
    """average += (1 - d) (parameter - average), with d = min(decay, (1 + n) / (10 + n)) at update n = 1, 2, ...

    The early, smaller d lets the average forget the initial weights. Buffers are not averaged.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's current parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, parameters = (locals_of(one.parameters()) for one in (self.module, module))
        torch._foreach_lerp_(averages, parameters, 1 - decay)
