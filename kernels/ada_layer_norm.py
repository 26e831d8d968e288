"""out = LayerNorm(x) * (1 + scale) + shift."""

from __future__ import annotations

from torch import Tensor

from . import _layer_norm


def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(out like x, statistics fp32 [2, rows])"""
    _, out, statistics = _layer_norm.forward(x, None, None, scale, shift, eps, 1.0)
    return out, statistics


def backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x in its dtype, of scale and shift [B, D] in fp32."""
    grad_x, _, (grad_scale, grad_shift) = _layer_norm.backward(
        None, grad_out, x, None, None, scale, statistics, 1.0, needs[0]
    )
    return grad_x, grad_scale, grad_shift
