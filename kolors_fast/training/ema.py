"""Exponential moving average of a module's parameters."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .parallel import locals_of


class EMA:
    """average += (1 - d) (parameter - average), with d = min(decay, (1 + n) / (10 + n)) at update n = 1, 2, ...

    The early, smaller d lets the average forget the initial weights. Buffers are not averaged. Parameters that are
    frozen when it begins are those of the module itself, which takes no memory; sharded, each has its part of its own.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        frozen: dict[int, object] = {id(p): p for p in module.parameters() if not p.requires_grad}
        self.module = copy.deepcopy(module, frozen).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's current parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        averages, parameters = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        torch._foreach_lerp_(locals_of(averages), locals_of(parameters), 1 - decay)
