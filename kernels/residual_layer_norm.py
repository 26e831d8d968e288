"""r = x + y; out = LayerNorm(r) * weight + bias."""

from __future__ import annotations

from torch import Tensor

from . import _layer_norm


def forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(r, out, both like x, statistics fp32 [2, rows])"""
    r, out, statistics = _layer_norm.forward(x, y, None, weight, bias, eps, 0.0)
    assert r is not None
    return r, out, statistics


def backward(
    grad_r: Tensor | None,
    grad_out: Tensor,
    r: Tensor,
    weight: Tensor,
    statistics: Tensor,
    needs: tuple[bool, bool, bool, bool],  # x, y, weight, bias
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of x and y, one tensor in the dtype of r; of weight and bias [D] in fp32."""
    grad, _, totals = _layer_norm.backward(
        grad_r, grad_out, r, None, None, weight, statistics, 0.0, needs[0] or needs[1]
    )
    return grad, grad, totals[0, 0], totals[1, 0]
