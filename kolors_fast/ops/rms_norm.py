"""RMSNorm over the last axis."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backends, _library, _rows
from ._arguments import refused_by_kind
from ._operator import Operator
from ._spec import Case, Inputs, OpSpec

Grads = tuple[Tensor]  # of y
Saved = tuple[Tensor]  # rstd
Gradients = tuple[Tensor | None, Tensor | None]
TRITON_FEATURES = 8192  # of a row that one program holds in registers


class Call(NamedTuple):
    """A checked call: what the registered op takes, in its order, and what every launcher reads."""

    x: Tensor  # [..., D]
    weight: Tensor | None  # [D]
    eps: float


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last axis.

    The mean is taken in fp32, and there is one rounding, at the store. Differentiable once in x and weight.

    Args:
        x: [..., D], float32, float16, bfloat16 (float64: reference only). Rows may lie apart, as those of a chunk of a
            wider tensor do; other layouts are copied.
        weight: [D], in x's dtype or float32, or None.
        eps: added to the mean, not negative.

    Returns:
        [..., D], contiguous, in the dtype of x.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named with expected and got.

    Source: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    y: Tensor = _operator(_prepare(x, weight, eps))
    return y


@refused_by_kind("rms_norm")
def _prepare(x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Call:
    """Check the public arguments."""
    if x.dtype not in _library.FLOATING:
        raise TypeError(f"rms_norm: x: expected a floating dtype of 16 to 64 bits, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"rms_norm: x: expected [..., D], got {list(x.shape)}")
    if weight is not None:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"rms_norm: weight: expected {list(x.shape[-1:])}, got {list(weight.shape)}")
        if weight.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"rms_norm: weight: expected {x.dtype} or torch.float32, got {weight.dtype}")
        if weight.device != x.device:
            raise ValueError(f"rms_norm: weight: expected a tensor on {x.device}, got {weight.device}")
    if not eps >= 0:
        raise ValueError(f"rms_norm: eps: expected a number >= 0, got {eps}")
    return Call(x, weight, float(eps))


# ---- reference column


def reference(*args: Any, **options: Any) -> Tensor:
    """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
    return _reference_forward(_prepare(*args, **options))[0]


def _reference_forward(call: Call) -> tuple[Tensor, Tensor]:
    x = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
    rstd = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + call.eps)
    y = x * rstd if call.weight is None else x * rstd * call.weight.to(x.dtype)
    return y.to(call.x.dtype).contiguous(), rstd.reshape(-1)


