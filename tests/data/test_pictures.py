"""Decoding, orientation, and the part of a picture that a bucket sees."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from kolors_fast.data.pictures import PictureError, fit_picture, open_picture


def file_of(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_exif_orientation_is_applied():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees: rows are to be read as columns from the right
    upright = open_picture(file_of(Image.fromarray(pixels), exif=exif))
    assert np.array_equal(np.asarray(upright), np.rot90(pixels, -1))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    kind = "jpeg" if mode == "CMYK" else "png"
    assert open_picture(file_of(Image.new("RGB", (4, 4), "white").convert(mode), kind)).mode == "RGB"


def test_what_is_transparent_becomes_white():
    assert open_picture(file_of(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    assert open_picture(file_of(palette)).getpixel((0, 0)) == (10, 20, 30)
    assert open_picture(file_of(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def bomb(width, height):
    """A PNG of a few bytes that says it has so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no picture", "not decodable: of no known format"),
        (b"", "not decodable"),
        (file_of(Image.effect_noise((64, 64), 90).convert("RGB"))[:-2000], "not decodable: .*truncated"),
        (file_of(Image.new("I;16", (2, 2))), "expected 8 bits a channel, got the mode I;16"),
        (bomb(12000, 12000), "expected at most 134217728 pixels, got 12000 x 12000"),
        (bomb(60000, 60000), "not decodable: .*decompression bomb"),  # Pillow's own limit
    ],
)
def test_refuses(data, reason):
    with pytest.raises(PictureError, match=reason):
        open_picture(data)


@pytest.mark.parametrize("size", [(64, 128), (128, 64), (100, 100), (37, 501), (300, 20)])
def test_covers_the_bucket_whole(size):
    """A ramp from 0 to 255 tells where the crop lies, and that nothing is stretched or padded."""
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    ramp = np.stack([rows * 255 / height, columns * 255 / width, 0 * rows], -1).astype(np.uint8)
    bucket = (64, 128)
    pixels, (top, left) = fit_picture(Image.fromarray(ramp), bucket, "a key")
    assert pixels.shape == (64, 128, 3) and pixels.dtype == np.uint8
    scale = max(64 / height, 128 / width)
    assert 0 <= top <= round(height * scale) - 64 and 0 <= left <= round(width * scale) - 128
    assert top == 0 or left == 0  # it just covers
    middle = pixels[32, 64].astype(float)
    expected = [(top + 32) / (height * scale) * 255, (left + 64) / (width * scale) * 255]
    assert np.abs(middle[:2] - expected).max() < 255 / min(height, width) + 4


def test_the_crop_follows_the_key():
    image = Image.new("RGB", (500, 64))
    crops = [fit_picture(image, (64, 64), str(key))[1] for key in range(40)]
    assert crops == [fit_picture(image, (64, 64), str(key))[1] for key in range(40)]
    assert len(set(crops)) > 20 and {top for top, _ in crops} == {0}
