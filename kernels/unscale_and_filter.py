# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the arguments of a Triton kernel have no Python type)
"""y = add + (x / scale, and 0 where that is not finite): fp32, rounded once. The scale is read on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import guard
from .scale_and_filter import configure, finite_or_zero


@triton.jit(do_not_specialize=["elements"])
def _unscale_kernel(x_ptr, scale_ptr, add_ptr, y_ptr, elements, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    # says nothing new about the value, but tells the compiler that whole vectors are inside
    elements = elements // VECTOR * VECTOR
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    y = finite_or_zero(tl.div_rn(x, tl.load(scale_ptr)))
    if add_ptr is not None:
        y += tl.load(add_ptr + at, mask=inside).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def unscale(x: Tensor, scale: Tensor, add: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y of `dtype`, like x; x and add are dense in one layout, scale is fp32 with one element."""
    y, elements = torch.empty_like(x, dtype=dtype), x.numel()
    config = configure(elements)
    with guard(x):
        _unscale_kernel[(triton.cdiv(elements, config.block),)](
            x, scale, add, y, elements, BLOCK=config.block, VECTOR=config.vector, num_warps=config.num_warps
        )
    return y
