"""Aspect-ratio buckets: every batch has one picture size of about the same area.

The algorithm is that of NovelAI/novelai-aspect-ratio-bucketing (`bucketmanager.py`, MIT license), written anew; sizes
are (height, width) here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Size = tuple[int, int]


def make_buckets(area: int, shortest: int, longest: int, divisor: int = 64) -> list[Size]:
    """All sizes of at most `area` pixels whose longer side is as long as the shorter allows.

    For each width from `shortest` to `longest` in steps of `divisor`, the largest height that keeps the area, and the
    same with the sides exchanged; the square of the area is always among them. Sorted by width, then falling height.
    """
    side = int(area**0.5)
    if not divisor <= shortest <= longest or shortest % divisor or shortest > side:
        raise ValueError(
            f"shortest: expected a multiple of {divisor} up to the square's side {side} and longest = {longest}, "
            f"got {shortest}"
        )
    sizes = {(side // divisor * divisor,) * 2}
    for one in range(shortest, longest + 1, divisor):
        other = min(longest, area // one) // divisor * divisor
        if other >= shortest:
            sizes |= {(one, other), (other, one)}
    return sorted(sizes, key=lambda size: (size[1], -size[0]))


def nearest_bucket(buckets: Sequence[Size], aspect: float) -> int:
    """Index of the bucket whose width / height is nearest to `aspect`."""
    return int(np.argmin([abs(width / height - aspect) for height, width in buckets]))


def epoch_batches(
    members: Sequence[np.ndarray], batch: int, rng: np.random.Generator
) -> Iterator[tuple[int, np.ndarray]]:
    """One epoch: (bucket, item ids [batch]) per step, each item at most once.

    members: the item ids of each bucket. A bucket is drawn with probability proportional to its items left. Items
    that do not fill a batch wait for another epoch's shuffle; the original serves them cropped to the square, which
    cannot be done to latents made beforehand.
    """
    left = [rng.permutation(ids)[: len(ids) // batch * batch] for ids in members]
    for _ in range(sum(map(len, left)) // batch):
        sizes = np.array([len(ids) for ids in left], dtype=np.float64)
        drawn = int(rng.choice(len(sizes), p=sizes / sizes.sum()))
        yield drawn, left[drawn][:batch]
        left[drawn] = left[drawn][batch:]
