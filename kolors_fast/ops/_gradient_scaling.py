"""What the ops of per-resblock gradient scaling check alike, and the inputs that their tests share.

Ramesh et al., arXiv 2102.12092, section 2.4 and figure 4: one scale per resblock keeps its fp16 gradients above the
underflow that one scale for a whole model cannot avoid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _layout, _library


def check(op: str, x: Tensor, scale: Tensor, dtype: torch.dtype | None) -> None:
    """The arguments that scaling and unscaling have in common."""
    if x.dtype not in _library.FLOATING:
        raise TypeError(f"{op}: x: expected a floating dtype of 16 to 64 bits, got {x.dtype}")
    if scale.dtype != torch.float32 and not (scale.dtype == x.dtype == torch.float64):
        raise TypeError(f"{op}: scale: expected torch.float32, got {scale.dtype}")
    if scale.numel() != 1:
        raise ValueError(f"{op}: scale: expected one element, got {list(scale.shape)}")
    if scale.device != x.device:
        raise ValueError(f"{op}: scale: expected a tensor on {x.device}, got {scale.device}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype: expected a floating dtype, got {dtype}")


def writes(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot write this dtype, or None."""
    return None if dtype in _library.DTYPE_CODE else f"writes float32, float16 and bfloat16, not {dtype}"


def wide(x: Tensor) -> torch.dtype:
    """What is computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def or_zero(value: Tensor) -> Tensor:
    """0 where value is not finite."""
    return torch.where(value.isfinite(), value, 0)


# ---- inputs


def normal(generator: torch.Generator, *shape: int, size: float = 1.0, channels_last: bool = False) -> Tensor:
    return _layout.as_layout(torch.randn(shape, generator=generator, dtype=torch.float64) * size, channels_last)


def offset(x: Tensor) -> Tensor:
    """x as a view that starts one element past its storage."""
    storage = torch.zeros(x.numel() + 1, dtype=x.dtype)
    return storage[1:].view(x.shape).copy_(x)


def with_special_values(x: Tensor) -> Tensor:
    flat = x.view(-1)
    flat[1], flat[5], flat[-1] = float("nan"), float("inf"), float("-inf")
    return x
