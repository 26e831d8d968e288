"""How the Triton attention is cut into programs: sizes in, config out, no GPU and no search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

INTERPRETED = 0  # stands for an architecture: tiles so small that a small input has several of them

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

    main: int  # columns of a head: the largest power of two in it, and at least 16, ...
    tail: int  # ... and a second tile for those left over, 0 without any
    block_r: int  # rows that one program normalises
    forward: Tile
    grad_keys: Tile
    grad_queries: Tile


def head_split(head_dim: int) -> tuple[int, int]:
    """(main, tail): a head of 72 is 64 + 16 columns, of which 8 are empty, instead of 128 with 56 empty ones.

    Compiled products add up 16 elements or more.
    """
    main = max(16, 1 << head_dim.bit_length() - 1)
    rest = head_dim - main
    return main, max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0


@cache
def configure(head_dim: int, itemsize: int, architecture: int) -> Config:
    """Config for heads of head_dim elements of itemsize bytes."""
    main, tail = head_split(head_dim)
    forward, grad_keys, grad_queries = _tiles(head_dim, itemsize, architecture)
    return Config(
        main=main,
        tail=tail,
        block_r=max(1, 4096 // main),
        forward=forward,
        grad_keys=grad_keys,
        grad_queries=grad_queries,
    )


@cache
def few_keys_tile(head_dim: int, keys: int, itemsize: int, vector: int, architecture: int) -> Tile | None:
    """The tile that holds all keys of a stream on chip, or None where they are too many to do so without a spill.

    K and V of 256 keys with heads of 64 take 64 KB of shared memory, and the logits of all keys are in registers at
    once. With 64 queries and 256 keys sm_80 spills up to 136 bytes a thread, with 32 queries none (230 registers);
    sm_90 spills 16 with 4 warps, none with 8 (255 registers); sm_100 spills none (158). Two tiles of 128 keys or four
    of 64 in a loop are no help: some variant, with or without a bias or a weight, spills on sm_80 and on sm_90. What is
    loaded one by one needs an address each and spills from 128 keys on. 257 keys would be padded to 512: theirs is the
    kernel that walks over them, as is that of more than 128 keys with longer heads.
    """
    columns = sum(head_split(head_dim))
    if itemsize == 4 or columns > 128:
        return None
    if keys <= 64:
        return Tile(64, 64, 4, 2)
    if vector == 1:
        return None
    if keys <= 128:
        return Tile(64, 128, 4, 2) if columns <= 64 else Tile(64, 128, 8, 1 if architecture < 100 else 2)
    if keys <= 256 and columns <= 64:
        return Tile(64, 256, 8, 1) if architecture >= 90 else Tile(32, 256, 4, 2)
    return None


def few_keys_chunk(heads: int, blocks: int, multiprocessors: int) -> int:
    """Blocks of queries that one few-keys program takes: as many as leave enough programs to fill the GPU."""
    return max(1, heads * blocks // (multiprocessors * PROGRAMS_PER_MULTIPROCESSOR))


def _tiles(head_dim: int, itemsize: int, architecture: int) -> tuple[Tile, ...]:
    """(forward, grad_keys, grad_queries): the largest that spill no register, and read K, V or Q, grad_out in
    16-byte accesses while the tensor cores work on the tile before."""
    if architecture == INTERPRETED:
        return (Tile(32, 32, 4, 1),) * 3
    if itemsize == 4:
        # no tensor core multiplies fp32: few products per thread, each with a row of both factors in registers
        if head_dim <= 96:
            return Tile(32, 16, 4, 1), Tile(16, 32, 8, 1), Tile(32, 32, 8, 1)
        return Tile(32, 16, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1)
    if architecture < 90:
        # a warp reads all of K and V from shared memory: few warps with many rows each
        if head_dim <= 64:
            return Tile(128, 64, 4, 3), Tile(32, 128, 8, 2), Tile(128, 32, 8, 2)
        if head_dim <= 96:
            return Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 32, 8, 2)
        return Tile(128, 32, 8, 3), Tile(32, 64, 8, 2), Tile(64, 64, 8, 2)
    # two warpgroups of 64 rows each. Beside dK and dV of 128 keys there is room for three products with 64 queries if
    # heads are short, or if the sums live in tensor memory
    if architecture < 100:
        grad_keys = Tile(64 if head_dim <= 64 else 32, 128, 8, 2)
        return Tile(128, 64, 8, 3), grad_keys, Tile(128, 64, 8, 2)
    # a third stage of K and V makes the forward pass with key_bias spill
    return Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)
