"""One worker of several that draw a prompts file, by torchrun's environment variables; they need not communicate."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Worker:
    """Draws every `count`-th picture, beginning with number `rank`."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among the workers of this machine

    @classmethod
    def from_environment(cls) -> Worker:
        """RANK, WORLD_SIZE and LOCAL_RANK; without them, the only one."""
        values = []
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            given = os.environ.get(name, str(default))
            if not given.isdecimal():
                raise ValueError(f"{name}: expected a whole number in the environment, got {given!r}")
            values.append(int(given))
        if not values[0] < values[1]:
            raise ValueError(f"RANK: expected less than WORLD_SIZE={values[1]}, got {values[0]}")
        return cls(*values)

    def share(self, items: Iterable[T]) -> Iterator[T]:
        return (item for number, item in enumerate(items) if number % self.count == self.rank)

    def device(self, asked: str | None) -> str | None:
        """`asked`, where it leaves the choice to us the GPU of this worker."""
        if self.count == 1 or asked not in (None, "cuda") or not torch.cuda.is_available():
            return asked
        gpus = torch.cuda.device_count()
        if self.local_rank >= gpus:
            raise ValueError(f"LOCAL_RANK: expected one worker a GPU, of which there are {gpus}, got {self.local_rank}")
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def finish(self, *, failed: bool) -> None:
        """To be called at the end: torchrun kills the other workers when one fails, so that one waits for them."""
        if self.count == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return
        from torch.distributed import TCPStore

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        key = f"kolors_fast/finished/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
            finished = store.add(key, 1)
            while failed and finished < self.count:
                time.sleep(0.5)
                finished = store.add(key, 0)
        except RuntimeError:
            return  # torchrun itself has ended
