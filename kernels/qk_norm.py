# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the arguments of a Triton kernel have no Python type)
"""RMSNorm of short rows, one per head of a token, written to their place among another stream's rows.

    y           = x * rstd * weight,   rstd = rsqrt(mean(x^2) + eps)     over the D elements of a row
    grad_x      = rstd * (g - x * rstd^2 * mean(g * x)),   g = grad_y * weight
    grad_weight = sum over all rows of grad_y * x * rstd

A tile is as many whole rows as give every thread two 16-byte accesses. x, y and the gradients have strides of their
own, so that views of a fused projection are read, and joint tensors written, in place.
Everything is fp32 and rounded once at the store. The sum over rows is split over a fixed number of programs and
added in their order: the same input gives the same bits.

Symbols: B samples, H heads, D head dim; rows are (sample, token, head) in this order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import guard, multiprocessors

PROGRAMS_PER_MULTIPROCESSOR = 8  # of 128 threads that hold two tiles each
NUM_WARPS = 4

# every integer is a plain run-time argument: neither a 1 nor a multiple of 16 makes another variant.
# What the compiler may rely on is said by VECTOR, and by the alignment of the pointers
_SIZES = ["rows", "tokens", "heads"]
_SIZES += [f"{tensor}_{axis}" for tensor in ("x", "y", "grad") for axis in ("batch", "token", "head")]


@dataclass(frozen=True)
class Config:
    """How rows are cut into programs."""

    block_r: int  # rows of a tile
    block_d: int  # the head dim, filled up to a power of two
    vector: int  # elements that one 16-byte access may hold; 1 where an access could be misaligned


@cache
def configure(head_dim: int, itemsize: int, aligned: bool) -> Config:
    """Config for rows of head_dim elements; aligned: whether every row starts at a multiple of 16 bytes."""
    vector = 16 // itemsize if aligned and head_dim * itemsize % 16 == 0 else 1
    block_d = 1 << (head_dim - 1).bit_length()
    # elements that are loaded one by one need registers for an address each
    return Config(max(1, NUM_WARPS * 32 * 2 * min(8, max(vector, 4)) // block_d), block_d, vector)


def programs(tiles: int, multiprocessors: int) -> int:
    """How many programs share the tiles of a backward pass, each leaving a sum over its rows."""
    return min(tiles, multiprocessors * PROGRAMS_PER_MULTIPROCESSOR)


@triton.jit
def _offsets(row, tokens, heads, batch_stride, token_stride, head_stride, VECTOR: tl.constexpr):
    """Where these rows begin, in elements."""
    token = row // heads
    # says nothing new about the values, but tells the compiler that every row starts aligned
    return (
        (token // tokens).to(tl.int64) * (batch_stride // VECTOR * VECTOR).to(tl.int64)
        + (token % tokens).to(tl.int64) * (token_stride // VECTOR * VECTOR).to(tl.int64)
        + (row % heads).to(tl.int64) * (head_stride // VECTOR * VECTOR).to(tl.int64)
    )


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    x_ptr, weight_ptr, y_ptr, rows, tokens, heads, x_batch, x_token, x_head, y_batch, y_token, y_head, eps,
    HEAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < HEAD)[None, :]
    source = _offsets(row, tokens, heads, x_batch, x_token, x_head, VECTOR)
    target = _offsets(row, tokens, heads, y_batch, y_token, y_head, VECTOR)
    x = tl.load(x_ptr + (source[:, None] + column[None, :]), mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / HEAD) + eps)
    weight = tl.load(weight_ptr + column, mask=column < HEAD, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + (target[:, None] + column[None, :]), y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, "tiles"])
def _backward_kernel(
    x_ptr, weight_ptr, grad_ptr, grad_x_ptr, sums_ptr, rows, tokens, heads,
    x_batch, x_token, x_head, grad_batch, grad_token, grad_head, y_batch, y_token, y_head, eps, tiles,
    HEAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Tiles of this program, `programs` apart; sums [programs, D] gets their part of grad_weight."""
    column = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < HEAD, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (column < HEAD)[None, :]
        source = _offsets(row, tokens, heads, x_batch, x_token, x_head, VECTOR)
        grads = _offsets(row, tokens, heads, grad_batch, grad_token, grad_head, VECTOR)
        x = tl.load(x_ptr + (source[:, None] + column[None, :]), mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + (grads[:, None] + column[None, :]), mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / HEAD) + eps)
        x_hat = x * rstd[:, None]
        if sums_ptr is not None:
            total += grad * x_hat
        if grad_x_ptr is not None:
            g = grad * weight[None, :]
            mean = tl.sum(g * x_hat, 1) * (1.0 / HEAD)
            target = _offsets(row, tokens, heads, y_batch, y_token, y_head, VECTOR)
            grad_x = (g - x_hat * mean[:, None]) * rstd[:, None]
            tl.store(
                grad_x_ptr + (target[:, None] + column[None, :]), grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside
            )
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0) * HEAD + column, tl.sum(total, 0), mask=column < HEAD)


def _configure(*tensors: Tensor | None) -> Config:
    x = tensors[0]
    assert x is not None
    itemsize = x.element_size()
    aligned = all(
        t is None or (t.data_ptr() % 16 == 0 and all(stride * itemsize % 16 == 0 for stride in t.stride()[:3]))
        for t in tensors
    )
    return configure(x.shape[3], itemsize, aligned)


def forward(
    x: Tensor,  # [B, tokens, H, D], any strides with D contiguous
    weight: Tensor,  # [D], in the dtype of x or fp32
    y: Tensor,  # [B, tokens, H, D]: where it goes
    eps: float,
) -> None:
    """y = x * rsqrt(mean(x^2) + eps) * weight."""
    batch, tokens, heads, head_dim = x.shape
    rows = batch * tokens * heads
    if rows == 0:
        return
    config = _configure(x, y)
    with guard(x):
        _forward_kernel[(triton.cdiv(rows, config.block_r),)](
            x, weight, y, rows, tokens, heads, *x.stride()[:3], *y.stride()[:3], eps,
            HEAD=head_dim, BLOCK_R=config.block_r, BLOCK_D=config.block_d, VECTOR=config.vector, num_warps=NUM_WARPS,
        )  # fmt: skip


def backward(
    x: Tensor,  # [B, tokens, H, D]
    weight: Tensor,  # [D]
    grad: Tensor,  # [B, tokens, H, D], any strides with D contiguous
    eps: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(grad_x in x's dtype, grad_weight fp32 [D]), None where one is not needed."""
    grad_x = torch.empty_like(x) if need_x else None
    batch, tokens, heads, head_dim = x.shape
    rows = batch * tokens * heads
    if rows == 0:
        return grad_x, x.new_zeros(head_dim, dtype=torch.float32) if need_weight else None
    config = _configure(x, grad, grad_x)
    tiles = triton.cdiv(rows, config.block_r)
    count = programs(tiles, multiprocessors(x.device))
    sums = x.new_empty(count, head_dim, dtype=torch.float32) if need_weight else None
    target = x if grad_x is None else grad_x
    with guard(x):
        _backward_kernel[(count,)](
            x, weight, grad, grad_x, sums, rows, tokens, heads,
            *x.stride()[:3], *grad.stride()[:3], *target.stride()[:3], eps, tiles,
            HEAD=head_dim, BLOCK_R=config.block_r, BLOCK_D=config.block_d, VECTOR=config.vector, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_x, None if sums is None else sums.sum(0)
