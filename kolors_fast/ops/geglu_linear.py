"""A linear layer followed by GEGLU.

The layer's product is a vendor's matrix multiplication on every backend, and our geglu reads what it wrote. The Triton
column can do both in one kernel, with the activation as the product's epilogue, which neither writes nor reads the
wide result; it does so only for shapes where that was measured to be faster (`EPILOGUE_PAYS_FROM`).

A backward pass reads the wide result. So a forward pass that is to be differentiated is F.linear and geglu, each with
its gradient, in eager and under tracing alike. The registered op serves whoever calls it otherwise; its backward pass
runs the forward again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backends, _library, _rows
from ._arguments import refused_by_kind
from ._operator import Operator, backward_by_rerun
from ._products import geglu_linear as packed_geglu_linear
from ._products import linear
from ._spec import Case, Inputs, OpSpec
from .geglu import SPEC as GEGLU
from .geglu import geglu

# (compute capability as in sm_90, dtype, K, N) -> rows from which the epilogue is faster than F.linear and geglu, in
# bench/bench_ops.py (`triton_epilogue` beside `triton`). Empty until a GPU has been measured
EPILOGUE_PAYS_FROM: Mapping[tuple[int, torch.dtype, int, int], int] = {}


class Call(NamedTuple):
    """A checked call: what the registered op takes, and what every launcher reads."""

    x: Tensor  # [..., K]
    weight: Tensor  # [2N, K]
    bias: Tensor | None  # [2N]


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = value * gelu(gate), with value = h[..., :N], gate = h[..., N:] of h = x @ weight^T + bias.

    `geglu(F.linear(x, weight, bias))`, with the exact gelu of `geglu`. Differentiable once in all tensors. Where the
    Triton column runs product and activation as one kernel, h is never rounded; elsewhere it is, to the dtype of x, or
    under torch.autocast to that of autocast, which is then the result's.

    Args:
        x: [..., K], float32, float16, bfloat16 (float64: reference only), any strides.
        weight: [2N, K], as torch.nn.Linear holds it, in the dtype of x.
        bias: [2N], in the dtype of x.

    Returns:
        [..., N], contiguous, in the dtype of x.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named with expected and got.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    call = _prepare(x, weight, bias)
    if _library.wants_grad(call) or torch.is_autocast_enabled(x.device.type):
        return _composed(call)[0]
    y: Tensor = _operator(call)
    return y


@refused_by_kind("geglu_linear")
def _prepare(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    """Check the public arguments."""
    if x.dtype not in _library.FLOATING:
        raise TypeError(f"geglu_linear: x: expected a floating dtype of 16 to 64 bits, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"geglu_linear: x: expected [..., K], got {list(x.shape)}")
    depth = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != depth or weight.shape[0] % 2:
        raise ValueError(f"geglu_linear: weight: expected [2N, {depth}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"geglu_linear: bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"geglu_linear: {name}: expected {x.dtype}, got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"geglu_linear: {name}: expected a tensor on {x.device}, got {tensor.device}")
    return Call(x, weight, bias)


# ---- reference column


def reference(*args: Any, **options: Any) -> Tensor:
    """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
    return _reference(_prepare(*args, **options))[0]


def _reference(call: Call) -> tuple[Tensor]:
    wide = torch.promote_types(call.x.dtype, torch.float32)
    x, weight, bias = call
    h = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return (GEGLU.reference(h).to(call.x.dtype),)


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = GEGLU.eager(F.linear(x, weight, bias))
    return y


# ---- C++ column


def _composed(call: Call) -> tuple[Tensor]:
    try:
        y = packed_geglu_linear(*call)
        return (geglu(linear(*call)) if y is None else y,)
    except (RuntimeError, TypeError):
        _operator.refuse_by_kind(call)
        raise


# ---- Triton column


def epilogue_pays(rows: int, features: int, depth: int, dtype: torch.dtype, architecture: int) -> bool:
    """Whether the kernel with the epilogue is known to be faster than F.linear and geglu."""
    least = EPILOGUE_PAYS_FROM.get((architecture, dtype, depth, features))
    return least is not None and rows >= least


