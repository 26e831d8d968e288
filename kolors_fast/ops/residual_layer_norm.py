"""A residual and the LayerNorm that follows it, in one pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backends, _layer_norm, _library
from ._arguments import refused_by_kind
from ._layer_norm_cases import UNET_SHAPES, cases, normal
from ._operator import Operator
from ._spec import Inputs, OpSpec

Grads = tuple[Tensor | None, Tensor | None]  # of r and out
Saved = tuple[Tensor]  # statistics
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Call(NamedTuple):
    """A checked call: what the registered op takes, in its order, and what every launcher reads."""

    x: Tensor  # [B, *, D]; for the backward pass r, and so is y
    y: Tensor  # [B, *, D]
    weight: Tensor  # [D]
    bias: Tensor  # [D]
    eps: float


def residual_layer_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """r = x + y; out = LayerNorm(r) * weight + bias, in one pass over x and y.

    fp32 inside, one rounding at each store. r is rounded to x's dtype, and out is that of the rounded r: the backward
    pass reads the stored r, and keeps neither x nor y. Differentiable once in all four tensors; a gradient that
    arrives for r is added to that of the LayerNorm. x and y have one gradient, and share its memory.

    Args:
        x: [B, *, D], float32, float16, bfloat16 (float64: reference only).
        y: like x: what the layer before returned.
        weight, bias: [D], both in x's dtype or both in float32.
        eps: added to the variance, not negative.

    Returns:
        (r, out), both like x, contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named with expected and got.

    Source: Ba et al., Layer Normalization, arXiv 1607.06450.
    """
    outputs: tuple[Tensor, Tensor] = _operator(_prepare(x, y, weight, bias, eps))
    return outputs


@refused_by_kind("residual_layer_norm")
def _prepare(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Call:
    """Check the public arguments."""
    op = "residual_layer_norm"
    _layer_norm.check_x(op, x)
    _layer_norm.check_residual(op, y, x)
    dtype = _layer_norm.parameter_dtype(weight, x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name}: expected {[x.shape[-1]]}, got {list(value.shape)}")
        _layer_norm.check_like(op, name, value, x, dtype)
    return Call(x, y, weight, bias, _layer_norm.check_eps(op, eps))


# ---- reference column


def reference(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
    return _reference_forward(_prepare(*args, **options))[:2]


def _reference_forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    x, y, weight, bias, eps = call
    wide = torch.promote_types(x.dtype, torch.float32)
    r = (x.to(wide) + y.to(wide)).to(x.dtype).contiguous()
    rhat, statistics = _layer_norm.normalised(r, eps)
    return r, (rhat * weight.to(wide) + bias.to(wide)).to(x.dtype), statistics


def _reference_backward(call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    grad_r, grad_out = grads
    if grad_out is None:
        return _residual_gradients(call, grad_r)
    grad_out = grad_out.to(saved[0].dtype)
    grad, rhat = _layer_norm.gradients(call.x, call.weight.to(grad_out.dtype), saved[0], grad_out)
    grad = (grad if grad_r is None else grad + grad_r.to(grad.dtype)).to(call.x.dtype)
    return grad, grad, _layer_norm.sum_rows(grad_out * rhat).sum(0), _layer_norm.sum_rows(grad_out).sum(0)


def _residual_gradients(call: Call, grad_r: Tensor | None) -> Gradients:
    """Those of r alone, where nothing asks for the gradient of out."""
    return grad_r, grad_r, torch.zeros_like(call.weight), torch.zeros_like(call.bias)


def _eager(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    r = x + y
    return r, F.layer_norm(r, r.shape[-1:], weight.to(r.dtype), bias.to(r.dtype), eps)


# ---- C++ column


def _cpu_forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    module: Any = _backends.extension("cpu")
    x, y, weight, bias, eps = call
    rows, d = math.prod(x.shape[:-1]), x.shape[-1]
    r, out, statistics = torch.empty_like(x), torch.empty_like(x), _layer_norm.empty_statistics(x, rows)
    p = _library.pointer
    module.residual_layer_norm_forward(
        p(x), p(y), p(weight), p(bias), p(r), p(out), p(statistics), rows, d, eps,
        _library.DTYPE_CODE[x.dtype], _library.DTYPE_CODE[weight.dtype],
    )  # fmt: skip
    return r, out, statistics


def _cpu_backward(call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    grad_r, grad_out = grads
    if grad_out is None:
        return _residual_gradients(call, grad_r)
    module: Any = _backends.extension("cpu")
    (r, _, weight, _, _), (statistics,) = call, saved
    grad_r, grad_out = None if grad_r is None else grad_r.contiguous(), grad_out.contiguous()
    grad = torch.empty_like(r) if needs[0] or needs[1] else None
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs[2] else None
    grad_bias = torch.empty_like(weight, dtype=torch.float32) if needs[3] else None
    p = _library.pointer
    module.residual_layer_norm_backward(
        p(grad_r), p(grad_out), p(r), p(weight), p(statistics), p(grad), p(grad_weight), p(grad_bias),
        math.prod(r.shape[:-1]), r.shape[-1], _library.DTYPE_CODE[r.dtype], _library.DTYPE_CODE[weight.dtype],
    )  # fmt: skip
    return grad, grad, grad_weight, grad_bias


# ---- Triton column


def _triton_forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    from kolors_fast.kernels import residual_layer_norm as kernel  # triton is imported at first use

    outputs: tuple[Tensor, Tensor, Tensor] = kernel.forward(*call)
    return outputs


def _triton_backward(call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    from kolors_fast.kernels import residual_layer_norm as kernel

    grad_r, grad_out = grads
    if grad_out is None:
        return _residual_gradients(call, grad_r)
    grad_r = None if grad_r is None else grad_r.contiguous()
    found: Gradients = kernel.backward(grad_r, grad_out.contiguous(), call.x, call.weight, *saved, tuple(needs))
    return found


COLUMNS = {
    "reference": _backends.Column(_reference_forward, _reference_backward),
    "cpu": _backends.Column(_cpu_forward, _cpu_backward),
    "triton": _backends.Column(_triton_forward, _triton_backward),
}


# ---- from a call to a launcher


def _dense(call: Call) -> Call:
    """The same call on contiguous tensors: what the kernels read."""
    x, y, weight, bias, eps = call
    return Call(x.contiguous(), y.contiguous(), weight.contiguous(), bias.contiguous(), eps)


def _fake(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(call.x),
        torch.empty_like(call.x),
        _layer_norm.empty_statistics(call.x, math.prod(call.x.shape[:-1])),
    )


def _kept(call: Call, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {"x": outputs[0], "y": outputs[0]}


_operator = Operator("residual_layer_norm", Call, COLUMNS, dense=_dense, fake=_fake, outputs=2, saved=1, kept=_kept)


# ---- what tests, benchmarks and explain() are made from


def _inputs(
    generator: torch.Generator,
    shape: tuple[int, ...],
    *,
    mean: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    eps: float = 1e-5,
) -> Inputs:
    width = shape[-1]
    return {
        "x": normal(generator, *shape, mean=mean, scale=scale),
        "y": normal(generator, *shape, scale=scale),
        "weight": normal(generator, width, mean=1.0, scale=0.2).to(dtype),
        "bias": normal(generator, width, scale=0.2).to(dtype),
        "eps": eps,
    }


def _bytes_moved(inputs: Inputs) -> int:
    """x and y read once, r and out written once."""
    return 4 * int(inputs["x"].numel() * inputs["x"].element_size())


def _flops(inputs: Inputs) -> int:
    """About 9 per element: 1 for the residual, 1 for the mean, 3 for the deviations, 4 to normalise and scale."""
    return 9 * int(inputs["x"].numel())


SPEC = OpSpec(
    name="residual_layer_norm",
    function=residual_layer_norm,
    reference=reference,
    eager=_eager,
    prepare=_prepare,
    columns=COLUMNS,
    cases=cases(_inputs, UNET_SHAPES),
    bytes_moved=_bytes_moved,
    flops=_flops,
    gradients=("x", "y", "weight", "bias"),
)
