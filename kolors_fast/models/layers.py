"""Layers shared by the UNet and the autoencoder. Module names follow diffusers' state-dict keys.

Feature maps are [B, C, H, W] in channels_last memory, so the token view [B, H*W, C] costs nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import savings
from ..ops._backends import forced
from ..ops._library import tracing, wants_grad
from ..ops._marks import Derived
from ..ops._products import conv2d, linear, linear_of_parts
from ..ops.group_norm_silu import group_norm_silu
from ..ops.residual_layer_norm import residual_layer_norm


def use_channels_last(model: nn.Module) -> None:
    """Store convolution weights as NHWC, now and after each load: they meet channels_last maps only."""
    store_convolutions(model)
    model.register_load_state_dict_post_hook(_store_after_load)


def _store_after_load(model: nn.Module, _keys: object) -> None:
    store_convolutions(model)


def store_convolutions(model: nn.Module, layout: torch.memory_format = torch.channels_last) -> None:
    """Bring the weights of all convolutions into this layout."""
    for parameter in model.parameters():
        if parameter.dim() == 4 and type(parameter.data) is Tensor:  # a shard keeps the layout its owner gave it
            parameter.data = parameter.data.contiguous(memory_format=layout)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H*W, C], a view when x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H*W, C] -> [B, C, H, W], a channels_last view."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def sinusoidal_embedding(positions: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """[sin(p f_i) | cos(p f_i)] with f_i = 10000^(-i / (dim/2 - freq_shift)), or [cos | sin] when flipped.

    positions [N] of any number dtype -> fp32 [N, dim]; an odd dim ends in a zero.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=positions.device)
    angles = positions[:, None].float() * torch.exp(exponent / (half - freq_shift))  # [N, half]
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


# what PEFT's layers hold beside parameters, and change without touching any
PEFT_STATE = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")


class Linear(nn.Linear):
    """nn.Linear by the fastest library at hand."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """nn.Conv2d without dilation and groups by the fastest library at hand."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, stride=self.stride, padding=self.padding)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between: [B, in_dim] -> [B, dim]."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_dim, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def is_wrapped(layer: nn.Module) -> bool:
    """Whether something stands around the layer (LoRA layers, hooks), so that it must be called."""
    if type(layer) not in (Linear, Conv2d, nn.Linear, nn.Conv2d, nn.LayerNorm) or "forward" in layer.__dict__:
        return True
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def conv_without_bias(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """conv(x) without its bias, and that bias for the caller to add; a wrapped conv runs whole."""
    if is_wrapped(conv) or not savings.on("channel_add"):
        return conv(x), None
    return conv2d(x, conv.weight, None, stride=conv.stride, padding=conv.padding), conv.bias


def add_and_norm(x: Tensor, y: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """r = x + y (or x), and norm(r), in one pass over both."""
    if y is None:
        return x, norm(x)
    same = x.dtype == y.dtype == norm.weight.dtype
    if same and savings.on("residual_norm") and not is_wrapped(norm):
        return residual_layer_norm(x, y, norm.weight, norm.bias, norm.eps)
    r = x + y
    return r, norm(r)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of concat(x, skip) + channel_add, then SiLU (or nothing), in one op."""

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        *,
        skip: Tensor | None = None,  # [B, S, H, W]
        channel_add: Tensor | None = None,  # [B, C + S]
        activation: str | None = "silu",
    ) -> Tensor:  # [B, C + S, H, W]
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            skip=skip,
            channel_add=channel_add,
            activation=activation,
        )


class ResnetBlock(nn.Module):
    """shortcut(x') + conv2(silu(norm2(conv1(silu(norm1(x'))) + time))) with x' = concat(x, skip).

    The concat is never built: norm1 reads both maps, and a 1x1 shortcut of a concat is the sum of two.
    conv1's bias and the time embedding are one [B, C] addition, made inside norm2.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, time_dim: int | None, num_groups: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = Linear(time_dim, out_channels) if time_dim is not None else None
        self.norm2 = GroupNorm(num_groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, shift: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], skip [B, S, H, W]; shift [B, Cout]: what `time_emb_proj` made of the time embedding."""
        if skip is not None and not savings.on("skip_concat"):
            x, skip = torch.cat([x, skip], dim=1), None
        return self.shortcut(x, skip, self.residual(x, shift, skip))

    def residual(self, x: Tensor, shift: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """What the block adds to its shortcut; arguments as those of `forward`."""
        h, bias = self.norm_and_conv1(x, skip)
        if bias is not None:
            shift = bias.expand(x.shape[0], -1) if shift is None else shift + bias
        if shift is not None:
            shift = shift.to(h.dtype)
            if not savings.on("channel_add"):
                h, shift = h + shift[:, :, None, None], None
        return self.norm_and_conv2(h, shift)

    def norm_and_conv1(self, x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Apart, as `norm_and_conv2` is, so that training can do without the norm's result: its input makes it anew."""
        return conv_without_bias(self.conv1, self.norm1(x, skip=skip))

    def norm_and_conv2(self, h: Tensor, shift: Tensor | None) -> Tensor:
        return self.conv2(self.norm2(h, channel_add=shift))

    @property
    def projection(self) -> nn.Module:
        """What turns the time embedding into this block's shift."""
        assert self.time_emb_proj is not None
        return self.time_emb_proj

    def shortcut(self, x: Tensor, skip: Tensor | None, h: Tensor) -> Tensor:
        """h + shortcut(concat(x, skip))"""
        conv = self.conv_shortcut
        if conv is None:  # never so with a skip: C + S is wider than the output
            return x + h
        if is_wrapped(conv):
            return conv(x if skip is None else torch.cat([x, skip], dim=1)) + h
        parts = [to_tokens(part) for part in (x, skip) if part is not None]
        return to_map(linear_of_parts(parts, conv.weight, conv.bias, to_tokens(h)), *h.shape[-2:])


