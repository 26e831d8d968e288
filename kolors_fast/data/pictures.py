"""Picture files to pixels of a bucket's size."""

from __future__ import annotations

import io
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .buckets import Size

MAX_PIXELS = 2**27  # of a picture before it is made smaller; more is taken for a decompression bomb


class PictureError(ValueError):
    """A picture that cannot be used, and why."""


def open_picture(data: bytes) -> Image.Image:
    """A picture file as RGB, upright as its EXIF orientation says; what is transparent becomes white.

    Raises:
        PictureError: it cannot be decoded, has more than MAX_PIXELS, or more than 8 bits a channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow on odd files; its limit on pixels is replaced by ours
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(f"expected at most {MAX_PIXELS} pixels, got {image.width} x {image.height}")
            if image.mode[0] in "IF":  # which Pillow would clip, not scale
                raise PictureError(f"expected 8 bits a channel, got the mode {image.mode}")
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except PictureError:
        raise
    except UnidentifiedImageError as error:  # whose message has a memory address
        raise PictureError("not decodable: of no known format") from error
    except Exception as error:  # whatever Pillow's many decoders stumble over
        raise PictureError(f"not decodable: {str(error).splitlines()[0] if str(error) else repr(error)}") from error


def fit_picture(image: Image.Image, bucket: Size, key: str) -> tuple[np.ndarray, tuple[int, int]]:
    """The picture made just so large that it covers the bucket, then a random crop of the bucket's size.

    Args:
        key: decides the crop, so that a sample's is always the same.

    Returns:
        uint8 [height, width, 3], and the crop's (top, left) in pixels of the resized picture.
    """
    height, width = bucket
    scale = max(height / image.height, width / image.width)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    resized = image if covering == image.size else image.resize(covering, Image.Resampling.BICUBIC)
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    top = int(rng.integers(resized.height - height + 1))
    left = int(rng.integers(resized.width - width + 1))
    return np.asarray(resized.crop((left, top, left + width, top + height))), (top, left)
