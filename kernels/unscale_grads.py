# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the arguments of a Triton kernel have no Python type)
"""grads[i] /= scales[i] in place, the L2 norm of all of them, and which hold a NaN or Inf.

A Triton kernel takes no list of pointers, so each tensor has its own launch: about ten microseconds of the host for
each, where the CUDA C++ column has one launch for 160. Every program leaves its sum of squares in one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import guard

CHUNK = 16384  # elements of a program
BLOCK = 2048  # elements of one of its steps
NUM_WARPS = 8


@triton.jit(do_not_specialize=["tensor", "scale_at", "elements", "first"])
def _unscale_grads_kernel(
    grad_ptr, scales_ptr, squares_ptr, nonfinite_ptr, tensor, scale_at, elements, first,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    # says nothing new about the value, but tells the compiler that whole vectors are inside
    elements = elements // VECTOR * VECTOR
    scale = tl.load(scales_ptr + scale_at)
    chunk = tl.program_id(0)
    at = chunk.to(tl.int64) * CHUNK + tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for _ in range(CHUNK // BLOCK):
        inside = at < elements
        quotient = tl.div_rn(tl.load(grad_ptr + at, mask=inside).to(tl.float32), scale)
        stored = quotient.to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + at, stored, mask=inside)
        quotient = tl.where(inside, quotient, 0.0)
        squares += quotient * quotient
        wrong |= (inside & ~(tl.abs(stored.to(tl.float32)) < float("inf"))).to(tl.int32)
        at += BLOCK
    total = tl.sum(squares)
    if tl.max(wrong) > 0:
        total = float("nan")
        tl.store(nonfinite_ptr + tensor, 1)  # whoever writes, writes the same
    tl.store(squares_ptr + first + chunk, total)


def unscale(scales: Tensor, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(norm, nonfinite) of dense gradients, which are written in place; scales fp32 [n] of any stride."""
    chunks = [triton.cdiv(grad.numel(), CHUNK) for grad in grads]
    squares = scales.new_empty(sum(chunks))
    nonfinite = scales.new_zeros(len(grads), dtype=torch.bool)
    with guard(scales):
        for i, (grad, count, end) in enumerate(zip(grads, chunks, accumulate(chunks), strict=True)):
            if count == 0:
                continue
            _unscale_grads_kernel[(count,)](
                grad, scales, squares, nonfinite, i, i * scales.stride(0), grad.numel(), end - count,
                CHUNK=CHUNK, BLOCK=BLOCK, VECTOR=8 if grad.numel() % 8 == 0 else 1, num_warps=NUM_WARPS,
            )  # fmt: skip
    return squares.sum(dtype=torch.float64).sqrt().to(scales.dtype), nonfinite
