"""Layers of the autoencoder on a stream that is held scaled, so that float16 does not overflow.

The residual stream X of SDXL's autoencoder, and what its convolutions give before they are normalised, leave float16's
range (65504). Held as x = s X with a power of two s = 2^-k, all maps up to 65504 * 2^k fit, and no layer sees a
difference beyond rounding:

    GroupNorm(X; eps) = GroupNorm(s X; s^2 eps)     normalisation is scale invariant, but for eps
    s (W n + b)       = (s W) n + s b               a layer that reads a normalised map n starts the stream anew
    s (W X + b)       = W (s X) + s b               a layer that reads the stream keeps it scaled
    s softmax(q k^T) v = softmax(q k^T) (s v)       attention is linear in its values

The parameters keep their values. What is scaled is made at each call and dropped after it, so nothing can go stale when
weights change: 100 MB read and written for the whole of Kolors' decoder, against 11 GB by its GroupNorms alone at
1024x1024, and 5 MB at a time. Queries and keys, which read a normalised map, are left as they are; so is conv_out.

Why k = 6 (maps up to 4.19e6): multiplying by s is exact except where s w falls among float16's subnormals, |w| <
2^(k-14) = 0.0039; there w is rounded by at most 2^(k-25) = 1.9e-6, which is what float16 rounds a weight of
0.0039..0.0078 by anyhow, below the standard deviation 0.0085 of the widest layers' initial weights (3x3 of 512
channels). Each further doubling of the range doubles that. Likewise x keeps its 11 bits down to |X| = 2^(k-14), and
below that an error of 2^(k-25), against the deviation of its whole group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._products import conv2d, linear
from ..ops.group_norm_silu import group_norm_silu
from .attention import Attention
from .layers import Downsample, GroupNorm, ResnetBlock, Upsample, doubled_map, is_wrapped, to_map, to_tokens

NORM_EPS = 1e-6
FLOAT16_SCALE = 2.0**-6


def stream_scale(x: Tensor) -> float:
    """s for a forward pass over x: below 1 where its maps will be float16."""
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if casts else x.dtype
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


def affine(
    layer: nn.Conv2d | nn.Linear, x: Tensor, scale: float, *, normalised: bool, padding: tuple[int, int] | None = None
) -> Tensor:
    """scale * layer(X), for x = X, a normalised map, or x = scale * X, the stream.

    Args:
        layer: may have something around it (LoRA layers, hooks).
        padding: in the place of the convolution's own; only for one with nothing around it.
    """
    if scale == 1 and padding is None:
        y: Tensor = layer(x)
        return y
    if is_wrapped(layer):
        return _wrapped_affine(layer, x if normalised else x / scale, x * scale if normalised else x, scale)
    weight = layer.weight * scale if normalised and scale != 1 else layer.weight
    bias = None if layer.bias is None else layer.bias * scale
    if isinstance(layer, nn.Linear):
        return linear(x, weight, bias)
    pads: Any = layer.padding if padding is None else padding
    return conv2d(x, weight, bias, stride=layer.stride, padding=pads)


def _wrapped_affine(layer: nn.Module, x: Tensor, scaled: Tensor, scale: float) -> Tensor:
    """scale * layer(x), and where that overflows, layer(scale * x) less what the bias is then too large by.

    The latter alone would do, if it did not lose the bits by which the bias is larger than what it is added to.
    """
    y = layer(x)
    bias = layer(torch.zeros_like(x[:1, :, :3, :3] if x.dim() == 4 else x[:1, :1]))
    bias = bias[..., :1, :1] if x.dim() == 4 else bias
    return torch.where(y.isfinite(), y * scale, layer(scaled) - (1 - scale) * bias)


class StreamNorm(GroupNorm):
    """GroupNorm of a stream that is held scaled."""

    def __init__(self, num_groups: int, channels: int) -> None:
        super().__init__(num_groups, channels, NORM_EPS)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]: scale * X
        *,
        skip: Tensor | None = None,
        channel_add: Tensor | None = None,
        activation: str | None = "silu",
        scale: float = 1.0,
    ) -> Tensor:
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps * scale**2,
            skip=skip,
            channel_add=channel_add,
            activation=activation,
        )


class AutoencoderResnet(ResnetBlock):
    """The residual block without time embedding, on a scaled stream."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__(in_channels, out_channels, time_dim=None, num_groups=num_groups, eps=NORM_EPS)
        self.norm1 = StreamNorm(num_groups, in_channels)
        self.norm2 = StreamNorm(num_groups, out_channels)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        if scale == 1:
            return super().forward(x)
        h = affine(self.conv1, self.norm1(x, scale=scale), scale, normalised=True)
        h = affine(self.conv2, self.norm2(h, scale=scale), scale, normalised=True)
        if self.conv_shortcut is not None:
            x = affine(self.conv_shortcut, x, scale, normalised=False)
        return x + h


class MidAttention(Attention):
    """x + attention(norm(x)) over all positions, with one head as wide as the map."""

    group_norm: StreamNorm

    def __init__(self, channels: int, num_groups: int) -> None:
        norm = StreamNorm(num_groups, channels)
        super().__init__(channels, heads=1, head_dim=channels, qkv_bias=True, group_norm=norm)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        n = to_tokens(self.group_norm(x, activation=None, scale=scale))  # [B, N, C]
        h = super().forward(n) if scale == 1 else self.attend(n, *self.keys_and_values(n, scale), scale)
        return x + to_map(h, *x.shape[-2:])

    def keys_and_values(self, tokens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """[B, N, C] each, of normalised tokens; the values scaled."""
        return self.to_k(tokens), affine(self.to_v, tokens, scale, normalised=True)

    def attend(self, tokens: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """What the residual stream receives at `tokens` [B, Q, C], scaled."""
        q, k, v = (t.unsqueeze(1) for t in (self.to_q(tokens), keys, values))  # [B, 1, Q or N, C]
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return affine(self._out, h, scale, normalised=False)


class AutoencoderDownsample(Downsample):
    """The 3x3 convolution of stride 2, one row padded below and one column to the right, on a scaled stream."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, padding=0)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return affine(self.conv, F.pad(x, (0, 1, 0, 1)), scale, normalised=False)


class AutoencoderUpsample(Upsample):
    """Nearest neighbour to twice the size, then a 3x3 convolution, on a scaled stream."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        if scale == 1:
            return super().forward(x)
        return affine(self.conv, doubled_map(x), scale, normalised=False)
