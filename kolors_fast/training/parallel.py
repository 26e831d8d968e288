"""The processes of one training: one by default, several under torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


@dataclass(frozen=True)
class World:
    """This process among those that train together. Batches are per process; gradients are averaged."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> World:
        """The world torchrun has set up in the environment, or a process on its own."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls(dist.get_rank(), size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def average_gradients(self, module: nn.Module) -> None:
        """Replace each gradient by its mean over the processes, in one message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = _flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        flat /= self.size
        torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(flat, gradients)))

    def gather(self, value: Tensor) -> Tensor:
        """The tensors of all processes, which may differ in their first size, concatenated in rank order."""
        if self.size == 1:
            return value
        parts: list[Tensor | None] = [None] * self.size
        dist.all_gather_object(parts, value)
        return torch.cat([part for part in parts if part is not None])

    def wait(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            dist.barrier()
