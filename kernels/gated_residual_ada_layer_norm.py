"""r = x + gate * y; out = LayerNorm(r) * (1 + scale) + shift."""

from __future__ import annotations

from torch import Tensor

from . import _layer_norm


def forward(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, out, both like x, statistics fp32 [2, rows])"""
    r, out, statistics = _layer_norm.forward(x, y, gate, scale, shift, eps, 1.0)
    assert r is not None
    return r, out, statistics


def backward(
    grad_r: Tensor | None,
    grad_out: Tensor,
    r: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    statistics: Tensor,
    needs: tuple[bool, bool, bool, bool, bool],  # x, y, gate, scale, shift
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of x and y in their dtype, one tensor where there is no gate; of gate, scale, shift [B, D] in fp32."""
    needs_x, needs_y, needs_gate = needs[:3]
    if gate is None:
        needs_x, needs_y, needs_gate = needs_x or needs_y, False, False
    grad_x, grad_y, totals = _layer_norm.backward(
        grad_r, grad_out, r, y if needs_gate else None, gate if needs_y else None, scale, statistics, 1.0, needs_x
    )
    return grad_x, grad_x if gate is None else grad_y, totals[2] if needs_gate else None, totals[0], totals[1]
