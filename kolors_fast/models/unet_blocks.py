"""Blocks of the Kolors UNet: residual blocks with transformers between, down, across and up.

Module names follow diffusers' state-dict keys. Feature maps are [B, C, H, W] in channels_last memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .. import savings
from ..ops.geglu import geglu
from ..ops.geglu_linear import geglu_linear
from .attention import Attention
from .conditioning import Conditioning
from .layers import Downsample, GroupNorm, Linear, ResnetBlock, Upsample, add_and_norm, is_wrapped, to_map, to_tokens

TRANSFORMER_NORM_EPS = 1e-6


class BlockShape(NamedTuple):
    """What the blocks of one level have in common."""

    time_dim: int
    text_dim: int
    heads: int
    depth: int  # transformer blocks per transformer; 0: no transformer
    num_groups: int
    eps: float

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock:
        return ResnetBlock(in_channels, out_channels, time_dim=self.time_dim, num_groups=self.num_groups, eps=self.eps)

    def transformers(self, channels: int, count: int) -> list[Transformer]:
        return [Transformer(channels, self) for _ in range(count if self.depth else 0)]


class GEGLU(nn.Module):
    """value * gelu(gate), with value and gate the halves of one projection and gelu the exact (erf) one."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        if not savings.on("geglu"):
            value, gate = self.proj(x).chunk(2, dim=-1)
            return value * F.gelu(gate)
        if is_wrapped(self.proj) or x.dtype != self.proj.weight.dtype:
            return geglu(self.proj(x))
        return geglu_linear(x, self.proj.weight, self.proj.bias)


class FeedForward(nn.Module):
    """[B, N, C] -> GEGLU [B, N, 4C] -> [B, N, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Dropout(0.0), Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text and a feed-forward layer, each x + f(LayerNorm(x))."""

    def __init__(self, dim: int, heads: int, text_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads=heads, head_dim=dim // heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads=heads, head_dim=dim // heads, context_dim=text_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, y: Tensor | None, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """x [B, H*W, C] and what the block before left to add to it; returns the same of this block."""
        x, h = add_and_norm(x, y, self.norm1)
        x, h = add_and_norm(x, self.attn1(h, bias=cond.self_bias), self.norm2)
        y = self.attn2(h, cond.prompt.of(self.attn2), bias=cond.prompt.bias)
        x, h = add_and_norm(x, y, self.norm3)
        return x, self.ff(h)


class Transformer(nn.Module):
    """x + proj_out(blocks(proj_in(norm(x)))) on the pixels as tokens."""

    def __init__(self, channels: int, shape: BlockShape) -> None:
        super().__init__()
        self.norm = GroupNorm(shape.num_groups, channels, TRANSFORMER_NORM_EPS)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, shape.heads, shape.text_dim) for _ in range(shape.depth)
        )
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        tokens = self.proj_in(to_tokens(self.norm(x, activation=None)))  # [B, H*W, C]
        left = None
        for block in self.transformer_blocks:
            tokens, left = block(tokens, left, cond)
        tokens = tokens if left is None else tokens + left
        return x + to_map(self.proj_out(tokens), *x.shape[-2:])


class DownBlock(nn.Module):
    """Residual blocks, each with a transformer behind it (or none), then a halving of the sides (or none)."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, shape: BlockShape, *, downsample: bool
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(shape.transformers(out_channels, num_layers))
        widths = pairwise([in_channels, *[out_channels] * num_layers])
        self.resnets = nn.ModuleList(shape.resnet(a, b) for a, b in widths)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def forward(self, x: Tensor, cond: Conditioning, residual: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Returns the output and every map the up path will read, in the order made.

        `residual` (of a T2I-Adapter) joins after the last transformer, or after a block without any.
        """
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, cond.modulations[resnet])
            if self.attentions:
                x = self.attentions[i](x, cond)
                if residual is not None and i == len(self.resnets) - 1:
                    x = x + residual
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        if residual is not None and not self.attentions:
            x = skips[-1] = x + residual
        return x, skips


class MidBlock(nn.Module):
    """Residual block, transformer, residual block."""

    def __init__(self, channels: int, shape: BlockShape) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(shape.transformers(channels, 1))
        self.resnets = nn.ModuleList(shape.resnet(channels, channels) for _ in range(2))

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        first, second = self.resnets
        x = first(x, cond.modulations[first])
        for attention in self.attentions:
            x = attention(x, cond)
        return second(x, cond.modulations[second])


class UpBlock(nn.Module):
    """Residual blocks that each read one skip, each with a transformer behind it (or none), then an upsampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        skip_channels: Sequence[int],  # of each residual block, in order of use
        shape: BlockShape,
        *,
        upsample: bool,
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(shape.transformers(out_channels, len(skip_channels)))
        widths = [in_channels, *[out_channels] * (len(skip_channels) - 1)]
        self.resnets = nn.ModuleList(
            shape.resnet(width + skip, out_channels) for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], cond: Conditioning) -> Tensor:
        """Takes its maps off the end of `skips`, and upsamples to the size of the map that is last then."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, cond.modulations[resnet], skips.pop())
            if self.attentions:
                x = self.attentions[i](x, cond)
        for upsampler in self.upsamplers:
            x = upsampler(x, skips[-1].shape[-2:])
        return x
