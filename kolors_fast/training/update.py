"""An optimizer's step behind clipping, in two passes over the gradients: their norm, and the update."""

from __future__ import annotations

import torch
from torch import Tensor

from kolors_fast.ops.unscale_grads_ import unscale_grads_

from .parallel import World, locals_of


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
    optimizer.grad_scale = ((norm + 1e-6) / clip_norm).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    skipped: Tensor = optimizer.found_inf  # type: ignore[attr-defined]
    return skipped
