"""Layers of PixArt's transformer. Module names follow diffusers' state-dict keys.

B is the batch, N the tokens of a picture (row by row), D the width of the transformer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .conditioning import Conditioning
from .dit_layers import (
    TIME_DIM,
    FeedForward,
    PatchProjection,
    Size,
    add_and_modulate,
    modulated,
    position_table,
    sinusoid,
)
from .layers import Linear, TimestepEmbedding

Left = tuple[Tensor, Tensor]  # y [B, N, D] and gate [B, D]: gate * y is yet to be added to the residual stream


class PatchEmbedding(PatchProjection):
    """Patches, and where they lie: [B, C, H, W] -> [B, N, D].

    Any grid spans what one of `base_size` patches a side spans, divided by `scale`; tables are made at first use.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int, *, base_size: int, scale: float) -> None:
        super().__init__(patch_size, in_channels, dim)
        self.dim, self.base_size, self.scale = dim, base_size, scale
        # never dropped: a captured graph reads them where they lie
        self._tables: dict[tuple[Size, torch.device], Tensor] = {}  # fp32 [N, D]

    def forward(self, sample: Tensor) -> Tensor:
        tokens = self.tokens(sample)
        return (tokens + self._table(self.grid(sample), tokens.device)).to(tokens.dtype)  # one rounding, in 16 bit too

    def _table(self, grid: Size, device: torch.device) -> Tensor:
        if (grid, device) not in self._tables:
            table = position_table(self.dim, grid, base_size=self.base_size, scale=self.scale)
            self._tables[grid, device] = table.to(device)
        return self._tables[grid, device]


class SizeAndTimeEmbedding(nn.Module):
    """The timestep's embedding, and of micro-conditioned models that of a picture's sizes, to be added to it."""

    def __init__(self, dim: int, *, has_sizes: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_DIM, dim)
        if has_sizes:
            self.resolution_embedder = TimestepEmbedding(TIME_DIM, dim // 3)
            self.aspect_ratio_embedder = TimestepEmbedding(TIME_DIM, dim // 3)

    def time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """[T] -> [T, D]"""
        return self.timestep_embedder(sinusoid(timesteps, dtype))

    def sizes(self, resolution: Tensor, aspect_ratio: Tensor, dtype: torch.dtype) -> Tensor:
        """[height | width | height / width], a third each: [B, 2] and [B] or [B, 1] -> [B, D]."""
        sides = self.resolution_embedder(sinusoid(resolution.flatten(), dtype)).view(len(resolution), -1)
        return torch.cat([sides, self.aspect_ratio_embedder(sinusoid(aspect_ratio.flatten(), dtype))], dim=1)


class AdaLayerNormSingle(nn.Module):
    """What all blocks share of their modulations: linear(silu(time + sizes)), [..., D] -> [..., 6D]."""

    def __init__(self, dim: int, *, has_sizes: bool) -> None:
        super().__init__()
        self.emb = SizeAndTimeEmbedding(dim, has_sizes=has_sizes)
        self.linear = Linear(dim, 6 * dim)

    def forward(self, embedded: Tensor) -> Tensor:
        return self.linear(F.silu(embedded))


class CaptionProjection(nn.Module):
    """Two linear layers with a GELU between: [B, S, C] -> [B, S, D]."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_dim, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, captions: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(captions), approximate="tanh"))


class TransformerBlock(nn.Module):
    """Self-attention and a feed-forward layer, each gated behind a modulated LayerNorm, and cross-attention between.

        x = x + gate1 * SA(LN(x) (1 + scale1) + shift1)
        x = x + CA(x, text)                                  the query is x itself
        x = x + gate2 * FF(LN(x) (1 + scale2) + shift2)

    The modulations are those of `AdaLayerNormSingle` plus the block's own table, in the order shift1, scale1, gate1,
    shift2, scale2, gate2.
    """

    def __init__(self, dim: int, heads: int, text_dim: int) -> None:
        super().__init__()
        head_dim = dim // heads
        self.attn1 = Attention(dim, heads=heads, head_dim=head_dim, qkv_bias=True)
        self.attn2 = Attention(dim, heads=heads, head_dim=head_dim, context_dim=text_dim, qkv_bias=True)
        self.ff = FeedForward(dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, x: Tensor, left: Left | None, cond: Conditioning) -> tuple[Tensor, Left]:
        """x [B, N, D] and what the block before left to add to it; returns the same of this block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = cond.modulations[self].chunk(6, dim=-1)
        x, h = (x, modulated(x, scale1, shift1)) if left is None else add_and_modulate(x, *left, scale1, shift1)
        # the query of the cross-attention needs this sum by itself; it is fp32 where autocast left the gates so
        x = torch.addcmul(x, gate1[:, None], self.attn1(h, bias=cond.self_bias))
        y = self.attn2(x, cond.prompt.of(self.attn2), bias=cond.prompt.bias)
        x, h = add_and_modulate(x, y.to(x.dtype), None, scale2, shift2)
        return x, (self.ff(h).to(x.dtype), gate2)

    def whole(self, x: Tensor, cond: Conditioning) -> Tensor:
        """The block by itself, with nothing left to add: what checkpointing keeps is one tensor."""
        x, (y, gate) = self(x, None, cond)
        return torch.addcmul(x, gate[:, None], y)
