"""How the Triton GEGLU of a linear layer is cut into programs: sizes in, config out, no GPU and no search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

INTERPRETED = 0  # stands for an architecture: tiles so small that a small input has several of them, in several groups


@dataclass(frozen=True)
class Config:
    """How a product is cut. Nothing but the height of a tile follows the number of rows."""

    block_m: int  # rows of a tile
    block_n: int  # its columns, of value and of gate each
    block_k: int  # elements of a row that are multiplied at a time
    group_m: int  # tiles below each other that run side by side, and so share what they read through L2
    vector: int  # elements that one 16-byte access may hold; 1 where an access could be misaligned
    num_warps: int
    num_stages: int

    def programs(self, rows: int, features: int) -> int:
        return -(-rows // self.block_m) * -(-features // self.block_n)


@cache
def configure(
    rows: int, features: int, depth: int, x_stride: int, itemsize: int, aligned: bool,
    architecture: int, multiprocessors: int,
) -> Config:  # fmt: skip
    """Config for [rows, depth] @ [depth, 2 * features]; aligned: whether every tensor starts at a multiple of 16
    bytes."""
    whole = aligned and all(length * itemsize % 16 == 0 for length in (features, depth, x_stride))
    vector = 16 // itemsize if whole else 1
    if architecture == INTERPRETED:
        return Config(16, 16, 16, 2, vector, 4, 1)
    if itemsize == 4 or not whole:
        # no tensor core multiplies fp32, and what is not copied in 16 bytes passes through registers
        return Config(64, 64, 16, 8, vector, 8, 2)
    # The two sums take 128 registers of each of 256 threads, or half of a multiprocessor's tensor memory. Four stages
    # take 192 KB of shared memory where one is 64 deep, which warpgroups like best, and 72 KB elsewhere
    large = Config(128, 128, 64 if 90 <= architecture < 120 else 32, 8, vector, 8, 4)
    if large.programs(rows, features) >= 2 * multiprocessors:
        return large
    # the last of few turns leaves multiprocessors idle: for half as long if tiles are half as high
    return Config(64, 128, large.block_k, 8, vector, 4, 4)
