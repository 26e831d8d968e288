# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the arguments of a Triton kernel have no Python type)
"""RMSNorm over rows of D elements.

    rstd = 1 / sqrt(mean(x^2) + eps)      y = x * rstd * weight

A program holds whole rows in registers, so x is read once. A row is two tiles: HEAD elements, the largest power of two
that fits, and TAIL, the next power of two from what is left (none where D is one): at most a quarter of the lanes are
idle, for 1280 or 1536 none. Short rows come several at a time.

The gradient of the weight is a sum over rows: every program sums the rows it does, in registers, and the programs' sums
are added in their order. No atomics: the same input gives the same bits. Everything is fp32 and rounded once at the
store.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import guard, multiprocessors

# bytes of a tile: two 16-byte loads in flight per thread. The backward pass reads two tensors, so it takes half of each
FORWARD_TILE, BACKWARD_TILE = 8192, 4096
MOST_ROWS = 64  # of a tile, which bounds the rounding error of the sums over rows
PROGRAMS_PER_MULTIPROCESSOR = 4  # of the backward pass: about as many as are resident at once
_SIZES = ["rows", "features", "row_stride", "tiles"]  # plain run-time arguments: VECTOR says what may be relied on


@dataclass(frozen=True)
class Config:
    """How rows are cut into tiles and tiles into programs."""

    head: int  # power of two
    tail: int  # power of two, or 0
    block_rows: int  # of a tile
    tiles: int  # that one program does, one after the other
    programs: int
    vector: int  # elements that one 16-byte access may hold; 1 where an access could be misaligned
    num_warps: int


@cache
def configure(
    rows: int, features: int, row_stride: int, itemsize: int, aligned: bool, tile: int, most_programs: int | None
) -> Config:
    """Config for [rows, features], in tiles of about so many bytes; aligned: whether every tensor starts at a multiple
    of 16 bytes. Programs do one tile each, or more where there would be more than `most_programs` of them."""
    whole = aligned and features * itemsize % 16 == 0 and row_stride * itemsize % 16 == 0
    head = 1 << (features.bit_length() - 1)
    tail = _power_of_2(features - head) if features > head else 0
    # elements that are loaded one by one need registers for an address each
    elements = tile // (itemsize if whole else 4)
    block_rows = max(1, min(elements // (head + tail), _power_of_2(rows), MOST_ROWS))
    block_rows = 1 << (block_rows.bit_length() - 1)
    all_tiles = -(-rows // block_rows)
    tiles = 1 if most_programs is None else -(-all_tiles // most_programs)
    # 16 elements of each tensor per thread in the backward pass, 32 in the forward pass: 64 registers for either
    warps = block_rows * (head + tail) // (tile // 8)
    return Config(
        head=head,
        tail=tail,
        block_rows=block_rows,
        tiles=tiles,
        programs=-(-all_tiles // tiles),
        vector=16 // itemsize if whole else 1,
        num_warps=min(32, max(4, _power_of_2(warps))),
    )


def _power_of_2(least: int) -> int:
    return 1 << (max(least, 1) - 1).bit_length()


@triton.jit
def _load(ptr, row, stride, column, mask):
    return tl.load(ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normalised(x, weight_ptr, column, inside, rstd):
    y = x * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=_SIZES)
def _rms_norm_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, rows, features, row_stride, eps,
    HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    # says nothing new about the values, but tells the compiler that every row starts aligned
    features, row_stride = features // VECTOR * VECTOR, row_stride // VECTOR * VECTOR
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    valid = row < rows
    column = tl.arange(0, HEAD)[None, :]
    in_head = valid & (column < features)
    head = _load(x_ptr, row, row_stride, column, in_head)
    squares = tl.sum(head * head, 1, keep_dims=True)
    if TAIL > 0:
        tail_column = HEAD + tl.arange(0, TAIL)[None, :]
        in_tail = valid & (tail_column < features)
        tail = _load(x_ptr, row, row_stride, tail_column, in_tail)
        squares += tl.sum(tail * tail, 1, keep_dims=True)

    rstd = 1.0 / tl.sqrt(squares / features.to(tl.float32) + eps)
    tl.store(rstd_ptr + row, rstd, mask=valid)
    y = _normalised(head, weight_ptr, column, column < features, rstd)
    tl.store(y_ptr + row * features + column, y.to(y_ptr.dtype.element_ty), mask=in_head)
    if TAIL > 0:
        y = _normalised(tail, weight_ptr, tail_column, tail_column < features, rstd)
        tl.store(y_ptr + row * features + tail_column, y.to(y_ptr.dtype.element_ty), mask=in_tail)


@triton.jit
def _scaled(grad_y_ptr, x_ptr, weight_ptr, row, features, row_stride, column, mask, rstd):
    """(grad_y, x_hat, grad_y * weight)"""
    grad_y = _load(grad_y_ptr, row, features, column, mask)
    x_hat = _load(x_ptr, row, row_stride, column, mask) * rstd
    g = grad_y
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + column, mask=column < features, other=0.0).to(tl.float32)
    return grad_y, x_hat, g


@triton.jit(do_not_specialize=_SIZES)
def _rms_norm_backward_kernel(
    grad_y_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, sums_ptr, rows, features, row_stride, tiles,
    HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """grad_x = rstd * (g - x_hat * mean(g * x_hat)) with g = grad_y * weight; sums [programs, D] of grad_y * x_hat."""
    features, row_stride = features // VECTOR * VECTOR, row_stride // VECTOR * VECTOR
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HEAD)[None, :]
    head_sum = tl.zeros([BLOCK_ROWS, HEAD], tl.float32)
    if TAIL > 0:
        tail_column = HEAD + tl.arange(0, TAIL)[None, :]
        tail_sum = tl.zeros([BLOCK_ROWS, TAIL], tl.float32)
    for tile in range(0, tiles):
        row = (program * tiles + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        valid = row < rows
        in_head = valid & (column < features)
        rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)
        grad_y, x_hat, g = _scaled(grad_y_ptr, x_ptr, weight_ptr, row, features, row_stride, column, in_head, rstd)
        head_sum += grad_y * x_hat
        mean = tl.sum(g * x_hat, 1, keep_dims=True)
        if TAIL > 0:
            in_tail = valid & (tail_column < features)
            tail_grad_y, tail_x_hat, tail_g = _scaled(
                grad_y_ptr, x_ptr, weight_ptr, row, features, row_stride, tail_column, in_tail, rstd
            )
            tail_sum += tail_grad_y * tail_x_hat
            mean += tl.sum(tail_g * tail_x_hat, 1, keep_dims=True)
        if grad_x_ptr is not None:
            mean /= features.to(tl.float32)
            target = grad_x_ptr + row * features
            grad_x = rstd * (g - x_hat * mean)
            tl.store(target + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=in_head)
            if TAIL > 0:
                grad_x = rstd * (tail_g - tail_x_hat * mean)
                tl.store(target + tail_column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=in_tail)

    if sums_ptr is not None:
        target = sums_ptr + program * features
        tl.store(target + column, tl.sum(head_sum, 0, keep_dims=True), mask=column < features)
        if TAIL > 0:
            tl.store(target + tail_column, tl.sum(tail_sum, 0, keep_dims=True), mask=tail_column < features)


def forward(
    x: Tensor,  # [..., D], rows row_stride apart
    weight: Tensor | None,  # [D], in the dtype of x or fp32
    eps: float,
    row_stride: int,
) -> tuple[Tensor, Tensor]:
    """(y like x, dense, rstd fp32 [rows])"""
    features = x.shape[-1]
    rows = x.numel() // features
    y = x.new_empty(*x.shape)
    rstd = x.new_empty(rows, dtype=torch.float32)
    aligned = _aligned(x, weight)
    config = configure(rows, features, row_stride, x.element_size(), aligned, FORWARD_TILE, None)
    with guard(x):
        _rms_norm_kernel[(config.programs,)](
            x, weight, y, rstd, rows, features, row_stride, eps, HEAD=config.head, TAIL=config.tail,
            BLOCK_ROWS=config.block_rows, VECTOR=config.vector, num_warps=config.num_warps,
        )  # fmt: skip
    return y, rstd


def backward(
    grad_y: Tensor,  # [..., D], dense
    x: Tensor,  # [..., D], rows row_stride apart
    weight: Tensor | None,  # [D]
    rstd: Tensor,  # fp32 [rows]
    row_stride: int,
    needs: tuple[bool, bool],  # x, weight
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x in its dtype, dense, and of weight in fp32; None where one is not needed or its input absent."""
    features, rows = x.shape[-1], rstd.shape[0]
    most = multiprocessors(x.device) * PROGRAMS_PER_MULTIPROCESSOR
    config = configure(
        rows, features, row_stride, x.element_size(), _aligned(x, weight, grad_y), BACKWARD_TILE, most
    )  # fmt: skip
    grad_x = x.new_empty(*x.shape) if needs[0] else None
    sums = rstd.new_empty(config.programs, features) if weight is not None and needs[1] else None
    with guard(x):
        _rms_norm_backward_kernel[(config.programs,)](
            grad_y, x, weight, rstd, grad_x, sums, rows, features, row_stride, config.tiles, HEAD=config.head,
            TAIL=config.tail, BLOCK_ROWS=config.block_rows, VECTOR=config.vector, num_warps=config.num_warps,
        )  # fmt: skip
    return grad_x, None if sums is None else sums.sum(0)


def _aligned(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
