"""A gated residual and the modulated LayerNorm that follows it, in one pass."""

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
from ._spec import Case, Inputs, OpSpec

Grads = tuple[Tensor | None, Tensor | None]  # of r and out
Saved = tuple[Tensor]  # statistics
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Call(NamedTuple):
    """A checked call: what the registered op takes, in its order, and what every launcher reads."""

    x: Tensor  # [B, *, D]; for the backward pass r
    y: Tensor  # [B, *, D]; for the backward pass r, where there is no gate
    gate: Tensor | None  # [B, D] or [B, 1, D]
    scale: Tensor  # [B, D] or [B, 1, D]
    shift: Tensor  # [B, D] or [B, 1, D]
    eps: float


def gated_residual_ada_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """r = x + gate * y; out = LayerNorm(r) * (1 + scale) + shift, in one pass over x and y.

    fp32 inside, one rounding at each store. r is rounded to x's dtype, and out is that of the rounded r, as if
    `ada_layer_norm` were called on it: the backward pass reads the stored r, and so differentiates what was computed.
    Differentiable once in all five tensors; a gradient that arrives for r is added to that of the LayerNorm.

    Args:
        x: [B, *, D], float32, float16, bfloat16 (float64: reference only).
        y: like x: what the layer before returned.
        gate: [B, D] or [B, 1, D], or None for r = x + y.
        scale, shift: [B, D] or [B, 1, D]. gate, scale and shift are all in x's dtype or all in float32. Chunks of one
            projection [B, 6 D] are read where they lie.
        eps: added to the variance, not negative.

    Returns:
        (r, out), both like x, contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named with expected and got.

    Source: Peebles & Xie, Scalable Diffusion Models with Transformers, arXiv 2212.09748 (adaLN-Zero).
    """
    outputs: tuple[Tensor, Tensor] = _operator(_prepare(x, y, gate, scale, shift, eps))
    return outputs


