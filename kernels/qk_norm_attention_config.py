"""How the Triton attention is cut into programs: sizes in, config out, no GPU and no search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

INTERPRETED = 0  # stands for an architecture: tiles so small that a small input has several of them

# K and V that stay on chip: 128 keys with heads of 64 or 72, 64 with heads of 128. The unrolled loop over their tiles
# takes registers too: from 192 keys on it spills
FEW_KEYS_BYTES = 40 << 10
PROGRAMS_PER_MULTIPROCESSOR = 4


@dataclass(frozen=True)
class Tile:
    """What a program holds of both sides, and how it is run."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    """How an attention is cut into programs. Nothing here follows the resolution of the picture."""

    main: int  # columns of a head: the largest power of two in it, ...
    tail: int  # ... and a second tile for those left over, 0 without any
    block_r: int  # rows that one program normalises
    forward: Tile
    grad_keys: Tile
    grad_queries: Tile
    few_keys: Tile | None  # where all keys stay on chip, in `tiles` tiles
    tiles: int


def head_split(head_dim: int) -> tuple[int, int]:
    """(main, tail): a head of 72 is 64 + 16 columns, of which 8 are empty, instead of 128 with 56 empty ones."""
    main = 1 << head_dim.bit_length() - 1
    rest = head_dim - main
    return main, max(16, 1 << (rest - 1).bit_length()) if rest else 0


@cache
def configure(head_dim: int, keys: int, itemsize: int, architecture: int) -> Config:
    """Config for heads of head_dim elements of itemsize bytes, with so many keys in all streams."""
    main, tail = head_split(head_dim)
    forward, grad_keys, grad_queries, few_keys = _tiles(head_dim, itemsize, architecture)
    tiles = -(-keys // few_keys.keys)
    few = itemsize < 4 and 2 * tiles * few_keys.keys * (main + tail) * itemsize <= FEW_KEYS_BYTES
    return Config(
        main=main,
        tail=tail,
        block_r=max(1, 4096 // main),
        forward=forward,
        grad_keys=grad_keys,
        grad_queries=grad_queries,
        few_keys=few_keys if few else None,
        tiles=tiles if few else 0,
    )


def few_keys_chunk(heads: int, blocks: int, multiprocessors: int) -> int:
    """Blocks of queries that one few-keys program takes: as many as leave enough programs to fill the GPU."""
    return max(1, heads * blocks // (multiprocessors * PROGRAMS_PER_MULTIPROCESSOR))


def _tiles(head_dim: int, itemsize: int, architecture: int) -> tuple[Tile, ...]:
    """(forward, grad_keys, grad_queries, few_keys): the largest that spill no register, and read K, V or Q, grad_out in
    16-byte accesses while the tensor cores work on the tile before."""
    if architecture == INTERPRETED:
        return (Tile(32, 32, 4, 1),) * 4
    if itemsize == 4:
        # no tensor core multiplies fp32: few products per thread, each with a row of both factors in registers
        if head_dim <= 96:
            return Tile(32, 16, 4, 1), Tile(16, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 4, 1)
        return Tile(32, 16, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)
    few_keys = Tile(64, 64, 4, 2)
    if architecture < 90:
        # a warp reads all of K and V from shared memory: few warps with many rows each
        if head_dim <= 64:
            return Tile(128, 64, 4, 3), Tile(32, 128, 8, 2), Tile(128, 32, 8, 2), few_keys
        if head_dim <= 96:
            return Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 32, 8, 2), few_keys
        return Tile(128, 32, 8, 3), Tile(32, 64, 8, 2), Tile(64, 64, 8, 2), few_keys
    # two warpgroups of 64 rows each. Beside dK and dV of 128 keys there is room for three products with 64 queries if
    # heads are short, or if the sums live in tensor memory
    if architecture < 100:
        grad_keys = Tile(64 if head_dim <= 64 else 32, 128, 8, 2)
        return Tile(128, 64, 8, 3), grad_keys, Tile(128, 64, 8, 2), few_keys
    # a third stage of K and V makes the forward pass with key_bias spill
    return Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), few_keys
