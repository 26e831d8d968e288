# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the arguments of a Triton kernel have no Python type)
"""What geglu and swiglu share: y = value * act(gate) over the halves of every row of h [rows, 2F].

The output is cut into units of VECTOR neighbouring elements, which is what one 16-byte access holds, and a program
does UNITS of them, wherever rows end: no lane is lost to any F. One integer division places a unit, not an element.
Everything is fp32 and rounded once at the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from .device import guard

_SIZES = ["rows", "features", "row_stride"]  # plain run-time arguments: VECTOR says what the compiler may rely on


@dataclass(frozen=True)
class Config:
    """How one launch is cut."""

    units: int  # of a program
    vector: int  # elements of a unit: those of a 16-byte access, 1 where an access could be misaligned
    num_warps: int

    def programs(self, elements: int) -> int:
        return -(-elements // (self.units * self.vector))


@cache
def configure(features: int, row_stride: int, itemsize: int, aligned: bool) -> Config:
    """Config for rows of `features` outputs; aligned: whether every tensor starts at a multiple of 16 bytes."""
    whole = aligned and features * itemsize % 16 == 0 and row_stride * itemsize % 16 == 0
    # two 16-byte accesses of each half in flight per thread, or four of single elements
    return Config(units=256 if whole else 512, vector=16 // itemsize if whole else 1, num_warps=4)


@triton.jit
def gauss(x, PRECISE: tl.constexpr):
    """(Phi(x), phi(x)) of the normal distribution, from one exponential; see csrc/cpu/gauss.h for the coefficients.

    For a = |x|, Phi(-a) = exp(-a^2 / 2) * (quotient of polynomials), so the left tail keeps its digits."""
    a = tl.minimum(tl.abs(x), 20.0)  # where the exponential is zero
    if PRECISE:
        # a^2 = high^2 + rest with high^2 exact, and exp(-a^2 / 2) = 2^-n exp(-r)
        high = (a.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        n = tl.floor(a * a * 0.72134752 + 0.5)
        r = (0.5 * high * high - n * 0.693359375) + n * 2.12194440e-4 + 0.5 * (a - high) * (a + high)
        exponential = tl.exp2(-n) * tl.exp2(-1.44269504 * r)
        over = (((0.0060302674 * a + 0.059976143) * a + 0.27195981) * a + 0.65352906) * a + 0.75
        under = (((0.015115424 * a + 0.15034897) * a + 0.69656963) * a + 1.791725) * a + 2.5038855
        under = under * a + 1.5
    else:
        exponential = tl.exp2(-0.72134752 * a * a)
        over = (6.2038982e-2 * a + 2.7711813e-1) * a + 5.0001147e-1
        under = ((1.5532072e-1 * a + 6.9990624e-1) * a + 1.3528373) * a + 1.0
    tail = exponential * over / under
    return tl.where(x < 0.0, tail, 1.0 - tail), exponential * 0.39894228


@triton.jit
def _activated(x, GELU: tl.constexpr, PRECISE: tl.constexpr):
    """act(x) and its derivative."""
    if GELU:
        cdf, pdf = gauss(x, PRECISE)
        return x * cdf, cdf + x * pdf
    else:
        s = 1.0 / (1.0 + tl.exp(-x))
        return x * s, s + x * s * (1.0 - s)


@triton.jit
def _place(rows, features, UNITS: tl.constexpr, VECTOR: tl.constexpr):
    """(row, column of its first element, index of it in y, whether it exists) of each unit of this program, [UNITS, 1],
    and the elements of a unit, [1, VECTOR]."""
    per_row = features // VECTOR
    start = tl.program_id(0).to(tl.int64) * UNITS
    first_row = start // per_row
    lane = tl.arange(0, UNITS)
    unit = (start - first_row * per_row).to(tl.int32) + lane
    row = unit // per_row
    column = (unit - row * per_row) * VECTOR
    inside = start + lane < rows.to(tl.int64) * per_row
    y = (start + lane) * VECTOR
    return (first_row + row)[:, None], column[:, None], y[:, None], inside[:, None], tl.arange(0, VECTOR)[None, :]


@triton.jit(do_not_specialize=_SIZES)
def _gate_forward_kernel(
    h_ptr, y_ptr, rows, features, row_stride,
    GELU: tl.constexpr, GATE_FIRST: tl.constexpr, UNITS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    # says nothing new about the values, but tells the compiler that every unit starts aligned
    features, row_stride = features // VECTOR * VECTOR, row_stride // VECTOR * VECTOR
    row, column, y_at, inside, element = _place(rows, features, UNITS, VECTOR)
    at = row * row_stride + column + element
    mask = inside & (element < VECTOR)
    first = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(h_ptr + features + at, mask=mask, other=0.0).to(tl.float32)
    value, gate = (second, first) if GATE_FIRST else (first, second)
    activated, _ = _activated(gate, GELU, y_ptr.dtype.element_ty == tl.float32)
    tl.store(y_ptr + y_at + element, (value * activated).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _gate_backward_kernel(
    grad_y_ptr, h_ptr, grad_h_ptr, rows, features, row_stride,
    GELU: tl.constexpr, GATE_FIRST: tl.constexpr, UNITS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    features, row_stride = features // VECTOR * VECTOR, row_stride // VECTOR * VECTOR
    row, column, y_at, inside, element = _place(rows, features, UNITS, VECTOR)
    at = row * row_stride + column + element
    mask = inside & (element < VECTOR)
    first = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(h_ptr + features + at, mask=mask, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + y_at + element, mask=mask, other=0.0).to(tl.float32)
    value, gate = (second, first) if GATE_FIRST else (first, second)
    activated, slope = _activated(gate, GELU, grad_h_ptr.dtype.element_ty == tl.float32)
    grad_value, grad_gate = grad_y * activated, grad_y * value * slope
    grad_first, grad_second = (grad_gate, grad_value) if GATE_FIRST else (grad_value, grad_gate)
    target = grad_h_ptr + row * 2 * features + column + element
    tl.store(target, grad_first.to(grad_h_ptr.dtype.element_ty), mask=mask)
    tl.store(target + features, grad_second.to(grad_h_ptr.dtype.element_ty), mask=mask)


def forward(h: Tensor, row_stride: int, *, gelu: bool, gate_first: bool) -> Tensor:
    """y [..., F]"""
    features = h.shape[-1] // 2
    y = h.new_empty(*h.shape[:-1], features)
    config = configure(features, row_stride, h.element_size(), h.data_ptr() % 16 == 0)
    with guard(h):
        _gate_forward_kernel[(config.programs(y.numel()),)](
            h, y, y.numel() // features, features, row_stride, GELU=gelu, GATE_FIRST=gate_first,
            UNITS=config.units, VECTOR=config.vector, num_warps=config.num_warps,
        )  # fmt: skip
    return y


def backward(grad_y: Tensor, h: Tensor, row_stride: int, *, gelu: bool, gate_first: bool) -> Tensor:
    """Gradient of h [..., 2F], dense"""
    features = h.shape[-1] // 2
    grad_h = h.new_empty(*h.shape)
    aligned = h.data_ptr() % 16 == 0 and grad_y.data_ptr() % 16 == 0
    config = configure(features, row_stride, h.element_size(), aligned)
    with guard(h):
        _gate_backward_kernel[(config.programs(grad_y.numel()),)](
            grad_y, h, grad_h, grad_y.numel() // features, features, row_stride, GELU=gelu, GATE_FIRST=gate_first,
            UNITS=config.units, VECTOR=config.vector, num_warps=config.num_warps,
        )  # fmt: skip
    return grad_h