class Downsample(nn.Module):
    """3x3 convolution of stride 2; padding 0 means one row below and one column to the right."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to `size` (default: twice as large), then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = x.shape[-2:]
        doubled = (2 * height, 2 * width)
        if size in (None, doubled) and upsamples_by_phases(self.conv, x):
            return conv_of_doubled(self.conv, x)
        return self.conv(doubled_map(x) if size in (None, doubled) else F.interpolate(x, size=size, mode="nearest"))


def doubled_map(x: Tensor) -> Tensor:
    """Nearest neighbour of [B, C, H, W] at twice the size.

    On a GPU as a copy of a view that has each pixel four times, which takes half as long as torch's kernel for
    channels_last: 61 and 126 us for 2x640x64x64, 0.74 and 1.58 ms for 1x256x512x512 (NVIDIA H200, bfloat16, torch 2.11,
    bench/measure_upsampling.py).
    """
    if not x.is_cuda or not x.is_contiguous(memory_format=torch.channels_last):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]  # [B, H, 1, W, 1, C]
    pixels = pixels.expand(batch, height, 2, width, 2, channels).reshape(batch, 2 * height, 2 * width, channels)
    return pixels.permute(0, 3, 1, 2)


_phases = Derived()
# products of the whole convolution from which its phases are faster on a CPU: below, four strided copies cost more than
# 5/9 of the products (bench/measure_upsampling.py: 240 against 238 us for 19 M, 444 against 359 for 42 M, AMD EPYC)
PHASES_FROM = 4e7


def upsamples_by_phases(conv: nn.Conv2d, x: Tensor) -> bool:
    """Not where gradients are wanted, nor in 16 bit, whose sums of weights would be rounded; nor on a GPU, where it has
    not been measured."""
    if is_wrapped(conv) or tracing(x) or wants_grad((x, conv.weight, conv.bias)):
        return False
    wide = x.dtype == torch.float32 == conv.weight.dtype and not torch.is_autocast_enabled("cpu")
    pays = 4 * 9 * x.numel() * conv.out_channels >= max(PHASES_FROM, 1)
    return wide and x.is_cpu and pays and savings.on("upsample_phases") and forced() != "reference"


def conv_of_doubled(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(nearest neighbour of x, twice as large) for a 3x3 convolution, at 4/9 of its products.

    Of three rows of the doubled map two are equal: those of an even row 2i are rows i-1, i, i of x and those of an odd
    one i, i, i+1. So each of the four phases (even or odd row, even or odd column) is a 2x2 convolution of x itself,
    whose weights are sums (the identity behind the sub-pixel convolution of Shi et al., arXiv 1609.05158).
    """
    weight = _phases.get(conv.weight, lambda: _phase_weights(conv.weight))
    batch, _, height, width = x.shape
    out = conv.weight.shape[0]
    y = conv2d(x, _phase_weights(conv.weight) if weight is None else weight, None, padding=(1, 1))
    y = y.unflatten(1, (4, out))  # [B, 4, O, H + 1, W + 1]
    doubled = torch.empty(
        batch, out, 2 * height, 2 * width, dtype=y.dtype, device=y.device, memory_format=torch.channels_last
    )
    bias = 0 if conv.bias is None else conv.bias[:, None, None]
    for phase in range(4):
        down, right = divmod(phase, 2)
        part = y[:, phase, :, down : down + height, right : right + width]
        torch.add(part, bias, out=doubled[:, :, down::2, right::2])
    return doubled


def _phase_weights(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] -> [4 * O, C, 2, 2]: even row and column, even and odd, odd and even, odd and odd."""
    a, b, c = weight.detach().unbind(2)  # [O, C, 3] each
    phases = []
    for rows in (torch.stack([a, b + c], 2), torch.stack([a + b, c], 2)):  # [O, C, 2, 3]
        d, e, f = rows.unbind(3)
        phases += [torch.stack([d, e + f], 3), torch.stack([d + e, f], 3)]
    return torch.cat(phases).contiguous(memory_format=torch.channels_last)
