"""SiLU-gated linear unit over the halves of the last axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._gate import Gate, cases


def swiglu(h: Tensor) -> Tensor:
    """y = silu(h[..., :F]) * h[..., F:], with silu(x) = x / (1 + exp(-x)): the first half is the gate.

    fp32 inside, one rounding at the store. Differentiable once in h; the backward pass recomputes the activation
    from h.

    Args:
        h: [..., 2F], float32, float16, bfloat16 (float64: reference only). Rows may lie apart, as those of a chunk of a
            wider tensor do; other layouts are copied.

    Returns:
        [..., F], contiguous, in the dtype of h.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named with expected and got.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202; the order of the halves is ChatGLM's.
    """
    y: Tensor = _operator(_gate.prepare(h))
    return y


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """x s(x) and its derivative s(x) (1 + x (1 - s(x)))."""
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def _eager(h: Tensor) -> Tensor:
    """As ChatGLM's MLP writes it."""
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


_gate = Gate("swiglu", _silu, gate_first=True)
_operator = _gate.operator

# ChatGLM's MLP on one prompt of Kolors
MODELS = {"chatglm_1x256x27392": (1, 256, 27392)}

SPEC = _gate.spec(swiglu, _eager, cases(True, MODELS))
