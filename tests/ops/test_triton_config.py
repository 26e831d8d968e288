"""The configs of the Triton GroupNorm: the grid fills a GPU, covers the tensor, and compiles once for all sizes."""

from __future__ import annotations

import dataclasses

import pytest
from kolors_fast.kernels.group_norm_silu_config import BACKWARD_TILE, FORWARD_TILE, Config, configure

GROUPS = 32
MULTIPROCESSORS = (108, 132, 148)  # A100, H100, B200
# (x channels, skip channels, side) of every GroupNorm in the Kolors UNet at 1024x1024
UNET = [
    (320, 0, 128), (320, 320, 128), (640, 320, 128), (320, 0, 64), (640, 0, 64), (640, 320, 64), (640, 640, 64),
    (1280, 640, 64), (640, 0, 32), (1280, 0, 32), (1280, 640, 32), (1280, 1280, 32),
]  # fmt: skip
AUTOENCODER = [
    (512, 0, 128), (512, 0, 256), (512, 0, 512), (256, 0, 256), (256, 0, 512), (256, 0, 1024), (128, 0, 512),
    (128, 0, 1024),
]  # fmt: skip
ODD = [(30, 0, 5), (20, 12, 7), (315, 37, 63), (1280, 640, 33), (640, 320, 100), (64, 0, 1), (96, 0, 3)]


def configs(samples: int, x: int, skip: int, side: int, channels_last: bool) -> list[Config]:
    groups = GROUPS if (x + skip) % GROUPS == 0 else 2
    return [
        configure(samples, x, skip, side * side, groups, size, channels_last, True, m, tile)
        for size in (2, 4)
        for m in MULTIPROCESSORS
        for tile in (FORWARD_TILE, BACKWARD_TILE)
    ]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("samples", "shape"), [(2, s) for s in UNET] + [(1, s) for s in AUTOENCODER])
def test_grid_fills_the_gpu(samples: int, shape: tuple[int, int, int], channels_last: bool) -> None:
    for multiprocessors in MULTIPROCESSORS:
        for tile in (FORWARD_TILE, BACKWARD_TILE):
            x, skip, side = shape
            config = configure(samples, x, skip, side * side, GROUPS, 2, channels_last, True, multiprocessors, tile)
            assert config.programs(samples) >= 2 * multiprocessors


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", UNET + AUTOENCODER + ODD)
def test_chunks_cover_every_pixel_once_and_none_is_empty(shape: tuple[int, int, int], channels_last: bool) -> None:
    for config in configs(2, *shape, channels_last):
        chunk = config.tiles * config.block_p
        assert (config.chunks - 1) * chunk < shape[2] ** 2 <= config.chunks * chunk


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", UNET + AUTOENCODER + ODD)
def test_blocks_stay_on_one_side_of_the_seam(shape: tuple[int, int, int], channels_last: bool) -> None:
    """Slots and parts against a plain count over channels."""
    x, skip, _ = shape
    group_size = (x + skip) // (GROUPS if (x + skip) % GROUPS == 0 else 2)
    for config in configs(2, *shape, channels_last):
        # a block is named by its side of the seam and its place there
        block_of = [(c >= x, (c - x if c >= x else c) // config.block_c) for c in range(x + skip)]
        met = {(block, c // group_size) for c, block in enumerate(block_of)}
        assert config.blocks == len(set(block_of))
        assert config.slots >= max(sum(b == block for b, _ in met) for block in set(block_of))
        assert config.parts == max(sum(g == group for _, g in met) for group in range((x + skip) // group_size))
        assert config.slots & (config.slots - 1) == 0


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", UNET)
def test_resolution_changes_no_compiled_constant(shape: tuple[int, int, int], channels_last: bool) -> None:
    """Only the split in chunks may follow the resolution (and, in NCHW, whether rows of pixels start aligned)."""
    x, skip, side = shape
    constants = set()
    for height, width in ((side, side), (side, side + 8), (side // 2, side), (3 * side, 2 * side)):
        config = configure(2, x, skip, height * width, GROUPS, 2, channels_last, True, 132, FORWARD_TILE)
        constants.add(dataclasses.replace(config, tiles=0, chunks=0))
    assert len(constants) == 1


@pytest.mark.parametrize("shape", UNET + AUTOENCODER)
def test_no_lane_is_lost_to_odd_group_sizes(shape: tuple[int, int, int]) -> None:
    x, skip, _ = shape
    for config in configs(2, *shape, True):
        assert config.blocks * config.block_c == x + skip


def test_vectors_need_aligned_rows() -> None:
    def vector(x: int, skip: int, size: int, channels_last: bool, itemsize: int, aligned: bool = True) -> int:
        return configure(1, x, skip, size, 1, itemsize, channels_last, aligned, 132, FORWARD_TILE).vector

    assert vector(320, 320, 63, True, 2) == 8 and vector(320, 320, 63, True, 4) == 4
    assert vector(320, 324, 64, True, 2) == 1 and vector(320, 324, 64, True, 4) == 4
    assert vector(320, 320, 64, True, 2, aligned=False) == 1
    assert vector(323, 0, 64, False, 2) == 8 and vector(320, 0, 63, False, 2) == 1


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        configure(2, 320, 0, 64, GROUPS, 2, True, True, 132, FORWARD_TILE).chunks = 1  # type: ignore[misc]
