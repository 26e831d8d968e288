"""The autoencoder by strips of rows: the undivided result, up to rounding, with two full maps in memory.

A convolution of 3x3 needs one row above and below its strip, and a GroupNorm the moments of the whole map. So maps are
written strip by strip, their moments are gathered on the way (Chan, Golub & LeVeque, 1983), and the next layer reads
strips of exactly what the undivided pass would have read. Tiles that are decoded on their own and blended have moments
of their own, and show seams.

Only the stream and the map between the two convolutions of a residual block are stored, and the block's result is
written over the latter. What lies between is computed for the rows that are asked for: `rows(start, stop)`. The last
upsampling, whose result would be the largest map of all, is never stored either, but computed each of the three times
that it is read. `autoencoder_kl_memory.py` states the bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder_kl_layers import AutoencoderResnet, MidAttention, affine, stream_scale
from .layers import GroupNorm, doubled_map, is_wrapped, to_tokens

if TYPE_CHECKING:
    from .autoencoder_kl import Decoder, Encoder, MidBlock

STRIP_ELEMENTS = 1 << 22  # of a strip's widest map: 16 rows of 256 channels at 1024 pixels, 8 MB in 16 bits
# where attention has no fused kernel, two fp32 copies of so many rows of logits are one full 16-bit map of Kolors'
QUERIES = 2048


class Moments(NamedTuple):
    """Mean and sum of squared deviations of each group, over so many `elements`."""

    elements: int
    mean: Tensor  # [B, G], fp32 or float64
    squares: Tensor  # [B, G]

    @classmethod
    def of(cls, strip: Tensor, groups: int) -> Moments:
        wide = strip.to(torch.promote_types(strip.dtype, torch.float32))
        grouped = wide.permute(0, 2, 3, 1).unflatten(-1, (groups, -1))  # [B, R, W, G, C/G]
        variance, mean = torch.var_mean(grouped, dim=(1, 2, 4), correction=0)
        elements = grouped[:1, ..., :1, :].numel()
        return cls(elements, mean, variance * elements)

    def merged(self, other: Moments) -> Moments:
        share = other.elements / (self.elements + other.elements)
        delta = other.mean - self.mean
        squares = self.squares + other.squares + delta.square() * (self.elements * share)
        return Moments(self.elements + other.elements, self.mean + delta * share, squares)


class Rows(Protocol):
    """A map [B, C, H, W] of which rows can be asked for."""

    @property
    def size(self) -> tuple[int, int, int]: ...  # B, H, W

    def rows(self, start: int, stop: int) -> Tensor: ...  # [B, C, stop - start, W]


class Stored(NamedTuple):
    """A map that is there."""

    data: Tensor  # [B, C, H, W]
    moments: Moments | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        batch, _, height, width = self.data.shape
        return batch, height, width

    def rows(self, start: int, stop: int) -> Tensor:
        return self.data[:, :, start:stop]


class Upsampled(NamedTuple):
    """Each row and column twice."""

    source: Rows

    @property
    def size(self) -> tuple[int, int, int]:
        batch, height, width = self.source.size
        return batch, 2 * height, 2 * width

    def rows(self, start: int, stop: int) -> Tensor:
        first = start // 2
        twice = doubled_map(self.source.rows(first, (stop + 1) // 2))
        return twice[:, :, start - 2 * first : stop - 2 * first]


class Normalised:
    """silu(norm(source)), or norm(source), with the moments given: fp32 inside, one rounding."""

    def __init__(self, source: Rows, norm: GroupNorm, moments: Moments, scale: float, *, silu: bool = True) -> None:
        self.source, self.size, self.norm, self.silu = source, source.size, norm, silu
        rstd = torch.rsqrt(moments.squares / moments.elements + norm.eps * scale**2)
        self.mean, self.rstd = (
            m.repeat_interleave(norm.num_channels // norm.num_groups, dim=1)[..., None, None]  # [B, C, 1, 1]
            for m in (moments.mean, rstd)
        )
        self.affine: tuple[Tensor, Tensor] | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        x = self.source.rows(start, stop)
        if self.affine is None:
            weight, bias = _weight_and_bias(self.norm, x)
            self.affine = self.rstd * weight.to(self.rstd.dtype), bias.to(self.rstd.dtype)
        u = x.to(self.mean.dtype, copy=True).sub_(self.mean).mul_(self.affine[0]).add_(self.affine[1])
        return (F.silu(u, inplace=True) if self.silu else u).to(x.dtype)


def _weight_and_bias(norm: GroupNorm, like: Tensor) -> tuple[Tensor, Tensor]:
    """[C, 1, 1] each; of a module with a hook around it, whose weights may be elsewhere, from what it does to +-1."""
    if "forward" not in norm.__dict__:
        return norm.weight[:, None, None], norm.bias[:, None, None]
    signs = like.new_tensor([1.0, -1.0]).expand(1, norm.num_channels, 1, 2)
    plus, minus = norm(signs, activation=None)[0].to(torch.promote_types(like.dtype, torch.float32)).split(1, dim=2)
    return (plus - minus) / 2 * math.sqrt(1 + norm.eps), (plus + minus) / 2


class Convolved:
    """A 3x3 convolution with zeros around the map; `affine` explains scale and normalised."""

    def __init__(self, conv: nn.Module, source: Rows, scale: float, *, normalised: bool) -> None:
        self.conv: Any = conv
        self.source, self.size, self.scale, self.normalised = source, source.size, scale, normalised

    def rows(self, start: int, stop: int) -> Tensor:
        above, below = start > 0, stop < self.size[1]
        x = self.source.rows(start - above, stop + below)
        # inside the map the rows around the strip are there; at its border, and in a wrapped layer, the layer pads
        padding = (0, 1) if above and below and not is_wrapped(self.conv) else None
        y = affine(self.conv, x, self.scale, normalised=self.normalised, padding=padding)
        return y if padding else y[:, :, above : y.shape[2] - below]


class Downsampled:
    """A 3x3 convolution of stride 2, with a row of zeros below the map and a column to its right."""

    def __init__(self, conv: nn.Module, source: Rows, scale: float) -> None:
        self.conv: Any = conv
        batch, self.below, width = source.size
        self.source, self.size, self.scale = source, (batch, self.below // 2, width // 2), scale

    def rows(self, start: int, stop: int) -> Tensor:
        end = min(2 * stop + 1, self.below)
        x = F.pad(self.source.rows(2 * start, end), (0, 1, 0, 2 * stop + 1 - end))
        return affine(self.conv, x, self.scale, normalised=False)


class Residual:
    """shortcut(source) + branch."""

    def __init__(self, shortcut: nn.Module | None, source: Rows, branch: Rows, scale: float) -> None:
        self.shortcut: Any = shortcut
        self.source, self.branch, self.size, self.scale = source, branch, source.size, scale

    def rows(self, start: int, stop: int) -> Tensor:
        x = self.source.rows(start, stop)
        if self.shortcut is not None:
            x = affine(self.shortcut, x, self.scale, normalised=False)
        return self.branch.rows(start, stop).add_(x)


def strip_height(batch: int, width: int, channels: int) -> int:
    """Rows of a strip whose widest map has so many channels."""
    return max(1, STRIP_ELEMENTS // (batch * width * channels))


def _strips(source: Rows, channels: int) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, rows) from top to bottom."""
    batch, height, width = source.size
    step = strip_height(batch, width, channels)
    for start in range(0, height, step):
        stop = min(start + step, height)
        yield start, stop, source.rows(start, stop)


