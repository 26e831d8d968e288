"""Aspect-ratio buckets: every batch has one picture size of about the same area.

The algorithm is that of NovelAI/novelai-aspect-ratio-bucketing (`bucketmanager.py`, MIT license), written anew; sizes
are (height, width) here. Where it deals differently, `epoch_batches` says how and why.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Size = tuple[int, int]

MAX_ASPECT_ERROR = 4.0  # of width / height, from which on a picture fits no bucket


def make_buckets(area: int, shortest: int, longest: int, divisor: int = 64, base: Size | None = None) -> list[Size]:
    """All sizes of at most `area` pixels whose longer side is as long as the shorter allows.

    For each width from `shortest` to `longest` in steps of `divisor`, the largest height that keeps the area, and the
    same with the sides exchanged; `base` is always among them. Sorted by width, then falling height.

    Args:
        base: None is the square of the area, its side cut to a multiple of `divisor`.

    Raises:
        ValueError: no size of these limits has the area.
    """
    side = int(area**0.5)
    if not divisor <= shortest <= longest or shortest % divisor or shortest > side:
        raise ValueError(
            f"shortest: expected a multiple of {divisor} up to the square's side {side} and longest = {longest}, "
            f"got {shortest}"
        )
    sizes = {base or (side // divisor * divisor,) * 2}
    if longest < max(map(max, sizes)):
        raise ValueError(f"longest: expected the base's side {max(map(max, sizes))} or more, got {longest}")
    for one in range(shortest, longest + 1, divisor):
        other = min(longest, area // one) // divisor * divisor
        if other >= shortest:
            sizes |= {(one, other), (other, one)}
    return sorted(sizes, key=lambda size: (size[1], -size[0]))


def nearest_bucket(buckets: Sequence[Size], aspect: float) -> int:
    """Index of the bucket whose width / height is nearest to `aspect`."""
    return int(np.argmin([abs(width / height - aspect) for height, width in buckets]))


def assign_bucket(buckets: Sequence[Size], size: Size, max_error: float = MAX_ASPECT_ERROR) -> int | None:
    """Index of the bucket for a picture of this size; None where its aspect ratio is off by `max_error` or more."""
    aspect = size[1] / size[0]
    nearest = nearest_bucket(buckets, aspect)
    height, width = buckets[nearest]
    return nearest if abs(width / height - aspect) < max_error else None


def epoch_batches(members: Sequence[np.ndarray], batch: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One epoch: the bucket [T] and the item ids [T, batch] of T batches, each item at most once.

    The next batch is of a bucket drawn with probability proportional to its items left: the same as a permutation of
    all batches, as these are full. Items that fill no batch, fewer than `batch` of each bucket, wait for another
    epoch's shuffle. The original serves them cropped to the base size, which cannot be done to latents made beforehand.

    The original deals ids to the processes first, then makes batches of each one's own. Here processes share the
    generator and deal out whole batches: fewer items wait, and all processes have equally many batches.

    Args:
        members: the item ids of each bucket; a bucket may be empty.
    """
    whole = [rng.permutation(ids)[: len(ids) // batch * batch].reshape(-1, batch) for ids in members]
    buckets = np.repeat(np.arange(len(whole)), [len(batches) for batches in whole])
    order = rng.permutation(len(buckets))
    items = np.concatenate(whole) if whole else np.empty((0, batch), np.int64)
    return buckets[order], items[order]