def _epilogue_declines(call: Call) -> str | None:
    """Why the Triton column does not multiply by itself."""
    from kolors_fast.kernels.device import architecture

    x, (width, depth), found = call.x, call.weight.shape, architecture(call.x.device)
    if _library.wants_grad(call):
        return "a backward pass reads what F.linear writes"
    rows = math.prod(x.shape[:-1])
    if not epilogue_pays(rows, width // 2, depth, x.dtype, found):
        return f"not measured to be faster for {rows} rows of {depth} to {width} in {x.dtype} on sm_{found}"
    return None


def _triton_forward(call: Call) -> tuple[Tensor]:
    if _epilogue_declines(call) is not None:
        return (geglu(linear(*call)),)
    return (epilogue(*call),)


def epilogue(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The one kernel, on tensors as it reads them."""
    from kolors_fast.kernels import geglu_linear as kernel  # triton is imported at first use

    x = _rows.as_rows(x)
    bias = None if bias is None else bias.contiguous()
    y: Tensor = kernel.forward(x, weight.contiguous(), bias, _rows.row_stride(x))
    return y


COLUMNS = {
    "reference": _backends.Column(_reference, backward_by_rerun(_reference)),
    "cpu": _backends.Column(_composed, backward_by_rerun(_composed)),
    "triton": _backends.Column(_triton_forward, backward_by_rerun(_composed)),
}


# ---- from a call to a launcher


def _dense(call: Call) -> Call:
    """F.linear takes any strides; the epilogue's launcher asks for its own."""
    return call


def _fake(call: Call) -> tuple[Tensor]:
    return (call.x.new_empty(*call.x.shape[:-1], call.weight.shape[0] // 2),)


_operator = Operator("geglu_linear", Call, COLUMNS, dense=_dense, fake=_fake)


# ---- what tests, benchmarks and explain() are made from


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _inputs(
    generator: torch.Generator, *shape: int, features: int, scale: float = 1.0, gate: float = 0.0, bias: bool = True
) -> Inputs:
    """h with elements of about `scale`; gates around `gate`."""
    width, depth = 2 * features, shape[-1]
    inputs: Inputs = {
        "x": _normal(generator, *shape) * scale,
        "weight": _normal(generator, width, depth) * depth**-0.5,
        "bias": _normal(generator, width) * scale if bias else None,
    }
    if gate:
        inputs["bias"][features:] += gate
    return inputs


def _case(name: str, *shape: int, features: int, model: bool = False, **options: Any) -> Case:
    return Case(name, lambda generator: _inputs(generator, *shape, features=features, **options), model)


def _changed(name: str, change: Any) -> Case:
    """A small case, some of its inputs replaced."""

    def make(generator: torch.Generator) -> Inputs:
        inputs = _inputs(generator, 3, 7, 24, features=20)
        return {**inputs, **change(generator, **inputs)}

    return Case(name, make)


def _transposed(generator: torch.Generator, x: Tensor, weight: Tensor, bias: Tensor) -> Inputs:
    return {"x": x.transpose(0, 1), "weight": weight.t().contiguous().t()}


def _holds_nan(generator: torch.Generator, x: Tensor, weight: Tensor, bias: Tensor) -> Inputs:
    x[1, 2, 3] = weight[5, 7] = bias[20 + 9] = float("nan")
    return {"x": x}


# Kolors' UNet at batch 2: blocks of 640 and of 1280 channels, for pictures of 1024x1024 and of 512x512
CASES = (
    _case("plain", 2, 5, 32, features=24),
    _case("no_bias", 2, 5, 32, features=24, bias=False),
    _case("odd", 3, 7, 15, features=13),
    _case("prime", 37, 41, features=23),
    _case("one_feature", 167, 8, features=1),  # of a few values eager's error is luck
    _case("one_deep", 19, 1, features=24),
    _case("one_row", 1, 64, features=40),
    _case("rank_1", 24, features=8),
    _case("batch_0", 0, 4, 16, features=8),
    _case("several_tiles", 83, 72, features=40),
    _case("large", 4, 48, features=24, scale=30.0),
    _case("tiny", 4, 48, features=24, scale=1e-3),
    _case("left_tail", 4, 48, features=24, gate=-5.0),
    _changed("offset_view", lambda generator, **_: {"x": _normal(generator, 1 + 21 * 24)[1:].view(3, 7, 24)}),
    _changed("chunk", lambda generator, **_: {"x": _normal(generator, 3, 7, 72).chunk(3, dim=-1)[1]}),
    _changed("transposed", _transposed),
    _changed("holds_nan", _holds_nan),
    _case("kolors_2x4096x640_to_2560", 2, 4096, 640, features=2560, model=True),
    _case("kolors_2x1024x1280_to_5120", 2, 1024, 1280, features=5120, model=True),
    _case("kolors_512_2x1024x640_to_2560", 2, 1024, 640, features=2560, model=True),
    _case("kolors_512_2x256x1280_to_5120", 2, 256, 1280, features=5120, model=True),
)


def _sizes(inputs: Inputs) -> tuple[int, int, int]:
    """M, N, K."""
    return math.prod(inputs["x"].shape[:-1]), inputs["weight"].shape[0] // 2, inputs["x"].shape[-1]


def _bytes_moved(inputs: Inputs) -> int:
    """x, weight and bias read once, y written once."""
    (rows, features, depth), size = _sizes(inputs), int(inputs["x"].element_size())
    return (rows * (depth + features) + 2 * features * (depth + (inputs["bias"] is not None))) * size


def _flops(inputs: Inputs) -> int:
    """The product, and about 31 for each activation."""
    rows, features, depth = _sizes(inputs)
    return rows * features * (4 * depth + 31)


def _details(call: Call) -> dict[str, str]:
    """Whether the Triton column multiplies by itself."""
    reason = _backends.declined("triton", COLUMNS, call) or _epilogue_declines(call)
    return {"triton epilogue": "runs" if reason is None else f"declines: {reason}"}


SPEC = OpSpec(
    name="geglu_linear",
    function=geglu_linear,
    reference=reference,
    eager=_eager,
    prepare=_prepare,
    columns=COLUMNS,
    cases=CASES,
    bytes_moved=_bytes_moved,
    flops=_flops,
    gradients=("x", "weight", "bias"),
    details=_details,
    traced_as="geglu",
)