def _measure(source: Rows, channels: int, groups: int) -> Moments:
    first, *rest = (Moments.of(strip, groups) for _, _, strip in _strips(source, channels))
    for moments in rest:
        first = first.merged(moments)
    return first


def _store(source: Rows, channels: int, groups: int | None = None, *, over: Tensor | None = None) -> Stored:
    """The whole map, with the moments of its groups.

    Args:
        channels: of the widest map that is computed on the way.
        over: a map to write into although the source reads it, one row above and below each strip: a strip is
            written when the next one has been computed.
    """
    data, moments = over, None
    waiting: tuple[int, int, Tensor] | None = None
    batch, height, width = source.size
    for start, stop, strip in _strips(source, channels):
        if data is None:
            data = _empty(strip, (batch, strip.shape[1], height, width))
        if groups is not None:
            found = Moments.of(strip, groups)
            moments = found if moments is None else moments.merged(found)
        if waiting is not None:
            data[:, :, waiting[0] : waiting[1]] = waiting[2]
        waiting = start, stop, strip
    assert data is not None and waiting is not None
    data[:, :, waiting[0] : waiting[1]] = waiting[2]
    return Stored(data, moments)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _normalised(x: Rows, norm: GroupNorm, scale: float, *, silu: bool = True) -> Normalised:
    moments = x.moments if isinstance(x, Stored) else None
    if moments is None:
        moments = _measure(x, norm.num_channels, norm.num_groups)
    return Normalised(x, norm, moments, scale, silu=silu)


