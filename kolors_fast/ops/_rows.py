"""Tensors as rows of their last axis: the layout of the ops that work row by row."""

from __future__ import annotations

from torch import Tensor


def row_stride(x: Tensor) -> int | None:
    """Elements from one row of x [..., D] to the next, or None where it differs or the row itself is strided.

    A chunk of a wider tensor along its last axis has one; what is transposed has none.
    """
    if x.is_contiguous():
        return x.shape[-1]
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    stride, span = None, 0
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != span:
            return None
        span = step * size
    return x.shape[-1] if stride is None else stride


def as_rows(x: Tensor) -> Tensor:
    """x itself where its rows have one stride, a dense copy elsewhere."""
    return x if row_stride(x) is not None else x.contiguous()