@refused_by_kind("gated_residual_ada_layer_norm")
def _prepare(x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Call:
    """Check the public arguments."""
    op = "gated_residual_ada_layer_norm"
    _layer_norm.check_x(op, x)
    _layer_norm.check_residual(op, y, x)
    dtype = _layer_norm.parameter_dtype(scale, x)
    gates = {} if gate is None else {"gate": gate}
    _layer_norm.check_modulations(op, x, dtype, **gates, scale=scale, shift=shift)
    return Call(x, y, gate, scale, shift, _layer_norm.check_eps(op, eps))


# ---- reference column


def reference(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
    return _reference_forward(_prepare(*args, **options))[:2]


def _reference_forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    x, y, gate, scale, shift, eps = call
    wide = torch.promote_types(x.dtype, torch.float32)
    r = x.to(wide) + (y.to(wide) if gate is None else _layer_norm.per_row(gate, x) * y.to(wide))
    r = r.to(x.dtype).contiguous()
    rhat, statistics = _layer_norm.normalised(r, eps)
    out = rhat * (1 + _layer_norm.per_row(scale, x)) + _layer_norm.per_row(shift, x)
    return r, out.to(x.dtype), statistics


def _reference_backward(call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    grad_r, grad_out = grads
    if grad_out is None:
        return _residual_gradients(call, grad_r)
    r, y, gate, scale, _, _ = call
    grad_out = grad_out.to(saved[0].dtype)
    grad, rhat = _layer_norm.gradients(r, 1 + _layer_norm.per_row(scale, r), saved[0], grad_out)
    grad = grad if grad_r is None else grad + grad_r.to(grad.dtype)
    grad_y = grad if gate is None else _layer_norm.per_row(gate, r) * grad
    grad_gate = None if gate is None else _layer_norm.sum_rows(grad * y.to(grad.dtype))
    return grad, grad_y, grad_gate, _layer_norm.sum_rows(grad_out * rhat), _layer_norm.sum_rows(grad_out)


def _residual_gradients(call: Call, grad_r: Tensor | None) -> Gradients:
    """Those of r alone, where nothing asks for the gradient of out."""
    assert grad_r is not None
    _, y, gate, scale, shift, _ = call
    none = torch.zeros_like(scale), torch.zeros_like(shift)
    if gate is None:
        return grad_r, grad_r, None, *none
    wide = grad_r.to(torch.promote_types(y.dtype, torch.float32))
    return grad_r, _layer_norm.per_row(gate, y) * wide, _layer_norm.sum_rows(wide * y.to(wide.dtype)), *none


def _eager(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As diffusers writes it, in the input dtype."""

    def across(value: Tensor) -> Tensor:
        return value.to(x.dtype).reshape(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])

    r = x + (y if gate is None else across(gate) * y)
    return r, F.layer_norm(r, r.shape[-1:], eps=eps) * (1 + across(scale)) + across(shift)


# ---- extension columns (C++ and CUDA C++ export the same functions)


def _extension_forward(name: str, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    module: Any = _backends.extension(name)
    x, y, gate, scale, shift, eps = call
    sizes = batch, rows, _ = _layer_norm.geometry(x)
    r, out, statistics = torch.empty_like(x), torch.empty_like(x), _layer_norm.empty_statistics(x, batch * rows)
    p = _library.pointer
    with guard(x):
        module.gated_residual_ada_layer_norm_forward(
            p(x), p(y), p(gate), p(scale), p(shift), p(r), p(out), p(statistics),
            *sizes, 0 if gate is None else gate.stride(0), scale.stride(0), shift.stride(0), eps,
            _library.DTYPE_CODE[x.dtype], _library.DTYPE_CODE[scale.dtype], _library.stream(x),
        )  # fmt: skip
    return r, out, statistics


def _extension_backward(name: str, call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    grad_r, grad_out = grads
    if grad_out is None:
        return _residual_gradients(call, grad_r)
    module: Any = _backends.extension(name)
    (r, y, gate, scale, _, _), (statistics,) = call, saved
    sizes = batch, _, d = _layer_norm.geometry(r)
    grad_r, grad_out = None if grad_r is None else grad_r.contiguous(), grad_out.contiguous()
    shared = gate is None  # then x and y have one gradient
    grad_x = torch.empty_like(r) if needs[0] or (shared and needs[1]) else None
    grad_y = torch.empty_like(r) if needs[1] and not shared else None
    grad_gate = statistics.new_empty(batch, d) if needs[2] and not shared else None
    grad_scale = statistics.new_empty(batch, d) if needs[3] else None
    grad_shift = statistics.new_empty(batch, d) if needs[4] else None
    p = _library.pointer
    with guard(r):
        size = module.gated_residual_ada_layer_norm_workspace(*sizes)
        scratch = r.new_empty(size, dtype=torch.uint8) if size else None
        module.gated_residual_ada_layer_norm_backward(
            p(grad_r), p(grad_out), p(r), p(y), p(gate), p(scale), p(statistics),
            p(grad_x), p(grad_y), p(grad_gate), p(grad_scale), p(grad_shift), p(scratch),
            *sizes, 0 if gate is None else gate.stride(0), scale.stride(0),
            _library.DTYPE_CODE[r.dtype], _library.DTYPE_CODE[scale.dtype], _library.stream(r),
        )  # fmt: skip
    return grad_x, grad_x if shared else grad_y, grad_gate, grad_scale, grad_shift


# ---- Triton column


def _triton_forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    from kolors_fast.kernels import gated_residual_ada_layer_norm as kernel  # triton is imported at first use

    outputs: tuple[Tensor, Tensor, Tensor] = kernel.forward(*call)
    return outputs


def _triton_backward(call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    from kolors_fast.kernels import gated_residual_ada_layer_norm as kernel

    grad_r, grad_out = grads
    if grad_out is None:
        return _residual_gradients(call, grad_r)
    grad_r = None if grad_r is None else grad_r.contiguous()
    found: Gradients = kernel.backward(grad_r, grad_out.contiguous(), *call[:4], *saved, tuple(needs))
    return found


COLUMNS = {
    "reference": _backends.Column(_reference_forward, _reference_backward),
    "cpu": _backends.Column(partial(_extension_forward, "cpu"), partial(_extension_backward, "cpu")),
    "triton": _backends.Column(_triton_forward, _triton_backward),
    "cuda": _backends.Column(partial(_extension_forward, "cuda"), partial(_extension_backward, "cuda")),
}


# ---- from a call to a launcher


def _dense(call: Call) -> Call:
    """The same call on what the kernels read: x and y contiguous, the rows of the modulation where they lie."""
    x, y, gate, scale, shift, eps = call
    return Call(
        x.contiguous(),
        y.contiguous(),
        None if gate is None else _layer_norm.dense_rows(gate),
        _layer_norm.dense_rows(scale),
        _layer_norm.dense_rows(shift),
        eps,
    )


def _fake(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(call.x),
        torch.empty_like(call.x),
        _layer_norm.empty_statistics(call.x, math.prod(call.x.shape[:-1])),
    )


def _kept(call: Call, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """y is read for the gate's gradient alone."""
    return dict.fromkeys(("x",) if call.gate is not None else ("x", "y"), outputs[0])


_operator = Operator(
    "gated_residual_ada_layer_norm", Call, COLUMNS, dense=_dense, fake=_fake, outputs=2, saved=1, kept=_kept
)


# ---- what tests, benchmarks and explain() are made from


def _inputs(
    generator: torch.Generator,
    shape: tuple[int, ...],
    *,
    mean: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    eps: float = 1e-6,
    gated: bool = True,
) -> Inputs:
    batch, width = shape[0], shape[-1]
    return {
        "x": normal(generator, *shape, mean=mean, scale=scale),
        "y": normal(generator, *shape, scale=scale / 4),  # so that the gate's gradient, a sum over rows, fits fp16
        "gate": chunk(generator, batch, width, dtype) if gated else None,
        "scale": chunk(generator, batch, width, dtype),
        "shift": chunk(generator, batch, width, dtype).unsqueeze(1),
        "eps": eps,
    }


CASES = (
    *cases(_inputs, MMDIT_SHAPES),
    Case("no_gate", lambda generator: _inputs(generator, (2, 5, 33), gated=False)),
)


def _bytes_moved(inputs: Inputs) -> int:
    """x and y read once, r and out written once; the modulation is a row per sample."""
    return 4 * int(inputs["x"].numel() * inputs["x"].element_size())


def _flops(inputs: Inputs) -> int:
    """About 10 per element: 2 for the residual, 1 for the mean, 3 for the deviations, 4 to normalise and modulate."""
    return 10 * int(inputs["x"].numel())


SPEC = OpSpec(
    name="gated_residual_ada_layer_norm",
    function=gated_residual_ada_layer_norm,
    reference=reference,
    eager=_eager,
    prepare=_prepare,
    columns=COLUMNS,
    cases=CASES,
    bytes_moved=_bytes_moved,
    flops=_flops,
    gradients=("x", "y", "gate", "scale", "shift"),
)
