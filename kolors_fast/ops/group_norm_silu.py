"""GroupNorm then SiLU of concat(x, skip) + channel_add, without building the concat."""

from __future__ import annotations

import math
from functools import partial
from operator import index
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_fast.kernels.device import guard

from . import _backends, _layout, _library
from ._arguments import refused_by_kind
from ._group_norm_silu_cases import CASES
from ._operator import Operator
from ._spec import Inputs, OpSpec

Grads = tuple[Tensor]  # of y
Saved = tuple[Tensor]  # statistics
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Call(NamedTuple):
    """A checked call: what the registered op takes, in its order, and what every launcher reads."""

    x: Tensor  # [N, C, *spatial]
    skip: Tensor | None  # [N, Cs, *spatial]
    weight: Tensor  # [C + Cs]
    bias: Tensor  # [C + Cs]
    channel_add: Tensor | None  # [N, C + Cs]
    num_groups: int
    eps: float
    silu: bool


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    skip: Tensor | None = None,
    channel_add: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """y = silu(GroupNorm(concat(x, skip) + channel_add) * weight + bias), in one pass over the inputs.

    Mean and variance (biased) of each group are taken in fp32 over concat(x, skip) + channel_add, so that a time
    embedding and a convolution's bias need no pass of their own and a UNet's skip needs no concat; groups may
    straddle the seam. One rounding, at the store. Differentiable once in x, skip, weight, bias and channel_add.

    Args:
        x: [N, C, *spatial], float32, float16, bfloat16 (float64: reference only); NCHW or channels_last.
        num_groups: G, divides C + Cs.
        weight, bias: [C + Cs], in x's dtype or float32.
        eps: added to the variance, not negative.
        skip: [N, Cs, *spatial], the second half of the channels.
        channel_add: [N, C + Cs], in x's dtype.
        activation: "silu" or None.

    Returns:
        [N, C + Cs, *spatial] in x's dtype and layout (dense; channels_last stays channels_last).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named with expected and got.

    Source: Wu & He, Group Normalization, arXiv 1803.08494; the split reduction merges partial moments as in
    Chan, Golub & LeVeque, 1983.
    """
    call = _prepare(x, num_groups, weight, bias, eps, skip=skip, channel_add=channel_add, activation=activation)
    y: Tensor = _operator(call)
    return y


@refused_by_kind("group_norm_silu")
def _prepare(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    skip: Tensor | None = None,
    channel_add: Tensor | None = None,
    activation: str | None = "silu",
) -> Call:
    """Check the public arguments."""
    if x.dim() < 2:
        raise ValueError(f"group_norm_silu: x: expected [N, C, *spatial], got {list(x.shape)}")
    if x.dtype not in _library.FLOATING:
        raise TypeError(f"group_norm_silu: x: expected a floating dtype of 16 to 64 bits, got {x.dtype}")
    channels = x.shape[1]
    if skip is not None:
        if skip.dim() != x.dim() or skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:]:
            expected = [x.shape[0], "Cs", *x.shape[2:]]
            raise ValueError(f"group_norm_silu: skip: expected {expected}, got {list(skip.shape)}")
        _check_like("skip", skip, x, x.dtype)
        channels += skip.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm_silu: num_groups: expected a divisor of {channels} channels, got {num_groups}")
    if weight.shape != (channels,):
        raise ValueError(f"group_norm_silu: weight: expected [{channels}], got {list(weight.shape)}")
    if bias.shape != (channels,):
        raise ValueError(f"group_norm_silu: bias: expected [{channels}], got {list(bias.shape)}")
    _check_like("weight", weight, x, x.dtype if weight.dtype == x.dtype else torch.float32)
    _check_like("bias", bias, x, weight.dtype)
    if channel_add is not None:
        if channel_add.shape != (x.shape[0], channels):
            raise ValueError(
                f"group_norm_silu: channel_add: expected {[x.shape[0], channels]}, got {list(channel_add.shape)}"
            )
        _check_like("channel_add", channel_add, x, x.dtype)
    if activation not in ("silu", None):
        raise ValueError(f"group_norm_silu: activation: expected 'silu' or None, got {activation!r}")
    if not eps >= 0:
        raise ValueError(f"group_norm_silu: eps: expected a number >= 0, got {eps}")
    return Call(x, skip, weight, bias, channel_add, index(num_groups), float(eps), activation == "silu")