def _reference_backward(call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    """With x_hat = x * rstd and g = grad_y * weight: dx = rstd * (g - x_hat * mean(g * x_hat))."""
    rstd = saved[0].reshape(*call.x.shape[:-1], 1)
    x_hat = call.x.to(rstd.dtype) * rstd
    grad_y = grads[0].to(rstd.dtype)
    g = grad_y if call.weight is None else grad_y * call.weight.to(rstd.dtype)
    grad_x = rstd * (g - x_hat * (g * x_hat).mean(dim=-1, keepdim=True))
    grad_weight = None if call.weight is None else (grad_y * x_hat).reshape(-1, x_hat.shape[-1]).sum(0)
    return grad_x.to(call.x.dtype).contiguous(), grad_weight


def _eager(x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)


# ---- C++ column


def _cpu_forward(call: Call) -> tuple[Tensor, Tensor]:
    module: Any = _backends.extension("cpu")
    x, weight, eps = call
    y, rstd = _fake(call)
    p = _library.pointer
    module.rms_norm_forward(
        p(x), p(weight), p(y), p(rstd), rstd.shape[0], x.shape[-1], _rows.row_stride(x), eps, *_dtypes(call), 0
    )
    return y, rstd


def _cpu_backward(call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    module: Any = _backends.extension("cpu")
    x, weight, _ = call
    grad_y, (rstd,) = grads[0].contiguous(), saved
    grad_x = x.new_empty(*x.shape) if needs[0] else None
    grad_weight = rstd.new_empty(x.shape[-1]) if weight is not None and needs[1] else None
    p = _library.pointer
    module.rms_norm_backward(
        p(grad_y), p(x), p(weight), p(rstd), p(grad_x), p(grad_weight), rstd.shape[0], x.shape[-1],
        _rows.row_stride(x), *_dtypes(call), 0,
    )  # fmt: skip
    return grad_x, grad_weight


def _dtypes(call: Call) -> tuple[int, int]:
    """Codes for x and for weight."""
    return _library.DTYPE_CODE[call.x.dtype], _library.DTYPE_CODE[
        (call.x if call.weight is None else call.weight).dtype
    ]


# ---- Triton column


def _triton_forward(call: Call) -> tuple[Tensor, Tensor]:
    from kolors_fast.kernels import rms_norm as kernel  # triton is imported at first use

    outputs: tuple[Tensor, Tensor] = kernel.forward(*call, _rows.row_stride(call.x))
    return outputs


def _triton_backward(call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    from kolors_fast.kernels import rms_norm as kernel

    grad_y = grads[0].contiguous()
    found: Gradients = kernel.backward(grad_y, *call[:2], *saved, _rows.row_stride(call.x), tuple(needs[:2]))
    return found


def _triton_declines(call: Call) -> str | None:
    features = call.x.shape[-1]
    return f"holds rows of at most {TRITON_FEATURES} elements, got {features}" if features > TRITON_FEATURES else None


COLUMNS = {
    "reference": _backends.Column(_reference_forward, _reference_backward),
    "cpu": _backends.Column(_cpu_forward, _cpu_backward),
    "triton": _backends.Column(_triton_forward, _triton_backward, _triton_declines),
}


# ---- from a call to a launcher


def _dense(call: Call) -> Call:
    """The same call on rows with one stride."""
    return Call(_rows.as_rows(call.x), None if call.weight is None else call.weight.contiguous(), call.eps)


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    """y, and the rstd of every row, which the backward pass reads."""
    x = call.x
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(*x.shape), x.new_empty(math.prod(x.shape[:-1]), dtype=wide)


_operator = Operator("rms_norm", Call, COLUMNS, dense=_dense, fake=_fake, saved=1)


# ---- what tests, benchmarks and explain() are made from


def _inputs(
    generator: torch.Generator,
    *shape: int,
    weight: torch.dtype | None = torch.float64,
    scale: float = 1.0,
    eps: float = 1e-5,
) -> Inputs:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    w = None if weight is None else (1 + 0.2 * normal(shape[-1])).to(weight)
    return {"x": normal(*shape) * scale, "weight": w, "eps": eps}


def _case(name: str, *shape: int, model: bool = False, **options: Any) -> Case:
    return Case(name, lambda generator: _inputs(generator, *shape, **options), model)


def _offset_view(generator: torch.Generator) -> Inputs:
    return {**_inputs(generator, 3, 48), "x": _inputs(generator, 1 + 3 * 48)["x"][1:].view(3, 48)}


def _chunk(generator: torch.Generator) -> Inputs:
    return {**_inputs(generator, 2, 3, 40), "x": _inputs(generator, 2, 3, 120)["x"].chunk(3, dim=-1)[1]}


def _transposed(generator: torch.Generator) -> Inputs:
    return {**_inputs(generator, 6, 20), "x": _inputs(generator, 20, 6)["x"].t()}


def _holds(value: float) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        inputs = _inputs(generator, 4, 24)
        inputs["x"][1, 7] = value
        return inputs

    return Case(f"holds_{value}", make)


CASES = (
    _case("plain", 2, 5, 64),
    _case("no_weight", 2, 5, 64, weight=None),
    _case("weight_fp32", 3, 48, weight=torch.float32),
    _case("heads", 2, 9, 3, 64),
    _case("odd", 3, 7, 15),
    _case("prime", 5, 101),
    _case("head_and_tail", 3, 160),
    # with a small eps the gradient, g * rstd^3 * eps, would be what cancellation leaves: noise, also in eager
    _case("one_feature", 7, 1, eps=0.5),
    _case("one_row", 1, 1031),
    _case("rank_1", 40),
    _case("batch_0", 0, 4, 16),
    _case("many_rows", 1100, 3),
    _case("huge", 4, 64, scale=1e4),
    _case("tiny", 4, 64, scale=1e-3, eps=1e-6),
    Case("zeros", lambda g: {**_inputs(g, 3, 32), "x": torch.zeros(3, 32, dtype=torch.float64)}),
    Case("offset_view", _offset_view),
    Case("chunk", _chunk),
    Case("transposed", _transposed),
    _holds(float("nan")),
    _holds(float("inf")),
    _case("chatglm_1x256x4096", 1, 256, 4096, model=True),
    _case("sd35_2x4096x24x64", 2, 4096, 24, 64, eps=1e-6, model=True),
)


def _bytes_moved(inputs: Inputs) -> int:
    """x read once, y written once."""
    x: Tensor = inputs["x"]
    return 2 * x.numel() * x.element_size()


def _flops(inputs: Inputs) -> int:
    """A square and a sum, a scale and a weight."""
    return 4 * int(inputs["x"].numel())


SPEC = OpSpec(
    name="rms_norm",
    function=rms_norm,
    reference=reference,
    eager=_eager,
    prepare=_prepare,
    columns=COLUMNS,
    cases=CASES,
    bytes_moved=_bytes_moved,
    flops=_flops,
    gradients=("x", "weight"),
)
