"""The two dense layouts that the kernels read: NCHW and channels_last, of any rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x [N, C, *spatial] is dense with channels innermost, and not NCHW as well.

    Also true for tokens: [B, C, HW] that is a transposed view of a dense [B, HW, C].
    """
    if x.is_contiguous():
        return False
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def as_layout(x: Tensor, channels_last: bool) -> Tensor:
    """x in the asked layout; x itself where it already is."""
    if not channels_last or x.dim() < 3:
        return x.contiguous()
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def empty(shape: Sequence[int], channels_last: bool, like: Tensor) -> Tensor:
    """Uninitialised [N, C, *spatial] in the asked layout, with the dtype and device of `like`."""
    if not channels_last or len(shape) < 3:
        return like.new_empty(*shape)
    if len(shape) == 4:
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return like.new_empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
