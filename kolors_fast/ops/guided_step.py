"""Guidance and one scheduler step in one pass."""

from __future__ import annotations

import torch
from torch import Tensor


def guided_step(
    sample: Tensor, predictions: Tensor, weights: Tensor, coefficients: Tensor, *,
    previous: Tensor | None = None, noise: Tensor | None = None, row: Tensor | None = None,
    return_denoised: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain version; the fused one takes its place."""
    c = coefficients.float() if row is None else coefficients.float()[row.reshape(())]
    parts = predictions.float().chunk(weights.numel())
    guided = sum((w * p for w, p in zip(weights.float(), parts, strict=True)), torch.zeros((), device=sample.device))
    x = sample.float()
    out = c[0] * x + c[1] * guided
    if previous is not None:
        out = out + c[2] * previous.float()
    if noise is not None:
        out = out + c[3] * noise.float()
    if not return_denoised:
        return out.to(sample.dtype)
    return out.to(sample.dtype), (c[4] * x + c[5] * guided).to(sample.dtype)