def _resnet(block: AutoencoderResnet, x: Rows, scale: float) -> Stored:
    channels, groups = max(block.norm1.num_channels, block.norm2.num_channels), block.norm1.num_groups
    h = Convolved(block.conv1, _normalised(x, block.norm1, scale), scale, normalised=True)
    stored = _store(h, channels, groups)
    branch = Convolved(block.conv2, _normalised(stored, block.norm2, scale), scale, normalised=True)
    return _store(Residual(block.conv_shortcut, x, branch, scale), channels, groups, over=stored.data)


def _attention(layer: MidAttention, x: Stored, scale: float) -> Stored:
    """In slices of queries, written over x."""
    channels = layer.group_norm.num_channels
    normalised = _store(_normalised(x, layer.group_norm, scale, silu=False), channels).data
    tokens, stream = to_tokens(normalised), to_tokens(x.data)  # [B, N, C], views
    keys, values = layer.keys_and_values(tokens, scale)
    for start in range(0, tokens.shape[1], QUERIES):
        queries = slice(start, start + QUERIES)
        stream[:, queries] += layer.attend(tokens[:, queries], keys, values, scale)
    return Stored(x.data)


def _mid_block(block: MidBlock, x: Rows, scale: float) -> Stored:
    resnets: list[Any] = list(block.resnets)
    attentions: list[Any] = list(block.attentions)
    stored = _resnet(resnets[0], x, scale)
    for attention in attentions:
        stored = _attention(attention, stored, scale)
    return _resnet(resnets[1], stored, scale)


def _output(norm: GroupNorm, conv: nn.Module, x: Rows, scale: float) -> Tensor:
    return _store(Convolved(conv, _normalised(x, norm, scale), 1.0, normalised=True), norm.num_channels).data


def decode_in_strips(decoder: Decoder, z: Tensor) -> Tensor:
    """decoder(z), without gradients: z [B, in_channels, h, w] -> [B, out_channels, H, W]."""
    scale, blocks = stream_scale(z), list[Any](decoder.up_blocks)
    x: Rows = Convolved(decoder.conv_in, Stored(z), scale, normalised=True)
    x = _mid_block(decoder.mid_block, x, scale)
    for level, block in enumerate(blocks):
        for resnet in block.resnets:
            x = _resnet(resnet, x, scale)
        for layer in block.upsamplers:
            norm = block.resnets[-1].norm2
            x = Convolved(layer.conv, Upsampled(x), scale, normalised=False)
            if level < len(blocks) - 2:
                x = _store(x, norm.num_channels, norm.num_groups)
    return _output(decoder.conv_norm_out, decoder.conv_out, x, scale)


def encode_in_strips(encoder: Encoder, image: Tensor) -> Tensor:
    """encoder(image), without gradients: image [B, in_channels, H, W] -> [B, out_channels, h, w]."""
    scale, blocks = stream_scale(image), list[Any](encoder.down_blocks)
    x: Rows = Convolved(encoder.conv_in, Stored(image), scale, normalised=True)
    for block in blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, scale)
        for layer in block.downsamplers:
            norm = block.resnets[-1].norm2
            x = _store(Downsampled(layer.conv, x, scale), norm.num_channels, norm.num_groups)
    x = _mid_block(encoder.mid_block, x, scale)
    return _output(encoder.conv_norm_out, encoder.conv_out, x, scale)
