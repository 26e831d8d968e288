"""GroupNorm then SiLU of concat(x, skip) + channel_add, without building the concat."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_fast.kernels.device import guard

from . import _backends, _layout, _library
from ._group_norm_silu_cases import CASES
from ._spec import Inputs, OpSpec

Args = tuple[Any, ...]


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
    args = _prepare(x, num_groups, weight, bias, eps, skip=skip, channel_add=channel_add, activation=activation)
    if _library.tracing(x):
        y: Tensor = _forward_op(*args)[0]
        return y
    if _library.wants_grad(args[:5]):
        y = _GroupNormSiLU.apply(*args)[0]
        return y
    return _forward(*args)[0]


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
) -> Args:
    """Check the public arguments and put them in the launchers' order."""
    if x.dim() < 2:
        raise ValueError(f"group_norm_silu: x: expected [N, C, *spatial], got {list(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"group_norm_silu: x: expected a floating dtype, got {x.dtype}")
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
    return x, skip, weight, bias, channel_add, num_groups, float(eps), activation == "silu"


def _check_like(name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"group_norm_silu: {name}: expected {dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"group_norm_silu: {name}: expected a tensor on {x.device}, got {tensor.device}")


# ---- reference column


def reference(
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
    """The definition, in plain PyTorch: fp32 inside, float64 for float64."""
    args = _prepare(x, num_groups, weight, bias, eps, skip=skip, channel_add=channel_add, activation=activation)
    return _reference_forward(*args)[0]


def _joined(x: Tensor, skip: Tensor | None, channel_add: Tensor | None, wide: torch.dtype) -> Tensor:
    h = x.to(wide) if skip is None else torch.cat([x, skip], dim=1).to(wide)  # [N, C + Cs, *spatial]
    return h if channel_add is None else h + _per_channel(channel_add.to(wide), h)


def _per_channel(value: Tensor, h: Tensor) -> Tensor:
    """[C] or [N, C] -> broadcastable over h [N, C, *spatial]."""
    return value.reshape(-1, h.shape[1], *[1] * (h.dim() - 2))


def _reference_forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    channel_add: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    h = _joined(x, skip, channel_add, wide)
    groups = _grouped(h, num_groups)
    mean = groups.mean(dim=2, keepdim=True)
    rstd = torch.rsqrt((groups - mean).square().mean(dim=2, keepdim=True) + eps)
    u = ((groups - mean) * rstd).reshape(h.shape) * _per_channel(weight.to(wide), h)
    u = u + _per_channel(bias.to(wide), h)
    y = (F.silu(u) if silu else u).to(x.dtype)
    return _layout.as_layout(y, _layout.is_channels_last(x)), mean.squeeze(2), rstd.squeeze(2)


def _reference_backward(
    grad_y: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    channel_add: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    silu: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """With u = x_hat*w + b and g = dL/du: dx = rstd * (g*w - mean(g*w) - x_hat * mean(g*w*x_hat))."""
    wide = mean.dtype
    h = _joined(x, skip, channel_add, wide)
    shape, groups = h.shape, _grouped(h, num_groups)
    x_hat = ((groups - mean[..., None]) * rstd[..., None]).reshape(shape)
    w = _per_channel(weight.to(wide), h)
    g = grad_y.to(wide)
    if silu:
        u = x_hat * w + _per_channel(bias.to(wide), h)
        s = torch.sigmoid(u)
        g = g * s * (1 + u * (1 - s))
    over = [0, *range(2, h.dim())]
    gw = (g * w).reshape(groups.shape)  # [N, G, C/G * HW]
    n_hat = x_hat.reshape(groups.shape)
    grad_h = gw - gw.mean(2, keepdim=True) - n_hat * (gw * n_hat).mean(2, keepdim=True)
    grad_h = (grad_h * rstd[..., None]).reshape(shape)
    last = _layout.is_channels_last(x)
    grad_x = _layout.as_layout(grad_h[:, : x.shape[1]].to(x.dtype), last)
    grad_skip = None if skip is None else _layout.as_layout(grad_h[:, x.shape[1] :].to(x.dtype), last)
    grad_add = None if channel_add is None else grad_h.sum(over[1:]) if over[1:] else grad_h
    return grad_x, grad_skip, (g * x_hat).sum(over), g.sum(over), grad_add


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


def _extension_forward(
    name: str,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    channel_add: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    module: Any = _backends.extension(name)
    last, n, c, c_skip, hw = _geometry(x, skip)
    y = _layout.empty((n, c + c_skip, *x.shape[2:]), last, x)
    mean = x.new_empty((n, num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    p = _library.pointer
    with guard(x):
        scratch = _workspace(module, x, n, c + c_skip, hw, num_groups, last, backward=False)
        module.group_norm_silu_forward(
            p(x), p(skip), p(weight), p(bias), p(channel_add), p(y), p(mean), p(rstd), p(scratch),
            n, c, c_skip, hw, num_groups, eps, silu, last,
            _library.DTYPE_CODE[x.dtype], _library.DTYPE_CODE[weight.dtype], _library.stream(x),
        )  # fmt: skip
    return y, mean, rstd


def _extension_backward(
    name: str,
    grad_y: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    channel_add: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    silu: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    module: Any = _backends.extension(name)
    last, n, c, c_skip, hw = _geometry(x, skip)
    grad_x = _layout.empty(x.shape, last, x) if needs[0] else None
    grad_skip = _layout.empty(skip.shape, last, x) if skip is not None and needs[1] else None
    grad_weight = mean.new_empty(c + c_skip) if needs[2] else None
    grad_bias = mean.new_empty(c + c_skip) if needs[3] else None
    grad_add = mean.new_empty((n, c + c_skip)) if channel_add is not None and needs[4] else None
    p = _library.pointer
    with guard(x):
        scratch = _workspace(module, x, n, c + c_skip, hw, num_groups, last, backward=True)
        module.group_norm_silu_backward(
            p(grad_y), p(x), p(skip), p(weight), p(bias), p(channel_add), p(mean), p(rstd),
            p(grad_x), p(grad_skip), p(grad_weight), p(grad_bias), p(grad_add), p(scratch),
            n, c, c_skip, hw, num_groups, silu, last,
            _library.DTYPE_CODE[x.dtype], _library.DTYPE_CODE[weight.dtype], _library.stream(x),
        )  # fmt: skip
    return grad_x, grad_skip, grad_weight, grad_bias, grad_add


def _geometry(x: Tensor, skip: Tensor | None) -> tuple[bool, int, int, int, int]:
    last = _layout.is_channels_last(x)
    return last, x.shape[0], x.shape[1], 0 if skip is None else skip.shape[1], math.prod(x.shape[2:])


def _workspace(
    module: Any, x: Tensor, n: int, channels: int, hw: int, num_groups: int, last: bool, *, backward: bool
) -> Tensor | None:
    size = module.group_norm_silu_workspace(n, channels, hw, num_groups, last, backward)
    return x.new_empty(size, dtype=torch.uint8) if size else None


# ---- Triton column


def _triton_forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    channel_add: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from kolors_fast.kernels import group_norm_silu as kernel  # triton is imported at first use

    last = _layout.is_channels_last(x)
    outputs: tuple[Tensor, Tensor, Tensor] = kernel.forward(
        x, skip, weight, bias, channel_add, num_groups, eps, silu, last
    )
    return outputs


def _triton_backward(*args: Any) -> tuple[Tensor | None, ...]:
    from kolors_fast.kernels import group_norm_silu as kernel

    *tensors_and_flags, needs = args
    last = _layout.is_channels_last(args[1])
    grads: tuple[Tensor | None, ...] = kernel.backward(*tensors_and_flags, last, tuple(needs))
    return grads


COLUMNS = {
    "reference": _backends.Column(_reference_forward, _reference_backward),
    "cpu": _backends.Column(
        lambda *args: _extension_forward("cpu", *args), lambda *args: _extension_backward("cpu", *args)
    ),
    "triton": _backends.Column(_triton_forward, _triton_backward),
    "cuda": _backends.Column(
        lambda *args: _extension_forward("cuda", *args), lambda *args: _extension_backward("cuda", *args)
    ),
}


# ---- from a call to a launcher: the direct route and the registered op share these


def _forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    channel_add: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    last = _layout.is_channels_last(x)
    x = _layout.as_layout(x, last)
    skip = None if skip is None else _layout.as_layout(skip, last)
    channel_add = None if channel_add is None else channel_add.contiguous()
    args = (x, skip, weight.contiguous(), bias.contiguous(), channel_add, num_groups, eps, silu)
    column = COLUMNS[_backends.choose("group_norm_silu", COLUMNS, args)]
    if x.numel() == 0 and (skip is None or skip.numel() == 0):
        return _forward_fake(*args)  # empty: shapes are all there is
    outputs: tuple[Tensor, Tensor, Tensor] = column.forward(*args)
    return outputs


def _forward_fake(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    channel_add: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    y = _layout.empty((x.shape[0], channels, *x.shape[2:]), _layout.is_channels_last(x), x)
    statistics = torch.promote_types(x.dtype, torch.float32)
    mean = x.new_empty((x.shape[0], num_groups), dtype=statistics)
    return y, mean, torch.empty_like(mean)


def _backward(
    grad_y: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    channel_add: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    silu: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    last = _layout.is_channels_last(x)
    x, grad_y = _layout.as_layout(x, last), _layout.as_layout(grad_y, last)
    skip = None if skip is None else _layout.as_layout(skip, last)
    channel_add = None if channel_add is None else channel_add.contiguous()
    args = (
        grad_y, x, skip, weight.contiguous(), bias.contiguous(), channel_add, mean, rstd, num_groups, silu, needs,
    )  # fmt: skip
    if grad_y.numel() == 0:
        empty = _backward_fake(*args)
        return empty[0], empty[1], empty[2].zero_(), empty[3].zero_(), empty[4].zero_()
    chosen = _backends.choose("group_norm_silu", COLUMNS, (x, *args))
    grads = COLUMNS[chosen].backward(*args)  # type: ignore[misc]  # every column has one
    like = (x, x if skip is None else skip, weight, bias, x if channel_add is None else channel_add)
    # a schema has no optional results, so "not wanted" travels as an empty tensor
    wanted = [
        g.to(t.dtype) if g is not None and need else t.new_empty(0)
        for g, t, need in zip(grads, like, needs, strict=True)
    ]
    return wanted[0], wanted[1], wanted[2], wanted[3], wanted[4]


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    channel_add: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    silu: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    last = _layout.is_channels_last(x)
    return (
        _layout.empty(x.shape, last, x) if needs[0] else x.new_empty(0),
        _layout.empty(skip.shape, last, x) if skip is not None and needs[1] else x.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[2] else weight.new_empty(0),
        torch.empty_like(bias, memory_format=torch.contiguous_format) if needs[3] else bias.new_empty(0),
        x.new_empty(channel_add.shape) if channel_add is not None and needs[4] else x.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: Args, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, skip, weight, bias, channel_add, ctx.num_groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, skip, weight, bias, channel_add, output[1], output[2])


def _autograd_backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
    grad_y: Tensor = grad_outputs[0]  # mean and rstd are for us alone
    x, skip, weight, bias, channel_add, mean, rstd = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    run = _backward_op if _library.tracing(grad_y) else _backward
    grads = run(grad_y, x, skip, weight, bias, channel_add, mean, rstd, ctx.num_groups, ctx.silu, needs)
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return (*wanted, None, None, None)


class _GroupNormSiLU(torch.autograd.Function):
    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(torch.autograd.function.once_differentiable(_autograd_backward))  # type: ignore[assignment]


_TENSORS = "Tensor x, Tensor? skip, Tensor weight, Tensor bias, Tensor? channel_add"
_forward_op = _library.define(
    f"group_norm_silu({_TENSORS}, int num_groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = _library.define(
    f"group_norm_silu_backward(Tensor grad_y, {_TENSORS}, Tensor mean, Tensor rstd, int num_groups, bool silu, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_library.define_autograd("group_norm_silu", _autograd_backward, _setup_context)


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
