# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the arguments of a Triton kernel have no Python type)
"""Guidance and one scheduler step in one launch, with the coefficients read on the device.

    guided   = sum_p weights[p] * predictions[p]
    next     = c0*sample + c1*guided + c2*previous + c3*noise
    denoised = c4*sample + c5*guided

All arithmetic is fp32, with one rounding at each store.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import guard

COEFFICIENTS = tl.constexpr(6)


@dataclass(frozen=True)
class Config:
    """How one launch is cut: programs of `block` elements."""

    block: int
    num_warps: int
    vector: int  # elements that one 16-byte access may hold; 1 where an access could be misaligned


def configure(elements: int, itemsize: int, aligned: bool) -> Config:
    """Config for a sample of `elements` elements whose narrowest tensor has `itemsize` bytes per element; aligned:
    whether every tensor starts at a multiple of 16 bytes.

    The latents of a 1024x1024 picture are 65,536 elements per sample, so blocks are small: the launch is
    bound by latency, and more of them answer sooner.
    """
    vector = 16 // itemsize
    return Config(block=512, num_warps=2, vector=vector if aligned and elements % vector == 0 else 1)


@triton.jit(do_not_specialize=["elements"])
def _step_kernel(
    sample_ptr, predictions_ptr, weights_ptr, coefficients_ptr, row_ptr, previous_ptr, noise_ptr,
    next_ptr, denoised_ptr, elements,
    PREDICTIONS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    # says nothing new about the value, but tells the compiler that every prediction starts aligned
    elements = elements // VECTOR * VECTOR
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    if row_ptr is not None:
        coefficients_ptr += tl.load(row_ptr) * COEFFICIENTS

    sample = tl.load(sample_ptr + at, mask=inside).to(tl.float32)
    guided = tl.zeros([BLOCK], tl.float32)
    for p in tl.static_range(PREDICTIONS):
        prediction = tl.load(predictions_ptr + at, mask=inside).to(tl.float32)
        guided += tl.load(weights_ptr + p) * prediction
        predictions_ptr += elements

    result = tl.load(coefficients_ptr) * sample + tl.load(coefficients_ptr + 1) * guided
    if previous_ptr is not None:
        result += tl.load(coefficients_ptr + 2) * tl.load(previous_ptr + at, mask=inside).to(tl.float32)
    if noise_ptr is not None:
        result += tl.load(coefficients_ptr + 3) * tl.load(noise_ptr + at, mask=inside).to(tl.float32)
    tl.store(next_ptr + at, result.to(next_ptr.dtype.element_ty), mask=inside)
    if denoised_ptr is not None:
        denoised = tl.load(coefficients_ptr + 4) * sample + tl.load(coefficients_ptr + 5) * guided
        tl.store(denoised_ptr + at, denoised.to(denoised_ptr.dtype.element_ty), mask=inside)


def step(
    sample: Tensor,  # [B, ...], dense; all tensors in one memory format
    predictions: Tensor,  # [P*B, ...]: P predictions stacked on the batch axis
    weights: Tensor,  # fp32 [P]
    coefficients: Tensor,  # fp32 [6], or [steps, 6] with row
    row: Tensor | None,  # int64 [1], read on the device: no host sync
    previous: Tensor | None,  # like sample
    noise: Tensor | None,  # like sample
    return_denoised: bool,
) -> tuple[Tensor, Tensor | None]:
    """(next, denoised or None), both like `sample`."""
    elements = sample.numel()
    result = torch.empty_like(sample)
    denoised = torch.empty_like(result) if return_denoised else None
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (sample, predictions, previous, noise))
    config = configure(elements, min(sample.element_size(), predictions.element_size()), aligned)
    with guard(sample):
        _step_kernel[(triton.cdiv(elements, config.block),)](
            sample, predictions, weights, coefficients, row, previous, noise, result, denoised, elements,
            PREDICTIONS=weights.numel(), BLOCK=config.block, VECTOR=config.vector, num_warps=config.num_warps,
        )  # fmt: skip
    return result, denoised
