"""GELU-gated linear unit over the halves of the last axis."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._gate import Gate, cases


def geglu(h: Tensor) -> Tensor:
    """y = value * gelu(gate), with value = h[..., :F], gate = h[..., F:] and gelu(x) = x * Phi(x).

    Phi is the distribution function of the normal distribution, not its tanh approximation, and keeps its relative
    accuracy in the left tail. fp32 inside, one rounding at the store. Differentiable once in h; the backward pass
    recomputes the activation from h.

    Args:
        h: [..., 2F], float32, float16, bfloat16 (float64: reference only). Rows may lie apart, as those of a chunk of a
            wider tensor do; other layouts are copied.

    Returns:
        [..., F], contiguous, in the dtype of h.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named with expected and got.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202; Hendrycks & Gimpel, Gaussian Error Linear
    Units, arXiv 1606.08415.
    """
    y: Tensor = _operator(_gate.prepare(h))
    return y


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """x Phi(x) and its derivative Phi(x) + x phi(x); erfc does not cancel in the left tail as 1 + erf does."""
    cdf = 0.5 * torch.special.erfc(-math.sqrt(0.5) * x)
    pdf = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return x * cdf, cdf + x * pdf


def _eager(h: Tensor) -> Tensor:
    """As diffusers' GEGLU writes it."""
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


_gate = Gate("geglu", _gelu, gate_first=False)
_operator = _gate.operator

# Kolors' UNet at batch 2: blocks of 640 and of 1280 channels, for pictures of 1024x1024 and of 512x512
MODELS = {
    "kolors_2x4096x5120": (2, 4096, 5120),
    "kolors_2x1024x10240": (2, 1024, 10240),
    "kolors_512_2x1024x5120": (2, 1024, 5120),
    "kolors_512_2x256x10240": (2, 256, 10240),
}

SPEC = _gate.spec(geglu, _eager, cases(False, MODELS))
