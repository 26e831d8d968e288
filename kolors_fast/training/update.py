"""An optimizer's step behind clipping, in two passes over the gradients: their norm, and the update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kolors_fast.ops.unscale_grads_ import unscale_grads_

from .parallel import World, locals_of

_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ adds to the norm


def clipped_step(optimizer: torch.optim.Optimizer, clip_norm: float, world: World) -> Tensor:
    """gradients *= min(1, clip_norm / (norm + 1e-6)), then the optimizer's step; nothing at all if norm is not finite.

    What `torch.nn.utils.clip_grad_norm_` and the step do, without a pass for the product and without waiting for the
    device: a fused optimizer of torch divides gradients by its `grad_scale` as it reads them, and leaves parameters and
    moments as they are where `found_inf` is 1, which is how `torch.amp.GradScaler` speaks to it.

    Args:
        optimizer: fused.

    Returns:
        float32 [], 1 if the update was skipped, else 0, on the gradients' device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = locals_of(p.grad for p in parameters if p.grad is not None)
    ones = torch.ones((), device=world.device).expand(len(gradients))
    norm = world.norm(unscale_grads_(gradients, ones)[0].square())
    skipped = (~norm.isfinite()).float()
    step_at_norm(optimizer, norm, skipped, clip_norm)
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
