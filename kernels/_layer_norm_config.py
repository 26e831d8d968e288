"""How the Triton LayerNorms are cut into programs: sizes in, config out, no GPU and no search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

WARPS = 4
# of one row in one thread: 1536 channels are one warp's. Forward holds the row in fp32 and a few inputs in their dtype;
# backward two rows in fp32 and up to three sums
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 48, 16
REGISTER_FILE = 65536  # of a multiprocessor
# that a thread of the backward pass takes, by the number of sums it holds; tests/ops/triton_resources.json has them all
REGISTERS = {2: 128, 3: 168}


@dataclass(frozen=True)
class Config:
    """A tile is `rows` rows of `width` columns, and a row `pieces` such tiles, which stay in registers.

    The width is what whole warps take in 16-byte accesses. So a row as narrow as those of the models belongs to one
    warp, whose reductions are shuffles, and few lanes are idle: 1152 columns are 4.5 pieces of 256, while the next
    power of two would be 2048.
    """

    width: int
    pieces: int
    rows: int
    vector: int  # elements that one 16-byte access may hold; 1 where an access could be misaligned
    num_warps: int

    def blocks(self, rows: int) -> int:
        """Tiles that cover so many rows."""
        return -(-rows // self.rows)


@cache
def configure(d: int, itemsize: int, aligned: bool, elements: int) -> Config:
    """Config for rows of d elements, at most about `elements` of them per thread; aligned: whether every row of every
    tensor starts at a multiple of 16 bytes."""
    vector = 16 // itemsize
    warps = 1  # that share a row
    while -(-d // (32 * vector * warps)) * vector > elements and warps < 16:
        warps *= 2
    width = min(32 * vector * warps, 1 << (d - 1).bit_length())
    return Config(
        width=width,
        pieces=-(-d // width),
        rows=max(1, WARPS // warps),
        vector=vector if aligned and d % vector == 0 else 1,
        num_warps=max(WARPS, warps),
    )


@cache
def split(samples: int, blocks: int, num_warps: int, sums: int, multiprocessors: int) -> tuple[int, int]:
    """(chunks of a sample, blocks of a chunk) for a backward pass over so many blocks of rows per sample.

    As many programs as are resident at once: more would leave more partial sums, and a last wave that fills part of the
    GPU.
    """
    resident = multiprocessors * max(1, REGISTER_FILE // (REGISTERS[sums] * 32 * num_warps))
    per_chunk = -(-blocks // max(1, resident // samples))
    return -(-blocks // per_chunk), per_chunk
