"""Random streams made anew at every step."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """Random streams of one stage, made anew from the step's number, and the part of a batch that is this process's.

    Nothing random is carried from step to step, so a resumed run needs no generator state. All processes draw the same
    numbers, for the whole batch, and each keeps its rows: what is trained on does not depend on how many there are.
    """

    seed: int
    stage: str
    rank: int = 0
    size: int = 1  # processes, or parts of what each of them has: see `Stage.accumulate`

    def numpy(self, step: int) -> np.random.Generator:
        return np.random.default_rng(self.key(step))

    def torch(self, step: int) -> torch.Generator:
        """The stream for tensors, on the CPU."""
        return _generator(np.random.SeedSequence(self.key(step)).generate_state(1, np.uint64)[0])

    def key(self, step: int) -> list[int]:
        return [self.seed, zlib.crc32(self.stage.encode()), 0, step]

    def noise(self, step: int, count: int, shape: Sequence[int], number: int = 0) -> Tensor:
        """Standard normal numbers [rows, *shape] for this process's rows of `count`, each row from a stream of its own:
        nobody draws what others train on. `number` tells one draw of a step from another."""
        rows = range(count)[self.share(count)]
        words = (np.random.SeedSequence([*self.key(step), row, number]).generate_state(1, np.uint64)[0] for row in rows)
        return torch.stack([torch.randn(*shape, generator=_generator(word)) for word in words])

    def choice(self, step: int) -> np.random.Generator:
        """One more stream, for what a batch has in common."""
        return np.random.default_rng([*self.key(step)[:2], 2**31, step])

    def share(self, count: int) -> slice:
        """This process's rows of a batch.

        Raises:
            ValueError: the processes cannot get equal shares.
        """
        if count % self.size:
            raise ValueError(f"batch: expected a multiple of {self.size}, processes times accumulate, got {count}")
        rows = count // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows)


def _generator(state: np.uint64) -> torch.Generator:
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))
