"""What the LayerNorm ops share: argument checks, the geometry that the kernels see, the definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _library


def check_x(op: str, x: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"{op}: x: expected [B, *, D], got {list(x.shape)}")
    if x.dtype not in _library.FLOATING:
        raise TypeError(f"{op}: x: expected a floating dtype of 16 to 64 bits, got {x.dtype}")


def check_residual(op: str, y: Tensor, x: Tensor) -> None:
    if y.shape != x.shape:
        raise ValueError(f"{op}: y: expected {list(x.shape)}, got {list(y.shape)}")
    check_like(op, "y", y, x, x.dtype)


def check_like(op: str, name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name}: expected {dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name}: expected a tensor on {x.device}, got {tensor.device}")


def check_eps(op: str, eps: float) -> float:
    if not eps >= 0:
        raise ValueError(f"{op}: eps: expected a number >= 0, got {eps}")
    return float(eps)


def parameter_dtype(first: Tensor, x: Tensor) -> torch.dtype:
    """What all modulations, or weight and bias, have to be in: the dtype of x or float32."""
    return x.dtype if first.dtype == x.dtype else torch.float32


def check_modulations(op: str, x: Tensor, dtype: torch.dtype, **named: Tensor) -> None:
    """scale, shift, gate: [B, D] or [B, 1, D]. They stay what they are: a view of each would cost a microsecond."""
    shape, device = x.shape, x.device
    b, d = shape[0], shape[-1]
    for name, value in named.items():
        if value.shape != (b, d) and value.shape != (b, 1, d):
            raise ValueError(f"{op}: {name}: expected {[b, d]} or {[b, 1, d]}, got {list(value.shape)}")
        if value.dtype != dtype or value.device != device:
            check_like(op, name, value, x, dtype)


# ---- what the kernels see


def geometry(x: Tensor) -> tuple[int, int, int]:
    """Samples, rows of a sample, D."""
    shape = tuple(x.shape)
    return shape if len(shape) == 3 else (shape[0], math.prod(shape[1:-1]), shape[-1])


def dense_rows(value: Tensor) -> Tensor:
    """[B, D] or [B, 1, D] with the last axis contiguous; the rows may lie anywhere."""
    return value if value.stride(-1) == 1 else value.contiguous()


def empty_statistics(x: Tensor, rows: int) -> Tensor:
    """[2 * rows]: mean, then rstd of every row, for the backward pass. One tensor of one axis is allocated fastest."""
    return x.new_empty(2 * rows, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


# ---- the definition


def per_row(value: Tensor, x: Tensor) -> Tensor:
    """[B, D] or [B, 1, D] -> broadcastable over x [B, *, D], in fp32 or float64 as x is computed."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return value.to(wide).reshape(value.shape[0], *[1] * (x.dim() - 2), value.shape[-1])


def sum_rows(value: Tensor) -> Tensor:
    """[B, *, D] -> [B, D]"""
    return value.reshape(*geometry(value)).sum(1)


def normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(xhat [B, *, D], statistics [2 * rows]) in fp32, or in float64 for float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(-1, keepdim=True)
    mean = mean + (wide - mean).mean(-1, keepdim=True)  # what rounding took is in the deviations: constants become 0
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, torch.cat([mean.flatten(), rstd.flatten()])


def gradients(x: Tensor, factor: Tensor, statistics: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x, xhat) for out = xhat * factor + shift, in fp32 or float64.

    With g = grad_out * factor: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), the means over D.
    """
    mean, rstd = statistics.reshape(2, *x.shape[:-1], 1)
    xhat = (x.to(mean.dtype) - mean) * rstd
    g = grad_out.to(mean.dtype) * factor
    return rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)), xhat
