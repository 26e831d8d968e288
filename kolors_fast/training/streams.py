"""Random streams made anew at every step."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Streams:
    """Random streams of one process in one stage, made anew from the step's number.

    Nothing random is carried from step to step, so a resumed run needs no generator state.
    """

    seed: int
    stage: str
    rank: int = 0

    def key(self, step: int, rank: int | None = None) -> list[int]:
        return [self.seed, zlib.crc32(self.stage.encode()), self.rank if rank is None else rank, step]

    def numpy(self, step: int) -> np.random.Generator:
        """This process's stream."""
        return np.random.default_rng(self.key(step))

    def shared(self, step: int) -> np.random.Generator:
        """The stream on which all processes agree."""
        return np.random.default_rng(self.key(step, rank=2**31))

    def torch(self, step: int) -> torch.Generator:
        """This process's stream for tensors."""
        state = np.random.SeedSequence(self.key(step)).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state) & (2**63 - 1))
