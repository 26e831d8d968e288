"""GroupNorm then SiLU of concat(x, skip) + channel_add, without building the concat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
    skip: Tensor | None = None, channel_add: Tensor | None = None, activation: str | None = "silu",
) -> Tensor:
    """Plain version; the fused one takes its place."""
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    if channel_add is not None:
        x = x + channel_add.reshape(*channel_add.shape, *[1] * (x.dim() - 2))
    y = F.group_norm(x.float(), num_groups, weight.float(), bias.float(), eps)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype)
