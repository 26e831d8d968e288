"""The gradient that enters a resblock: scaled, and freed of what is not finite."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kolors_fast.kernels.device import guard

from . import _backends, _layout, _library
from . import _gradient_scaling as scaling
from ._arguments import refused_by_kind
from ._operator import Operator
from ._spec import Case, Inputs, OpSpec


class Call(NamedTuple):
    """A checked call: what the registered op takes, in its order, and what every launcher reads."""

    x: Tensor
    scale: Tensor  # one element
    dtype: torch.dtype  # of the result


def scale_and_filter(x: Tensor, scale: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """y = x * scale in fp32; 0 where that is NaN or Inf; then rounded to `dtype`.

    The rounding itself may overflow: a gradient too large for float16 becomes Inf in the branch, shows in the parameter
    gradients, and lowers the scale. Subnormals are kept (unless `torch.set_flush_denormal` is on, for a CPU). No
    gradient: this is part of a backward pass.

    Args:
        x: any shape; float32, float16, bfloat16 (float64: reference only).
        scale: float32, one element, on x's device (float64 may go with float64); read by the kernel, never by the host.
        dtype: of the result; default x's.

    Returns:
        Like x, channels_last kept.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named with expected and got.

    Source: Ramesh et al., arXiv 2102.12092, section 2.4 and figure 4.
    """
    y: Tensor = _operator(_prepare(x, scale, dtype=dtype))
    return y


@refused_by_kind("scale_and_filter")
def _prepare(x: Tensor, scale: Tensor, *, dtype: torch.dtype | None = None) -> Call:
    """Check the public arguments."""
    scaling.check("scale_and_filter", x, scale, dtype)
    _library.refuse_grad("scale_and_filter", x=x, scale=scale)
    return Call(x, scale, x.dtype if dtype is None else dtype)


# ---- reference column


def reference(x: Tensor, scale: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
    return _reference_scale(_prepare(x, scale, dtype=dtype))[0]


def _reference_scale(call: Call) -> tuple[Tensor]:
    return (scaling.or_zero(call.x.to(scaling.wide(call.x)) * call.scale.reshape(())).to(call.dtype),)


def _eager(x: Tensor, scale: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """What a trainer writes today; the faster of this and `torch.where(y.isfinite(), y, 0)`."""
    return torch.nan_to_num(x * scale, 0.0, 0.0, 0.0).to(x.dtype if dtype is None else dtype)


# ---- extension columns (C++ and CUDA C++ export the same function)


def _extension_scale(name: str, call: Call) -> tuple[Tensor]:
    module: Any = _backends.extension(name)
    x, scale, dtype = call
    y, code = torch.empty_like(x, dtype=dtype), _library.DTYPE_CODE
    with guard(x):
        module.scale_and_filter(
            x.data_ptr(), scale.data_ptr(), y.data_ptr(), x.numel(), code[x.dtype], code[dtype], _library.stream(x)
        )
    return (y,)


# ---- Triton column


def _triton_scale(call: Call) -> tuple[Tensor]:
    from kolors_fast.kernels import scale_and_filter as kernel  # triton is imported at first use

    return (kernel.scale(*call),)


def _declines(call: Call) -> str | None:
    return scaling.writes(call.dtype)


COLUMNS = {
    "reference": _backends.Column(_reference_scale),
    "cpu": _backends.Column(partial(_extension_scale, "cpu"), declines=_declines),
    "triton": _backends.Column(_triton_scale, declines=_declines),
    "cuda": _backends.Column(partial(_extension_scale, "cuda"), declines=_declines),
}


# ---- from a call to a launcher


def _dense(call: Call) -> Call:
    return call._replace(x=_layout.as_layout(call.x, _layout.is_channels_last(call.x)))


def _fake(call: Call) -> tuple[Tensor]:
    return (torch.empty_like(call.x, dtype=call.dtype),)


_operator = Operator("scale_and_filter", Call, COLUMNS, dense=_dense, fake=_fake)


# ---- what tests, benchmarks and explain() are made from


def _case(
    name: str,
    *shape: int,
    scale: float = 2.0**13,
    size: float = 1e-3,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    special: bool = False,
    stream: bool = False,
    model: bool = False,
) -> Case:
    """A case; with `stream` x is float32 whatever else is, as the residual stream is."""

    def make(generator: torch.Generator) -> Inputs:
        x = scaling.normal(generator, *shape, size=size, channels_last=channels_last)
        x = scaling.with_special_values(x) if special else x
        return {"x": x.float() if stream else x, "scale": torch.tensor(scale), "dtype": dtype}

    return Case(name, make, model=model)


def _offset_view(generator: torch.Generator) -> Inputs:
    x = scaling.offset(scaling.normal(generator, 6, 35))
    return {"x": x, "scale": torch.tensor([2.0**10.5]), "dtype": torch.float16}


def _strided(generator: torch.Generator) -> Inputs:
    x = scaling.normal(generator, 2, 4, 6, 10)[..., ::2]
    return {"x": x, "scale": torch.tensor([0.0, 2.0**7.5])[1:], "dtype": None}


CASES = (
    _case("plain", 3, 16, 40),
    _case("to_float16", 3, 16, 40, dtype=torch.float16),
    _case("to_bfloat16", 3, 16, 40, dtype=torch.bfloat16),
    _case("to_float32", 3, 16, 40, dtype=torch.float32, scale=2.0**24),
    _case("stream", 2, 7, 29, stream=True, dtype=torch.float16, scale=2.0**12.5),
    _case("prime", 2 * 1031 + 1, dtype=torch.float16),
    _case("one_element", 1),
    _case("rank_0"),
    _case("batch_0", 0, 4, 8),
    _case("channels_last", 2, 3, 5, 6, channels_last=True, dtype=torch.float16),
    _case("float16_overflows", 4, 33, size=100.0, dtype=torch.float16),
    _case("tiny", 4, 33, size=1e-6, scale=1e-36, dtype=torch.float32),
    _case("scale_inf", 4, 33, scale=float("inf")),
    _case("scale_0", 4, 33, scale=0.0),
    _case("holds_nan", 4, 33, special=True, dtype=torch.float16),
    Case("offset_view", _offset_view),
    Case("strided", _strided),
    _case("dalle_2x4096x1536_to_float16", 2, 4096, 1536, stream=True, dtype=torch.float16, model=True),
    _case("dalle_2x4096x1536_to_bfloat16", 2, 4096, 1536, stream=True, dtype=torch.bfloat16, model=True),
)


def _bytes_moved(inputs: Inputs) -> int:
    x: Tensor = inputs["x"]
    return x.numel() * (x.element_size() + (inputs["dtype"] or x.dtype).itemsize)


def _flops(inputs: Inputs) -> int:
    return int(inputs["x"].numel())


SPEC = OpSpec(
    name="scale_and_filter",
    function=scale_and_filter,
    reference=reference,
    eager=_eager,
    prepare=_prepare,
    columns=COLUMNS,
    cases=CASES,
    bytes_moved=_bytes_moved,
    flops=_flops,
)