def _check_like(name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"group_norm_silu: {name}: expected {dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"group_norm_silu: {name}: expected a tensor on {x.device}, got {tensor.device}")


# ---- reference column


def reference(*args: Any, **options: Any) -> Tensor:
    """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
    return _reference_forward(_prepare(*args, **options))[0]


def _joined(call: Call) -> Tensor:
    """concat(x, skip) + channel_add in fp32 or float64: [N, C + Cs, *spatial]."""
    wide = torch.promote_types(call.x.dtype, torch.float32)
    h = call.x.to(wide) if call.skip is None else torch.cat([call.x, call.skip], dim=1).to(wide)
    return h if call.channel_add is None else h + _per_channel(call.channel_add, h)


def _per_channel(value: Tensor, h: Tensor) -> Tensor:
    """[C] or [N, C] -> broadcastable over h [N, C, *spatial], in its dtype."""
    return value.to(h.dtype).reshape(-1, h.shape[1], *[1] * (h.dim() - 2))


def _reference_forward(call: Call) -> tuple[Tensor, Tensor]:
    h = _joined(call)
    groups = _grouped(h, call.num_groups)
    mean = groups.mean(dim=2, keepdim=True)
    rstd = torch.rsqrt((groups - mean).square().mean(dim=2, keepdim=True) + call.eps)
    u = ((groups - mean) * rstd).reshape(h.shape) * _per_channel(call.weight, h) + _per_channel(call.bias, h)
    y = (F.silu(u) if call.silu else u).to(call.x.dtype)
    return _layout.as_layout(y, _layout.is_channels_last(call.x)), torch.cat([mean.flatten(), rstd.flatten()])


def _reference_backward(call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    """With u = x_hat*w + b and g = dL/du: dx = rstd * (g*w - mean(g*w) - x_hat * mean(g*w*x_hat))."""
    (grad_y,), (statistics,) = grads, saved
    h = _joined(call)
    shape, groups = h.shape, _grouped(h, call.num_groups)
    mean, rstd = statistics.reshape(2, *groups.shape[:2], 1)
    n_hat = (groups - mean) * rstd  # [N, G, C/G * HW]
    x_hat = n_hat.reshape(shape)
    w = _per_channel(call.weight, h)
    g = grad_y.to(h.dtype)
    if call.silu:
        u = x_hat * w + _per_channel(call.bias, h)
        s = torch.sigmoid(u)
        g = g * s * (1 + u * (1 - s))
    gw = (g * w).reshape(groups.shape)
    grad_h = gw - gw.mean(2, keepdim=True) - n_hat * (gw * n_hat).mean(2, keepdim=True)
    grad_h = (grad_h * rstd).reshape(shape)
    spatial = list(range(2, h.dim()))
    last, channels = _layout.is_channels_last(call.x), call.x.shape[1]
    grad_x = _layout.as_layout(grad_h[:, :channels].to(call.x.dtype), last)
    grad_skip = None if call.skip is None else _layout.as_layout(grad_h[:, channels:].to(call.x.dtype), last)
    grad_add = None if call.channel_add is None else grad_h.sum(spatial) if spatial else grad_h
    return grad_x, grad_skip, (g * x_hat).sum([0, *spatial]), g.sum([0, *spatial]), grad_add


def _grouped(h: Tensor, num_groups: int) -> Tensor:
    return h.reshape(h.shape[0], num_groups, math.prod(h.shape[1:]) // num_groups)  # [N, G, C/G * HW]


def _eager(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    skip: Tensor | None = None,
    channel_add: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    h = x if skip is None else torch.cat([x, skip], dim=1)
    h = h if channel_add is None else h + _per_channel(channel_add, h)
    h = F.group_norm(h, num_groups, weight.to(h.dtype), bias.to(h.dtype), eps)
    return F.silu(h) if activation == "silu" else h


# ---- extension columns (C++ and CUDA C++ export the same functions)


def _extension_forward(name: str, call: Call) -> tuple[Tensor, Tensor]:
    module: Any = _backends.extension(name)
    x, skip, weight, bias, channel_add, num_groups, eps, silu = call
    last, n, c, c_skip, hw = _geometry(call)
    outputs = y, statistics = _fake(call)
    p, mean, rstd = _library.pointer, *_moments(statistics)
    with guard(x):
        size = module.group_norm_silu_workspace(n, c + c_skip, hw, num_groups, last, False)
        scratch = x.new_empty(size, dtype=torch.uint8) if size else None
        module.group_norm_silu_forward(
            p(x), p(skip), p(weight), p(bias), p(channel_add), p(y), mean, rstd, p(scratch),
            n, c, c_skip, hw, num_groups, eps, silu, last,
            _library.DTYPE_CODE[x.dtype], _library.DTYPE_CODE[weight.dtype], _library.stream(x),
        )  # fmt: skip
    return outputs


def _extension_backward(name: str, call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    module: Any = _backends.extension(name)
    (statistics,) = saved
    x, skip, weight, bias, channel_add, num_groups, _, silu = call
    last, n, c, c_skip, hw = _geometry(call)
    grad_y = _layout.as_layout(grads[0], last)
    grad_x = _layout.empty(x.shape, last, x) if needs[0] else None
    grad_skip = _layout.empty(skip.shape, last, x) if skip is not None and needs[1] else None
    grad_weight = statistics.new_empty(c + c_skip) if needs[2] else None
    grad_bias = statistics.new_empty(c + c_skip) if needs[3] else None
    grad_add = statistics.new_empty(n, c + c_skip) if channel_add is not None and needs[4] else None
    p, mean, rstd = _library.pointer, *_moments(statistics)
    with guard(x):
        size = module.group_norm_silu_workspace(n, c + c_skip, hw, num_groups, last, True)
        scratch = x.new_empty(size, dtype=torch.uint8) if size else None
        module.group_norm_silu_backward(
            p(grad_y), p(x), p(skip), p(weight), p(bias), p(channel_add), mean, rstd,
            p(grad_x), p(grad_skip), p(grad_weight), p(grad_bias), p(grad_add), p(scratch),
            n, c, c_skip, hw, num_groups, silu, last,
            _library.DTYPE_CODE[x.dtype], _library.DTYPE_CODE[weight.dtype], _library.stream(x),
        )  # fmt: skip
    return grad_x, grad_skip, grad_weight, grad_bias, grad_add


def _geometry(call: Call) -> tuple[bool, int, int, int, int]:
    """Whether channels are last, N, C, Cs and the product of the spatial sides."""
    x, skip = call.x, call.skip
    n, c, *spatial = x.shape
    return _layout.is_channels_last(x), n, c, 0 if skip is None else skip.shape[1], math.prod(spatial)


def _moments(statistics: Tensor) -> tuple[int, int]:
    """The addresses of the means and of the rstds."""
    mean = statistics.data_ptr()
    return mean, mean + statistics.nbytes // 2


# ---- Triton column


def _triton_forward(call: Call) -> tuple[Tensor, Tensor]:
    from kolors_fast.kernels import group_norm_silu as kernel  # triton is imported at first use

    outputs: tuple[Tensor, Tensor] = kernel.forward(*call, _layout.is_channels_last(call.x))
    return outputs


def _triton_backward(call: Call, grads: Grads, saved: Saved, needs: list[bool]) -> Gradients:
    from kolors_fast.kernels import group_norm_silu_backward as kernel

    last = _layout.is_channels_last(call.x)
    grad_y = _layout.as_layout(grads[0], last)
    found: Gradients = kernel.backward(grad_y, *call[:5], *saved, call.num_groups, call.silu, last, tuple(needs))
    return found


COLUMNS = {
    "reference": _backends.Column(_reference_forward, _reference_backward),
    "cpu": _backends.Column(partial(_extension_forward, "cpu"), partial(_extension_backward, "cpu")),
    "triton": _backends.Column(_triton_forward, _triton_backward),
    "cuda": _backends.Column(partial(_extension_forward, "cuda"), partial(_extension_backward, "cuda")),
}


# ---- from a call to a launcher


def _dense(call: Call) -> Call:
    """The same call on dense tensors, skip in the layout of x: what the kernels read."""
    x, skip, weight, bias, channel_add = call[:5]
    last = _layout.is_channels_last(x)
    return Call(
        _layout.as_layout(x, last),
        None if skip is None else _layout.as_layout(skip, last),
        weight.contiguous(),
        bias.contiguous(),
        None if channel_add is None else channel_add.contiguous(),
        *call[5:],
    )


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    """y, and statistics [2 * N * G] for the backward pass: the mean, then the rstd of every group."""
    x, skip = call.x, call.skip
    if skip is None:
        y = torch.empty_like(x)
    else:
        channels = x.shape[1] + skip.shape[1]
        y = _layout.empty((x.shape[0], channels, *x.shape[2:]), _layout.is_channels_last(x), x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y, x.new_empty(2 * x.shape[0] * call.num_groups, dtype=wide)


_operator = Operator("group_norm_silu", Call, COLUMNS, dense=_dense, fake=_fake, saved=1)


# ---- what tests, benchmarks and explain() are made from


def _bytes_moved(inputs: Inputs) -> int:
    """x and skip read once, y written once: the floor of a one-pass kernel."""
    x, skip = inputs["x"], inputs.get("skip")
    elements = x.numel() + (0 if skip is None else skip.numel())
    return 2 * elements * x.element_size()


def _flops(inputs: Inputs) -> int:
    """About 13 per element: 5 for the moments, 3 to normalise and scale, 5 for SiLU."""
    x, skip = inputs["x"], inputs.get("skip")
    return 13 * (x.numel() + (0 if skip is None else skip.numel()))


SPEC = OpSpec(
    name="group_norm_silu",
    function=group_norm_silu,
    reference=reference,
    eager=_eager,
    prepare=_prepare,
    columns=COLUMNS,
    cases=CASES,
    bytes_moved=_bytes_moved,
    flops=_flops,
    gradients=("x", "skip", "weight", "bias", "channel_add"),
)
