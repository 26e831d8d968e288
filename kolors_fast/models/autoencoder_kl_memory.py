"""The memory that decoding takes, as a function of sizes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch

from .autoencoder_kl_tiles import QUERIES, strip_height


def decode_peak_bytes(
    config: Mapping[str, Any], height: int, width: int, dtype: torch.dtype, *, tiled: bool = False, batch_size: int = 1
) -> int:
    """The most bytes that `AutoencoderKL.decode` holds besides parameters and input, its result included.

    Where the widths halve, as in Kolors, the last level decides. With C channels at full size (128) a tiled decode
    holds about 2 C maps of H W: a block's input and what its first convolution gave. An undivided one holds 6 C: the
    level's input, 2 C wide, to its end, and x, h, norm(h) and conv(norm(h)) of a block.

    Args:
        config: of the AutoencoderKL.
        height, width: of the picture, in pixels.
        tiled: by strips (`enable_tiling`). With `enable_slicing`, take batch_size 1 and add the batch's pictures twice.

    Holds where autograd is off. It leaves out what libraries ask for themselves: workspaces of convolutions, and the
    logits of attention on a device without a fused kernel for them.
    """
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    height, width = height // factor, width // factor
    latents = 2 * batch_size * config["latent_channels"] * height * width  # after post_quant_conv, and channels_last
    fixed = (latents + _largest_weight(config)) * dtype.itemsize  # scaled for float16, or as oneDNN wants it
    walk = _tiled if tiled else _undivided
    return fixed + max(walk(config, batch_size, height, width, dtype.itemsize))


def _widths(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Channels that enter and leave each level of the decoder, from the smallest map on."""
    widths = list(reversed(config["block_out_channels"]))
    return list(pairwise([widths[0], *widths]))


def _largest_weight(config: Mapping[str, Any]) -> int:
    """Elements of the decoder's largest convolution."""
    return max(9 * max(before, after) * after for before, after in _widths(config))


def _undivided(config: Mapping[str, Any], batch: int, height: int, width: int, itemsize: int) -> Iterator[int]:
    """Bytes at the heaviest moments of each level; a block's caller holds its input."""
    levels = _widths(config)
    for level, (before, after) in enumerate(levels):
        pixel = batch * (height << level) * (width << level) * itemsize
        if level == 0:
            yield 8 * before * pixel  # attention: x, its norm, q, k, v, what it gives before and after to_out
        yield (2 * before + after) * pixel  # x, norm1(x), conv1
        yield (before + 4 * after) * pixel  # x, conv1, norm2, conv2 of a later block
        if level < len(levels) - 1:
            yield (before + (1 + 4 + 4) * after) * pixel  # x, twice as large, convolved
    yield (before + 2 * after + config["out_channels"]) * pixel


def _tiled(config: Mapping[str, Any], batch: int, height: int, width: int, itemsize: int) -> Iterator[int]:
    levels = _widths(config)
    last = len(levels) - 1
    for level, (before, after) in enumerate(levels):
        rows, columns = height << level, width << level
        pixel = batch * rows * columns * itemsize
        if level == 0:
            slices = 3 * batch * min(QUERIES, rows * columns) * before * itemsize  # q, before and after to_out
            yield 4 * before * pixel + slices  # x, its norm, k, v
        strip = _strip(batch, rows, columns, max(before, after), itemsize)
        entering = before * pixel // 4 if 0 < level == last else before * pixel  # the last upsampling is not stored
        yield entering + after * pixel + strip
        yield 2 * after * pixel + strip
        if level < last - 1:
            yield (1 + 4) * after * pixel + _strip(batch, 2 * rows, 2 * columns, after, itemsize)
    yield (after + config["out_channels"]) * pixel + strip


def _strip(batch: int, height: int, width: int, channels: int, itemsize: int) -> int:
    """A strip and the rows around it: the one that waits, the one read, its norm in fp32 and rounded, convolved."""
    rows = min(height, strip_height(batch, width, channels) + 4)
    return batch * rows * width * channels * (3 * itemsize + max(4, itemsize))
