# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment
# ruff: noqa: RUF005
# (the arguments of a Triton kernel have no Python type, its tuples grow, and it knows no unpacking)
"""The row kernels of the LayerNorm family.

    r   = x + gate * y                                  or x alone
    out = (r - mean) * rstd * factor + shift            factor = 1 + scale, or the weight of all samples

A row lies in the registers of one warp, or of a few, from its load to its store: the mean, then the deviations from it,
whose sum corrects the mean (Chan, Golub & LeVeque, 1983), then the output. r is rounded before its statistics are
taken. Everything is fp32 and rounded once at each store. The backward pass sums over rows in programs of a fixed
share each, and a second kernel adds those sums in order: no atomics, the same input gives the same bits.

Modulations are loaded as tiles whose rows are all the same row: in the layout of x, without a trip through shared
memory. Symbols: L rows of a sample, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layer_norm_config import BACKWARD_ELEMENTS, FORWARD_ELEMENTS, Config, configure, split
from .device import guard, multiprocessors

# every integer is a plain run-time argument: neither a 1 nor a multiple of 16 makes another variant.
# What the compiler may rely on is said by VECTOR, and by the alignment of the pointers
_SIZES = ["samples", "rows", "d", "gate_stride", "scale_stride", "shift_stride", "chunks", "steps", "sums"]


@triton.jit
def _load(ptr, at, inside, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    """The pieces of a tile of rows, in their own dtype, so that all loads are under way before the first is used."""
    pieces = ()
    for i in tl.static_range(PIECES):
        pieces = pieces + (tl.load(ptr + at + i * WIDTH, mask=inside[i], other=0.0),)
    return pieces


@triton.jit
def _inside(present, d, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    """The mask of each piece."""
    column = tl.arange(0, WIDTH)
    masks = ()
    for i in tl.static_range(PIECES):
        masks = masks + (present[:, None] & (column + i * WIDTH < d)[None, :],)
    return masks


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, r_ptr, out_ptr, statistics_ptr,
    samples, rows, d, gate_stride, scale_stride, shift_stride, eps,
    SCALE_ADDED: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """out of ROWS rows of one sample, r where there is a y, and mean and rstd [2, samples * L]."""
    # says nothing new about the values, but tells the compiler that every row starts aligned
    d, gate_stride = d // VECTOR * VECTOR, gate_stride // VECTOR * VECTOR
    scale_stride, shift_stride = scale_stride // VECTOR * VECTOR, shift_stride // VECTOR * VECTOR
    blocks = tl.cdiv(rows, ROWS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    present = row < rows
    inside = _inside(present, d, PIECES, WIDTH)
    column = tl.arange(0, WIDTH)[None, :]
    same = column + tl.zeros([ROWS, 1], tl.int32)
    row = sample * rows + row
    at = row[:, None] * d + column

    x = _load(x_ptr, at, inside, PIECES, WIDTH)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    r = ()
    if y_ptr is None:
        for i in tl.static_range(PIECES):
            r = r + (x[i].to(tl.float32),)
            total += r[i]
    else:
        y = _load(y_ptr, at, inside, PIECES, WIDTH)
        if gate_ptr is not None:
            gate = _load(gate_ptr + sample * gate_stride, same, inside, PIECES, WIDTH)
        for i in tl.static_range(PIECES):
            added = y[i].to(tl.float32)
            if gate_ptr is not None:
                added *= gate[i].to(tl.float32)
            stored = (x[i].to(tl.float32) + added).to(r_ptr.dtype.element_ty)
            tl.store(r_ptr + at + i * WIDTH, stored, mask=inside[i])
            r = r + (stored.to(tl.float32),)
            total += r[i]
    mean = tl.sum(total, 1) / d

    total = tl.zeros([ROWS, WIDTH], tl.float32)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.static_range(PIECES):
        deviation = tl.where(inside[i], r[i] - mean[:, None], 0.0)
        total += deviation
        squares += deviation * deviation
    lost = tl.sum(total, 1) / d
    variance = tl.sum(squares, 1) / d - lost * lost
    variance = tl.where(variance < 0.0, 0.0, variance)  # NaN stays
    mean += lost
    rstd = tl.math.div_rn(1.0, tl.sqrt_rn(variance + tl.cast(eps, tl.float32)))
    tl.store(statistics_ptr + row, mean, mask=present)
    tl.store(statistics_ptr + samples.to(tl.int64) * rows + row, rstd, mask=present)

    scale = _load(scale_ptr + sample * scale_stride, same, inside, PIECES, WIDTH)
    shift = _load(shift_ptr + sample * shift_stride, same, inside, PIECES, WIDTH)
    for i in tl.static_range(PIECES):
        factor = scale[i].to(tl.float32) + SCALE_ADDED
        out = (r[i] - mean[:, None]) * rstd[:, None] * factor + shift[i].to(tl.float32)
        tl.store(out_ptr + at + i * WIDTH, out.to(out_ptr.dtype.element_ty), mask=inside[i])


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    grad_r_ptr, grad_out_ptr, r_ptr, y_ptr, gate_ptr, scale_ptr, statistics_ptr, grad_x_ptr, grad_y_ptr, sums_ptr,
    samples, rows, d, gate_stride, scale_stride, chunks, steps,
    SCALE_ADDED: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dr = rstd * (g * factor - rhat * mean(g * factor * rhat) - mean(g * factor)) + grad_r; grad_x = dr, grad_y = gate
    * dr; and the sums over the rows of this chunk of g * rhat, g and, with a y, dr * y: [2 or 3, samples, chunks, D].
    """
    d, gate_stride, scale_stride = d // VECTOR * VECTOR, gate_stride // VECTOR * VECTOR, scale_stride // VECTOR * VECTOR
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * (steps * ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    same = column + tl.zeros([ROWS, 1], tl.int32)
    everywhere = _inside(tl.full([ROWS], True, tl.int1), d, PIECES, WIDTH)
    scale = _load(scale_ptr + sample * scale_stride, same, everywhere, PIECES, WIDTH)
    if gate_ptr is not None:
        gate = _load(gate_ptr + sample * gate_stride, same, everywhere, PIECES, WIDTH)
    sum_scale, sum_shift, sum_gate = (), (), ()
    for _ in tl.static_range(PIECES):
        sum_scale = sum_scale + (tl.zeros([ROWS, WIDTH], tl.float32),)
        sum_shift = sum_shift + (tl.zeros([ROWS, WIDTH], tl.float32),)
        sum_gate = sum_gate + (tl.zeros([ROWS, WIDTH], tl.float32),)

    for step in range(0, tl.minimum(steps, tl.cdiv(rows - begin, ROWS))):
        row = begin + step * ROWS + tl.arange(0, ROWS)
        present = row < rows
        inside = _inside(present, d, PIECES, WIDTH)
        row = sample * rows + row
        at = row[:, None] * d + column
        r = _load(r_ptr, at, inside, PIECES, WIDTH)
        g = _load(grad_out_ptr, at, inside, PIECES, WIDTH)
        if grad_r_ptr is not None:
            grad_r = _load(grad_r_ptr, at, inside, PIECES, WIDTH)
        if y_ptr is not None:
            y = _load(y_ptr, at, inside, PIECES, WIDTH)
        mean = tl.load(statistics_ptr + row, mask=present, other=0.0)
        rstd = tl.load(statistics_ptr + samples.to(tl.int64) * rows + row, mask=present, other=0.0)

        total = tl.zeros([ROWS, WIDTH], tl.float32)
        product = tl.zeros([ROWS, WIDTH], tl.float32)
        rhat, scales, shifts = (), (), ()
        for i in tl.static_range(PIECES):
            rhat = rhat + ((r[i].to(tl.float32) - mean[:, None]) * rstd[:, None],)
            grad = g[i].to(tl.float32)
            scales = scales + (sum_scale[i] + grad * rhat[i],)
            shifts = shifts + (sum_shift[i] + grad,)
            grad *= scale[i].to(tl.float32) + SCALE_ADDED
            total += grad
            product += tl.where(inside[i], grad * rhat[i], 0.0)
        sum_scale, sum_shift = scales, shifts
        m1 = tl.sum(total, 1) / d
        m2 = tl.sum(product, 1) / d

        gates = ()
        for i in tl.static_range(PIECES):
            grad = g[i].to(tl.float32) * (scale[i].to(tl.float32) + SCALE_ADDED)
            # m1 comes last: fused with the product it would not cancel to zero in a row of one element
            grad = (grad - rhat[i] * m2[:, None] - m1[:, None]) * rstd[:, None]
            if grad_r_ptr is not None:
                grad += grad_r[i].to(tl.float32)
            if grad_x_ptr is not None:
                tl.store(grad_x_ptr + at + i * WIDTH, grad.to(grad_x_ptr.dtype.element_ty), mask=inside[i])
            if grad_y_ptr is not None:
                value = grad * gate[i].to(tl.float32)
                tl.store(grad_y_ptr + at + i * WIDTH, value.to(grad_y_ptr.dtype.element_ty), mask=inside[i])
            if y_ptr is not None:
                gates = gates + (sum_gate[i] + grad * y[i].to(tl.float32),)
        if y_ptr is not None:
            sum_gate = gates

    plane = samples.to(tl.int64) * chunks * d
    for i in tl.static_range(PIECES):
        column = tl.arange(0, WIDTH) + i * WIDTH
        target = sums_ptr + tl.program_id(0).to(tl.int64) * d + column
        tl.store(target, tl.sum(sum_scale[i], 0), mask=column < d)
        tl.store(target + plane, tl.sum(sum_shift[i], 0), mask=column < d)
        if y_ptr is not None:
            tl.store(target + 2 * plane, tl.sum(sum_gate[i], 0), mask=column < d)


@triton.jit(do_not_specialize=_SIZES)
def _sum_chunks_kernel(
    sums_ptr, total_ptr, d, chunks, sums, WIDTH: tl.constexpr, DEPTH: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """[sums, chunks, D] -> [sums, D], the chunks in fixed order."""
    d = d // VECTOR * VECTOR
    column = tl.program_id(0) // sums * WIDTH + tl.arange(0, WIDTH)
    plane = (tl.program_id(0) % sums).to(tl.int64)
    total = tl.zeros([DEPTH, WIDTH], tl.float32)
    for first in range(0, chunks, DEPTH):
        chunk = first + tl.arange(0, DEPTH)
        at = (plane * chunks + chunk[:, None]) * d + column[None, :]
        total += tl.load(sums_ptr + at, mask=(chunk < chunks)[:, None] & (column < d)[None, :], other=0.0)
    tl.store(total_ptr + plane * d + column, tl.sum(total, 0), mask=column < d)


def _configure(x: Tensor, others: tuple[Tensor | None, ...], strides: tuple[int, ...], elements: int) -> Config:
    """others: all tensors besides x whose rows are read or written in vectors."""
    vector = 16 // x.element_size()
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (x, *others))
    return configure(x.shape[-1], x.element_size(), aligned and all(s % vector == 0 for s in strides), elements)


def _stride(rows: Tensor | None) -> int:
    """Elements from the row of one sample to that of the next; 0 for what all samples share."""
    return rows.stride(0) if rows is not None and rows.dim() > 1 else 0


def forward(
    x: Tensor,  # [B, *, D], contiguous
    y: Tensor | None,  # like x
    gate: Tensor | None,  # [B, D] or [B, 1, D], rows anywhere
    scale: Tensor,  # [B, D] or [B, 1, D], or [D] for all samples
    shift: Tensor,  # like scale
    eps: float,
    scale_added: float,  # 1 where the factor is 1 + scale
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(r or None without a y, out, both like x, statistics fp32 [2 * rows of x]: mean, then rstd of each row of r)."""
    d, out = x.shape[-1], torch.empty_like(x)
    samples = scale.shape[0] if scale.dim() > 1 else 1
    all_rows = x.numel() // d
    r = None if y is None else torch.empty_like(x)
    statistics = x.new_empty(2 * all_rows, dtype=torch.float32)
    strides = (_stride(gate), _stride(scale), _stride(shift))
    config = _configure(x, (y, gate, scale, shift), strides, FORWARD_ELEMENTS)
    rows = all_rows // samples
    with guard(x):
        _forward_kernel[(samples * config.blocks(rows),)](
            x, y, gate, scale, shift, r, out, statistics, samples, rows, d, *strides, eps,
            SCALE_ADDED=scale_added, PIECES=config.pieces, WIDTH=config.width, ROWS=config.rows, VECTOR=config.vector,
            num_warps=config.num_warps,
        )  # fmt: skip
    return r, out, statistics


def backward(
    grad_r: Tensor | None,  # like r
    grad_out: Tensor,  # like r
    r: Tensor,  # [B, *, D], contiguous
    y: Tensor | None,  # like r; None where the gradient of the gate is not wanted
    gate: Tensor | None,  # as in forward; None where there is none or grad_y is not wanted
    scale: Tensor,  # [B, D] or [B, 1, D], or [D] for all samples
    statistics: Tensor,  # fp32 [2 * rows]
    scale_added: float,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(gradient of x, of y where there is a gate, fp32 [2 or 3, samples, D]: of scale, shift and, with a y, gate)."""
    d, all_rows = r.shape[-1], statistics.shape[0] // 2
    samples = scale.shape[0] if scale.dim() > 1 else 1
    grad_x = torch.empty_like(r) if needs_x else None
    grad_y = None if gate is None else torch.empty_like(r)
    strides = (_stride(gate), _stride(scale))
    config = _configure(r, (grad_r, grad_out, y, gate, scale), strides, BACKWARD_ELEMENTS)
    rows = all_rows // samples
    count = 2 if y is None else 3
    chunks, steps = split(samples, config.blocks(rows), config.num_warps, count, multiprocessors(r.device))
    sums = r.new_empty(count, samples, chunks, d, dtype=torch.float32)
    totals = r.new_empty(count, samples, d, dtype=torch.float32)
    with guard(r):
        _backward_kernel[(samples * chunks,)](
            grad_r, grad_out, r, y, gate, scale, statistics, grad_x, grad_y, sums,
            samples, rows, d, *strides, chunks, steps,
            SCALE_ADDED=scale_added, PIECES=config.pieces, WIDTH=config.width, ROWS=config.rows, VECTOR=config.vector,
            num_warps=config.num_warps,
        )  # fmt: skip
        _sum_chunks_kernel[(count * samples * triton.cdiv(d, 32),)](
            sums, totals, d, chunks, count * samples, WIDTH=32, DEPTH=64, VECTOR=config.vector, num_warps=4
        )
    return grad_x, grad_y, totals
