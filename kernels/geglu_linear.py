# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the arguments of a Triton kernel have no Python type)
"""y = value * gelu(gate), [value, gate] = x @ weight^T + bias, without writing [value, gate].

A program multiplies a tile of x with the rows of weight that make its values and with those that make its gates, so
that it has both halves of its outputs when it is done: the activation is the end of the product. Sums, bias and
activation are fp32, rounded once at the store. Tiles run in groups of a few rows, whose shares of x and weight stay in
L2 meanwhile (Triton's matrix multiplication tutorial).

Symbols: M rows, N features, K depth.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ._gate import gauss
from .device import architecture, guard, multiprocessors
from .geglu_linear_config import configure

_SIZES = ["rows", "features", "depth", "x_stride"]  # plain run-time arguments: VECTOR says what may be relied on


@triton.jit
def _tile_of(program, rows, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(first row, first column) of a program: GROUP_M tiles downwards, then the next column of tiles."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(features, BLOCK_N)
    group = program // (GROUP_M * across)
    height = tl.minimum(down - group * GROUP_M, GROUP_M)
    place = program - group * GROUP_M * across
    column = place // height
    return (group * GROUP_M + place - column * height) * BLOCK_M, column * BLOCK_N


@triton.jit
def _halves(x):
    """The left and the right half of the columns."""
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit(do_not_specialize=_SIZES)
def _geglu_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, rows, features, depth, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of BLOCK_N features."""
    # says nothing new about the values, but tells the compiler that every row starts aligned
    features = features // VECTOR * VECTOR
    depth, x_stride = depth // VECTOR * VECTOR, (x_stride // VECTOR * VECTOR).to(tl.int64)
    first_row, first_feature = _tile_of(tl.program_id(0), rows, features, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = first_row.to(tl.int64)
    row, feature, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_inside = row < rows - first_row
    feature_inside = feature < features - first_feature

    x_at = x_ptr + first_row * x_stride + (row[:, None] * x_stride + k[None, :])
    weight_ptr += first_feature.to(tl.int64) * depth
    value_at = weight_ptr + (feature[:, None].to(tl.int64) * depth + k[None, :])
    gate_at = value_at + features.to(tl.int64) * depth
    value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if bias_ptr is not None:
        # the sums begin with it: at their end it would need registers beside theirs
        bias_at = bias_ptr + first_feature + feature
        value += tl.load(bias_at, mask=feature_inside, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_at + features, mask=feature_inside, other=0.0).to(tl.float32)[None, :]
    for start in tl.range(0, depth, BLOCK_K):
        k_inside = (k < depth - start)[None, :]
        x = tl.load(x_at + start, mask=row_inside[:, None] & k_inside, other=0.0)
        value_weight = tl.load(value_at + start, mask=feature_inside[:, None] & k_inside, other=0.0)
        gate_weight = tl.load(gate_at + start, mask=feature_inside[:, None] & k_inside, other=0.0)
        value = tl.dot(x, tl.trans(value_weight), value, input_precision="ieee")
        gate = tl.dot(x, tl.trans(gate_weight), gate, input_precision="ieee")

    y_ptr += first_row * features + first_feature
    values, gates = _halves(value), _halves(gate)
    for half in tl.static_range(2):
        # one half after the other: the activation of both at once would need more registers than there are
        column = half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        cdf, _ = gauss(gates[half], y_ptr.dtype.element_ty == tl.float32)
        y = (values[half] * (gates[half] * cdf)).to(y_ptr.dtype.element_ty)
        y_at = y_ptr + (row[:, None].to(tl.int64) * features + column[None, :])
        tl.store(y_at, y, mask=row_inside[:, None] & (column < features - first_feature)[None, :])


def forward(
    x: Tensor,  # [..., K], rows x_stride apart
    weight: Tensor,  # [2N, K], dense
    bias: Tensor | None,  # [2N], dense
    x_stride: int,
) -> Tensor:
    """[..., N]"""
    features, depth = weight.shape[0] // 2, weight.shape[1]
    y = x.new_empty(*x.shape[:-1], features)
    if y.numel() == 0:
        return y
    rows = math.prod(x.shape[:-1])
    aligned = x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    config = configure(
        rows, features, depth, x_stride, x.element_size(), aligned, architecture(x.device), multiprocessors(x.device)
    )
    with guard(x):
        _geglu_linear_kernel[(config.programs(rows, features),)](
            x, weight, bias, y, rows, features, depth, x_stride,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
            VECTOR=config.vector, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y
