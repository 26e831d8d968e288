"""An optimizer's step behind clipping, in two passes over the gradients: their norm, and the update.

`torch.amp.GradScaler` with `clip_grad_norm_` takes five: it looks for what is not finite, unscales, takes norms, clips,
and updates; and where it skips an update it waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kolors_fast.ops.unscale_grads_ import unscale_grads_

from .parallel import World, locals_of

_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ adds to the norm
GROWTH_INTERVAL = 2000


class LossScale:
    """One scale for the loss of a float16 training, by the rule of `torch.amp.GradScaler`, all on the device.

        scale = 2^16 at first
        scale /= 2        after an update that was skipped
        scale *= 2        after 2000 updates in a row that were not, unless it would no longer be finite

    Source: Micikevicius et al., Mixed Precision Training, arXiv 1710.03740.

    Attributes:
        scale: float32 [], of the loss, and so of all gradients.
        growth_tracker: int32 [], updates since a scale fell or rose.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), 2.0**16, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, skipped: Tensor) -> None:
        """Let the scale follow an update that `clipped_step` has skipped or not."""
        torch._amp_update_scale_(self.scale, self.growth_tracker, skipped, 2.0, 0.5, GROWTH_INTERVAL)


def clipped_step(
    optimizer: torch.optim.Optimizer, clip_norm: float, world: World, loss_scale: LossScale | None = None
) -> Tensor:
    """gradients *= min(1, clip_norm / (norm + 1e-6)), then the optimizer's step; nothing at all if norm is not finite.

    What `torch.nn.utils.clip_grad_norm_` and the step do, without a pass for the product and without waiting for the
    device: a fused optimizer of torch divides gradients by its `grad_scale` as it reads them, and leaves parameters and
    moments as they are where `found_inf` is 1, which is how `torch.amp.GradScaler` speaks to it.

    Args:
        optimizer: fused.
        loss_scale: of the loss that the gradients are of: they are divided by it first, and it follows the update.

    Returns:
        float32 [], 1 if the update was skipped, else 0, on the gradients' device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = locals_of(p.grad for p in parameters if p.grad is not None)
    scale = torch.ones((), device=world.device) if loss_scale is None else loss_scale.scale
    norm = world.norm(unscale_grads_(gradients, scale.expand(len(gradients)))[0].square())
    skipped = (~norm.isfinite()).float()
    step_at_norm(optimizer, norm, skipped, clip_norm)
    if loss_scale is not None:
        loss_scale.update(skipped)
    return skipped


def step_at_norm(optimizer: torch.optim.Optimizer, norm: Tensor, skipped: Tensor, clip_norm: float) -> None:
    """The clipped step of gradients whose norm is known; none where skipped is 1. Both are fp32 [].

    Raises:
        ValueError: the optimizer cannot skip an update on the device.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        got = type(optimizer).__name__
        raise ValueError(f"optimizer: expected one of torch's with fused=True, that can skip an update, got {got}")
    told: Any = optimizer
    told.grad_scale, told.found_inf = ((norm + _EPS) / clip_norm).clamp(min=1.0), skipped
    try:
        optimizer.step()
    finally:
        del told.grad_scale, told.found_inf
