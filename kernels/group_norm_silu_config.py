"""How the Triton GroupNorm is cut into programs: sizes in, config out, no GPU and no search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

# bytes of a tile: two 16-byte loads in flight per thread. The backward pass reads two tensors, so it takes half of
# each; twice as much would fill the registers of a multiprocessor with one program
FORWARD_TILE, BACKWARD_TILE = 8192, 4096
NUM_WARPS = 8
PROGRAMS_PER_MULTIPROCESSOR = 4  # about as many as are resident at once


@dataclass(frozen=True)
class Config:
    """How a GroupNorm is cut into programs. Only `tiles` and `chunks` follow the resolution of the picture,
    and those are run-time arguments: a new resolution compiles nothing."""

    block_p: int  # pixels of a tile
    block_c: int  # channels of a tile
    tiles: int  # of a chunk, which is what one program does
    chunks: int  # K
    blocks: int  # B
    slots: int  # power of two, at least the number of groups that meet in one block
    parts: int  # at most so many blocks share one group
    vector: int  # elements that one 16-byte access may hold; 1 where an access could be misaligned
    num_warps: int

    def programs(self, samples: int) -> int:
        return samples * self.chunks * self.blocks


@cache
def configure(
    samples: int, x_channels: int, skip_channels: int, size: int, num_groups: int,
    itemsize: int, channels_last: bool, aligned: bool, multiprocessors: int, tile: int,
) -> Config:  # fmt: skip
    """Config for [samples, x_channels + skip_channels, size pixels] on a GPU of so many multiprocessors, for the pass
    whose tiles have `tile` bytes; aligned: whether every tensor starts at a multiple of 16 bytes."""
    inner = (x_channels, skip_channels) if channels_last else (size,)
    vector = 16 // itemsize if aligned and all(length * itemsize % 16 == 0 for length in inner) else 1
    # 64 channels are whole 128-byte lines in 16 bit, and divide every width of Kolors and of its autoencoder; NCHW
    # takes runs of 64 to 256 pixels, whatever the resolution
    block_c = min(64, _power_of_2(max(x_channels, skip_channels))) if channels_last else 16
    # elements that are loaded one by one need registers for an address each
    block_p = tile // (itemsize if vector > 1 else 4) // block_c

    spans = block_spans(x_channels, skip_channels, block_c)
    group_size = (x_channels + skip_channels) // num_groups
    met = [(begin // group_size, (end - 1) // group_size) for begin, end in spans]
    shares = [0] * num_groups
    for first, last in met:
        for group in range(first, last + 1):
            shares[group] += 1

    all_tiles = -(-size // block_p)
    wanted = multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    tiles = max(1, all_tiles * samples * len(spans) // wanted)
    return Config(
        block_p=block_p,
        block_c=block_c,
        tiles=tiles,
        chunks=-(-all_tiles // tiles),
        blocks=len(spans),
        slots=_power_of_2(max(last - first + 1 for first, last in met)),
        parts=max(shares),
        vector=vector,
        num_warps=NUM_WARPS,
    )


def block_spans(x_channels: int, skip_channels: int, block_c: int) -> list[tuple[int, int]]:
    """Channels [begin, end) of every block: first those of x, then those of skip."""
    seam, end = x_channels, x_channels + skip_channels
    return [(c, min(c + block_c, seam)) for c in range(0, seam, block_c)] + [
        (c, min(c + block_c, end)) for c in range(seam, end, block_c)
    ]


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()
