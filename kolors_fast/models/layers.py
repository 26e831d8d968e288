"""Layers shared by the UNet and the autoencoder. Module names follow diffusers' state-dict keys.

Feature maps are [B, C, H, W] in channels_last memory, so the token view [B, H*W, C] costs nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_fast.ops.group_norm_silu import group_norm_silu


def use_channels_last(model: nn.Module) -> None:
    """Store convolution weights as NHWC, now and after each load: they meet channels_last maps only."""
    _store_channels_last(model)
    model.register_load_state_dict_post_hook(_store_channels_last)


def _store_channels_last(model: nn.Module, _keys: Any = None) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 4 and type(parameter.data) is Tensor:  # a shard keeps the layout its owner gave it
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


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


def is_wrapped(conv: nn.Module) -> bool:
    """Whether something stands around the convolution (LoRA layers, offload hooks), so that it must be called."""
    return type(conv) is not nn.Conv2d or "forward" in conv.__dict__


def conv_without_bias(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """conv(x) without its bias, and that bias for the caller to add; a wrapped conv runs whole."""
    if is_wrapped(conv):
        return conv(x), None
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding), conv.bias


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
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels) if time_dim is not None else None
        self.norm2 = GroupNorm(num_groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], time [B, time_dim] with SiLU already applied, skip [B, S, H, W]."""
        h, bias = conv_without_bias(self.conv1, self.norm1(x, skip=skip))
        if self.time_emb_proj is not None and time is not None:
            shift = self.time_emb_proj(time)  # [B, Cout]
            bias = shift if bias is None else shift + bias
        channel_add = None if bias is None else bias.expand(x.shape[0], -1).to(h.dtype)
        h = self.conv2(self.norm2(h, channel_add=channel_add))
        return self.shortcut(x, skip) + h

    def shortcut(self, x: Tensor, skip: Tensor | None) -> Tensor:
        conv = self.conv_shortcut
        if conv is None:  # never so with a skip: C + S is wider than the output
            return x
        if skip is None:
            return conv(x)
        if is_wrapped(conv):
            return conv(torch.cat([x, skip], dim=1))
        # as matrix products, which read the halves of the weight in place
        of_x, of_skip = conv.weight.flatten(1).split([x.shape[1], skip.shape[1]], dim=1)
        y = F.linear(to_tokens(x).flatten(0, 1), of_x, conv.bias)  # [B*H*W, Cout]
        y = torch.addmm(y, to_tokens(skip).flatten(0, 1), of_skip.t())
        return to_map(y.unflatten(0, (x.shape[0], -1)), *x.shape[-2:])


class Downsample(nn.Module):
    """3x3 convolution of stride 2; padding 0 means one row below and one column to the right."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to `size` (default: twice as large), then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = x.shape[-2:]
        return self.conv(F.interpolate(x, size=size or (2 * height, 2 * width), mode="nearest"))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d) + bias) v over `heads` heads, with projections before and after."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        group_norm: GroupNorm | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = group_norm  # the caller's to apply; here for its place in the state dict
        inner_dim = heads * head_dim
        self.to_q = nn.Linear(dim, inner_dim, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim or dim, inner_dim, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim or dim, inner_dim, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x [B, N, C]; context [B, K, C'] or x itself; bias [B, K], added to every query's logits."""
        context = x if context is None else context
        if bias is not None and bias.shape[-1] != context.shape[1]:
            raise ValueError(
                f"attention mask or bias: expected one value for each of {context.shape[1]} keys, "
                f"got shape {list(bias.shape)}"
            )
        q, k, v = (  # [B, heads, N or K, d]
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        mask = None if bias is None else bias[:, None, None, :].to(q.dtype)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](h.transpose(1, 2).flatten(2))
