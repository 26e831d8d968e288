"""The picture sizes that PixArt was trained with, and pictures of other sizes made of those.

Source: PixArt-alpha/PixArt-alpha `diffusion/data/datasets/utils.py`, PixArt-alpha/PixArt-sigma.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]

# (height, width) of a picture of the area of 16 x 16 units, wide ones first
_BINS: tuple[Size, ...] = (
    (8, 32), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21), (12, 21), (12, 20),
    (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15), (17, 14), (18, 14),
    (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (27, 9), (32, 8),
)  # fmt: skip
# further ones of the 2048-pixel model
_BINS_2K: tuple[Size, ...] = ((8, 31), (8, 30), (26, 9), (28, 9), (29, 8), (30, 8), (31, 8))
# side of the model's latents -> pixels of a unit
_UNITS = {32: 16, 64: 32, 128: 64, 256: 128}


def nearest_bin(height: int, width: int, sample_size: int) -> Size:
    """(height, width) in pixels of the trained size whose height / width, rounded to 0.01, is nearest to the asked one.

    Models of other sample sizes than the released ones, 32 to 256, have no such table: the size itself.
    """
    unit = _UNITS.get(sample_size)
    if unit is None:
        return height, width
    bins = (*_BINS, *_BINS_2K) if sample_size == 256 else _BINS
    # of two equally near ones the wider, as in a table sorted by ratio
    ranked = sorted(bins, key=lambda size: round(size[0] / size[1], 2))
    rows, columns = min(ranked, key=lambda size: abs(round(size[0] / size[1], 2) - height / width))
    return rows * unit, columns * unit


def resized_and_cropped(images: Tensor, height: int, width: int) -> Tensor:
    """Images [B, 3, H, W], made as small as covers the size (bilinear), and its middle: [B, 3, height, width]."""
    rows, columns = images.shape[-2:]
    if (rows, columns) == (height, width):
        return images
    ratio = max(height / rows, width / columns)
    resized = F.interpolate(
        images, size=(int(rows * ratio), int(columns * ratio)), mode="bilinear", align_corners=False
    )
    top, left = (resized.shape[-2] - height) // 2, (resized.shape[-1] - width) // 2
    return resized[..., top : top + height, left : left + width]
