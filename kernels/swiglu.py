"""y = silu(gate) * value, h = [gate, value]."""

from __future__ import annotations

from torch import Tensor

from . import _gate


def forward(
    h: Tensor,  # [..., 2F], rows row_stride apart
    row_stride: int,
) -> Tensor:
    """[..., F]"""
    return _gate.forward(h, row_stride, gelu=False, gate_first=True)


def backward(
    grad_y: Tensor,  # [..., F], dense
    h: Tensor,  # [..., 2F], rows row_stride apart
    row_stride: int,
) -> Tensor:
    """Gradient of h, dense"""
    return _gate.backward(grad_y, h, row_stride, gelu=False, gate_first=True)
