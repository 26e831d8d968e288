"""The gradient that leaves a resblock: unscaled, freed of what is not finite, added to the stream's."""

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
    add: Tensor | None  # like x, float32 or x's dtype
    dtype: torch.dtype  # of the result


def unscale_and_filter(
    x: Tensor, scale: Tensor, *, add: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """z = x / scale in fp32; 0 where that is NaN or Inf; plus `add` in fp32; then rounded to `dtype`.

    One resblock's overflow ends here, while `add` passes as it is, NaN and Inf included. Subnormals are kept (unless
    `torch.set_flush_denormal` is on, for a CPU). No gradient: this is part of a backward pass.

    Args:
        x: any shape; float32, float16, bfloat16 (float64: reference only).
        scale: float32, one element, on x's device (float64 may go with float64); read by the kernel, never by the host.
        add: the gradient of the residual stream: x's shape, float32 or x's dtype.
        dtype: of the result; default add's, else x's.

    Returns:
        Like x, channels_last kept.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named with expected and got.

    Source: Ramesh et al., arXiv 2102.12092, section 2.4 and figure 4.
    """
    z: Tensor = _operator(_prepare(x, scale, add=add, dtype=dtype))
    return z


@refused_by_kind("unscale_and_filter")
def _prepare(x: Tensor, scale: Tensor, *, add: Tensor | None = None, dtype: torch.dtype | None = None) -> Call:
    """Check the public arguments."""
    scaling.check("unscale_and_filter", x, scale, dtype)
    if add is not None:
        if add.shape != x.shape:
            raise ValueError(f"unscale_and_filter: add: expected {list(x.shape)}, got {list(add.shape)}")
        if add.dtype != x.dtype and add.dtype != torch.float32:
            raise TypeError(f"unscale_and_filter: add: expected torch.float32 or {x.dtype}, got {add.dtype}")
        if add.device != x.device:
            raise ValueError(f"unscale_and_filter: add: expected a tensor on {x.device}, got {add.device}")
    _library.refuse_grad("unscale_and_filter", x=x, scale=scale, add=add)
    return Call(x, scale, add, dtype or (x if add is None else add).dtype)


# ---- reference column


def reference(x: Tensor, scale: Tensor, *, add: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
    return _reference_unscale(_prepare(x, scale, add=add, dtype=dtype))[0]


def _reference_unscale(call: Call) -> tuple[Tensor]:
    wide = scaling.wide(call.x)
    z = scaling.or_zero(call.x.to(wide) / call.scale.reshape(()))
    return ((z if call.add is None else z + call.add.to(wide)).to(call.dtype),)


def _eager(x: Tensor, scale: Tensor, *, add: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """What a trainer writes today; the faster of this and `torch.where(z.isfinite(), z, 0)`."""
    z = torch.nan_to_num(x / scale, 0.0, 0.0, 0.0)
    return (z if add is None else z + add).to(dtype or (x if add is None else add).dtype)


# ---- extension columns (C++ and CUDA C++ export the same function)


def _extension_unscale(name: str, call: Call) -> tuple[Tensor]:
    module: Any = _backends.extension(name)
    x, scale, add, dtype = call
    z, code, p = torch.empty_like(x, dtype=dtype), _library.DTYPE_CODE, _library.pointer
    with guard(x):
        module.unscale_and_filter(
            p(x), p(scale), p(add), p(z), x.numel(),
            code[x.dtype], code[x.dtype if add is None else add.dtype], code[dtype], _library.stream(x),
        )  # fmt: skip
    return (z,)


# ---- Triton column


def _triton_unscale(call: Call) -> tuple[Tensor]:
    from kolors_fast.kernels import unscale_and_filter as kernel  # triton is imported at first use

    return (kernel.unscale(*call),)


def _declines(call: Call) -> str | None:
    return scaling.writes(call.dtype)


COLUMNS = {
    "reference": _backends.Column(_reference_unscale),
    "cpu": _backends.Column(partial(_extension_unscale, "cpu"), declines=_declines),
    "triton": _backends.Column(_triton_unscale, declines=_declines),
    "cuda": _backends.Column(partial(_extension_unscale, "cuda"), declines=_declines),
}


# ---- from a call to a launcher


def _dense(call: Call) -> Call:
    """The same call on dense tensors in x's layout: the kernels see flat arrays."""
    last = _layout.is_channels_last(call.x)
    add = None if call.add is None else _layout.as_layout(call.add, last)
    return call._replace(x=_layout.as_layout(call.x, last), add=add)


def _fake(call: Call) -> tuple[Tensor]:
    return (torch.empty_like(call.x, dtype=call.dtype),)


_operator = Operator("unscale_and_filter", Call, COLUMNS, dense=_dense, fake=_fake)


# ---- what tests, benchmarks and explain() are made from


def _case(
    name: str,
    *shape: int,
    scale: float = 2.0**13,
    size: float = 1.0,
    add: str | None = "stream",
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    special: bool = False,
    branch: torch.dtype | None = None,
    model: bool = False,
) -> Case:
    """A case; `add` is absent, "stream" (float32) or "like_x"; with `branch` x has that dtype whatever else has."""

    def make(generator: torch.Generator) -> Inputs:
        x = scaling.normal(generator, *shape, size=size, channels_last=channels_last)
        x = scaling.with_special_values(x) if special else x
        other = scaling.normal(generator, *shape, size=size / scale if 0 < scale < 2.0**99 else 1.0)
        inputs: Inputs = {"x": x if branch is None else x.to(branch), "scale": torch.tensor(scale), "dtype": dtype}
        return inputs | {"add": {None: None, "stream": other.float(), "like_x": other}[add]}

    return Case(name, make, model=model)


def _offset_view(generator: torch.Generator) -> Inputs:
    x, add = scaling.offset(scaling.normal(generator, 6, 35)), scaling.normal(generator, 6, 35).float()
    return {"x": x, "scale": torch.tensor([2.0**10.5]), "add": add, "dtype": torch.float16}


def _strided(generator: torch.Generator) -> Inputs:
    x = scaling.normal(generator, 2, 4, 6, 10)[..., ::2]
    add = scaling.normal(generator, 2, 4, 6, 5, channels_last=True)
    return {"x": x, "scale": torch.tensor([0.0, 2.0**7.5])[1:], "add": add, "dtype": None}


CASES = (
    _case("plain", 3, 16, 40),
    _case("alone", 3, 16, 40, add=None, scale=2.0**7.5),
    _case("alone_to_float32", 3, 16, 40, add=None, dtype=torch.float32, scale=2.0**24),
    _case("like_x", 3, 16, 40, add="like_x"),
    _case("to_float16", 2, 7, 29, dtype=torch.float16, scale=2.0**7.5),
    _case("to_bfloat16", 2, 7, 29, dtype=torch.bfloat16, scale=2.0**7.5),
    _case("prime", 2 * 1031 + 1),
    _case("one_element", 1),
    _case("rank_0"),
    _case("batch_0", 0, 4, 8),
    _case("channels_last", 2, 3, 5, 6, channels_last=True),
    _case("float16_overflows", 4, 33, scale=2.0**-17, add=None, dtype=torch.float16),
    _case("tiny", 4, 33, scale=2.0**130 / 4),
    _case("scale_inf", 4, 33, scale=float("inf")),
    _case("scale_0", 4, 33, scale=0.0),
    _case("holds_nan", 4, 33, special=True),
    Case("offset_view", _offset_view),
    Case("strided", _strided),
    _case("dalle_2x4096x1536_float16", 2, 4096, 1536, branch=torch.float16, model=True),
    _case("dalle_2x4096x1536_bfloat16", 2, 4096, 1536, branch=torch.bfloat16, model=True),
)


def _bytes_moved(inputs: Inputs) -> int:
    x, add = inputs["x"], inputs["add"]
    read = x.element_size() + (0 if add is None else add.element_size())
    return int(x.numel()) * (read + (inputs["dtype"] or (x if add is None else add).dtype).itemsize)


def _flops(inputs: Inputs) -> int:
    return int(inputs["x"].numel()) * (1 if inputs["add"] is None else 2)


SPEC = OpSpec(
    name="unscale_and_filter",
    function=unscale_and_filter,
    reference=reference,
    eager=_eager,
    prepare=_prepare,
    columns=COLUMNS,
    cases=CASES,
    bytes_moved=_bytes_moved,
    flops=_flops,
)
