"""LayerNorm without weights, modulated per sample: what a diffusion transformer does before each of its layers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_fast.kernels.device import guard

from . import _backends, _layer_norm, _library
from ._arguments import refused_by_kind
from ._layer_norm_cases import MMDIT_SHAPES, cases, chunk, normal
from ._operator import Operator
from ._spec import Inputs, OpSpec

Grads = tuple[Tensor]  # of out
Saved = tuple[Tensor]  # statistics
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Call(NamedTuple):
    """A checked call: what the registered op takes, in its order, and what every launcher reads."""

    x: Tensor  # [B, *, D]
    scale: Tensor  # [B, D] or [B, 1, D]
    shift: Tensor  # [B, D] or [B, 1, D]
    eps: float


def ada_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """out = LayerNorm(x) * (1 + scale) + shift, in one pass over x.

    Mean and variance (biased) of each row of D are taken in fp32, the variance from deviations; one rounding, at the
    store. Differentiable once in x, scale and shift.

    Args:
        x: [B, *, D], float32, float16, bfloat16 (float64: reference only).
        scale, shift: [B, D] or [B, 1, D], both in x's dtype or both in float32. Chunks of one projection [B, 6 D] are
            read where they lie.
        eps: added to the variance, not negative.

    Returns:
        Like x, contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named with expected and got.

    Source: Peebles & Xie, Scalable Diffusion Models with Transformers, arXiv 2212.09748 (adaLN); Ba et al., Layer
    Normalization, arXiv 1607.06450.
    """
    out: Tensor = _operator(_prepare(x, scale, shift, eps))
    return out


@refused_by_kind("ada_layer_norm")
def _prepare(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Call:
    """Check the public arguments."""
    op = "ada_layer_norm"
    _layer_norm.check_x(op, x)
    dtype = _layer_norm.parameter_dtype(scale, x)
    _layer_norm.check_modulations(op, x, dtype, scale=scale, shift=shift)
    return Call(x, scale, shift, _layer_norm.check_eps(op, eps))


# ---- reference column


def reference(*args: Any, **options: Any) -> Tensor:
    """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
    return _reference_forward(_prepare(*args, **options))[0]


def _reference_forward(call: Call) -> tuple[Tensor, Tensor]:
    x, scale, shift, eps = call
    xhat, statistics = _layer_norm.normalised(x, eps)
    out = xhat * (1 + _layer_norm.per_row(scale, x)) + _layer_norm.per_row(shift, x)
    return out.to(x.dtype).contiguous(), statistics


def _reference_backward(call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    grad_out = grads[0].to(saved[0].dtype)
    grad_x, xhat = _layer_norm.gradients(call.x, 1 + _layer_norm.per_row(call.scale, call.x), saved[0], grad_out)
    return grad_x, _layer_norm.sum_rows(grad_out * xhat), _layer_norm.sum_rows(grad_out)


def _eager(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """As diffusers writes it, in the input dtype."""
    across = (x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
    scale, shift = scale.to(x.dtype).reshape(across), shift.to(x.dtype).reshape(across)
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


# ---- extension columns (C++ and CUDA C++ export the same functions)


def _extension_forward(name: str, call: Call) -> tuple[Tensor, Tensor]:
    module: Any = _backends.extension(name)
    x, scale, shift, eps = call
    sizes = batch, rows, _ = _layer_norm.geometry(x)
    out, statistics = torch.empty_like(x), _layer_norm.empty_statistics(x, batch * rows)
    p = _library.pointer
    with guard(x):
        module.ada_layer_norm_forward(
            p(x), p(scale), p(shift), p(out), p(statistics),
            *sizes, scale.stride(0), shift.stride(0), eps,
            _library.DTYPE_CODE[x.dtype], _library.DTYPE_CODE[scale.dtype], _library.stream(x),
        )  # fmt: skip
    return out, statistics


def _extension_backward(name: str, call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    module: Any = _backends.extension(name)
    (x, scale, _, _), (statistics,) = call, saved
    sizes = batch, _, d = _layer_norm.geometry(x)
    grad_out = grads[0].contiguous()
    grad_x = torch.empty_like(x) if needs[0] else None
    grad_scale = statistics.new_empty(batch, d) if needs[1] else None
    grad_shift = statistics.new_empty(batch, d) if needs[2] else None
    p = _library.pointer
    with guard(x):
        size = module.ada_layer_norm_workspace(*sizes)
        scratch = x.new_empty(size, dtype=torch.uint8) if size else None
        module.ada_layer_norm_backward(
            p(grad_out), p(x), p(scale), p(statistics), p(grad_x), p(grad_scale), p(grad_shift), p(scratch),
            *sizes, scale.stride(0),
            _library.DTYPE_CODE[x.dtype], _library.DTYPE_CODE[scale.dtype], _library.stream(x),
        )  # fmt: skip
    return grad_x, grad_scale, grad_shift


# ---- Triton column


def _triton_forward(call: Call) -> tuple[Tensor, Tensor]:
    from kolors_fast.kernels import ada_layer_norm as kernel  # triton is imported at first use

    outputs: tuple[Tensor, Tensor] = kernel.forward(*call)
    return outputs


def _triton_backward(call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    from kolors_fast.kernels import ada_layer_norm as kernel

    found: Gradients = kernel.backward(grads[0].contiguous(), call.x, call.scale, *saved, tuple(needs))
    return found


COLUMNS = {
    "reference": _backends.Column(_reference_forward, _reference_backward),
    "cpu": _backends.Column(partial(_extension_forward, "cpu"), partial(_extension_backward, "cpu")),
    "triton": _backends.Column(_triton_forward, _triton_backward),
    "cuda": _backends.Column(partial(_extension_forward, "cuda"), partial(_extension_backward, "cuda")),
}


# ---- from a call to a launcher


def _dense(call: Call) -> Call:
    """The same call on what the kernels read: x contiguous, the rows of scale and shift where they lie."""
    x, scale, shift, eps = call
    return Call(x.contiguous(), _layer_norm.dense_rows(scale), _layer_norm.dense_rows(shift), eps)


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    return torch.empty_like(call.x), _layer_norm.empty_statistics(call.x, math.prod(call.x.shape[:-1]))


_operator = Operator("ada_layer_norm", Call, COLUMNS, dense=_dense, fake=_fake, saved=1)


# ---- what tests, benchmarks and explain() are made from


def _inputs(
    generator: torch.Generator,
    shape: tuple[int, ...],
    *,
    mean: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    eps: float = 1e-6,
) -> Inputs:
    batch, width = shape[0], shape[-1]
    return {
        "x": normal(generator, *shape, mean=mean, scale=scale),
        "scale": chunk(generator, batch, width, dtype),
        "shift": chunk(generator, batch, width, dtype).unsqueeze(1),
        "eps": eps,
    }


def _bytes_moved(inputs: Inputs) -> int:
    """x read once, out written once; scale and shift are a row per sample."""
    return 2 * int(inputs["x"].numel() * inputs["x"].element_size())


def _flops(inputs: Inputs) -> int:
    """About 8 per element: 1 for the mean, 3 for the deviations, 4 to normalise and modulate."""
    return 8 * int(inputs["x"].numel())


SPEC = OpSpec(
    name="ada_layer_norm",
    function=ada_layer_norm,
    reference=reference,
    eager=_eager,
    prepare=_prepare,
    columns=COLUMNS,
    cases=cases(_inputs, MMDIT_SHAPES),
    bytes_moved=_bytes_moved,
    flops=_flops,
    gradients=("x", "scale", "shift"),
)
