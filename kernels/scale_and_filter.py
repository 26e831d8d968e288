# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the arguments of a Triton kernel have no Python type)
"""y = x * scale, and 0 where that is not finite: fp32, rounded once. The scale is read on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import guard


@dataclass(frozen=True)
class Config:
    """How one launch is cut: programs of `block` elements."""

    block: int
    num_warps: int
    vector: int  # divides the number of elements, so that accesses of that many can be proven to be inside


def configure(elements: int) -> Config:
    """Config for a tensor of `elements` elements: eight a thread, which is 16 bytes of the narrowest dtype."""
    return Config(block=2048, num_warps=8, vector=8 if elements % 8 == 0 else 1)


@triton.jit
def finite_or_zero(value):
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit(do_not_specialize=["elements"])
def _scale_kernel(x_ptr, scale_ptr, y_ptr, elements, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    # says nothing new about the value, but tells the compiler that whole vectors are inside
    elements = elements // VECTOR * VECTOR
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    y = finite_or_zero(x * tl.load(scale_ptr))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """y of `dtype`, like x, which is dense; scale fp32 with one element."""
    y, elements = torch.empty_like(x, dtype=dtype), x.numel()
    config = configure(elements)
    with guard(x):
        _scale_kernel[(triton.cdiv(elements, config.block),)](
            x, scale, y, elements, BLOCK=config.block, VECTOR=config.vector, num_warps=config.num_warps
        )
    return y
