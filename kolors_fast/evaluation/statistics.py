"""Running statistics in float64, over batches and over the workers of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kolors_fast.models.checkpoint import write_file

T = TypeVar("T")

Share = Callable[[Iterable[Any]], Iterable[Any]]  # takes this worker's of all items


class Moments:
    """Mean [D] and covariance [D, D] of rows, seen once and in any order, merged as in Chan, Golub & LeVeque 1983:

        n = n_a + n_b,  d = mean_b - mean_a
        mean = mean_a + d n_b / n
        S    = S_a + S_b + d d^T n_a n_b / n

    where S is the sum of (x - mean)(x - mean)^T. Other than a sum of x x^T, it loses nothing to a large mean.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = torch.zeros(())  # of a width and device that the first rows decide

    def update(self, rows: Tensor) -> None:
        """Take in rows [B, D] of any floating dtype."""
        if rows.dim() != 2 or not rows.is_floating_point():
            raise ValueError(f"rows: expected floating point [B, D], got {rows.dtype} {list(rows.shape)}")
        if len(rows) > 0:
            rows = rows.detach().double()
            mean = rows.mean(0)
            self._merge(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merge(self, other: Moments) -> None:
        """Take in what others have seen."""
        if other.count > 0:
            self._merge(other.count, other.mean, other.scatter)

    def all_reduce(self) -> None:
        """Make the moments those of all workers together, on the CPU; every worker calls it, also one that saw no rows.

        The same merge for many parts: S = sum of S_k + n_k (mean_k - mean)(mean_k - mean)^T.
        """
        width = max_over_workers(len(self.mean) if self.count else 0)
        if width == 0:
            raise ValueError("rows: expected at least one on some worker, got none")
        zeros = torch.zeros(width, width, dtype=torch.float64)
        own, scatter = (self.mean.cpu(), self.scatter.cpu()) if self.count else (zeros[0], zeros)
        weighted = torch.cat([own * self.count, own.new_tensor([self.count])])
        sum_over_workers(weighted)
        count = round(float(weighted[-1]))
        mean = weighted[:-1] / count
        scatter = scatter + self.count * torch.outer(own - mean, own - mean)
        sum_over_workers(scatter)
        self.count, self.mean, self.scatter = count, mean, scatter

    @property
    def covariance(self) -> Tensor:
        """S / (n - 1): [D, D]."""
        if self.count < 2:
            raise ValueError(f"rows: expected at least 2 for a covariance, got {self.count}")
        return self.scatter / (self.count - 1)

    @property
    def standard_error(self) -> Tensor:
        """sqrt(variance / n) of each mean: [D]."""
        return (self.covariance.diagonal() / self.count).sqrt()

    def save(self, path: Path, features: str) -> None:
        """Write to a .safetensors file, with a name of what the rows are."""
        tensors = {"mean": self.mean.cpu().contiguous(), "covariance": self.covariance.cpu().contiguous()}
        write_file(path, save(tensors, {"count": str(self.count), "features": features}))

    @classmethod
    def load(cls, path: Path, features: str) -> Moments:
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, or its rows are something else than `features`.
        """
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                count, named = int(told["count"]), told["features"]
                mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: expected statistics as --save-statistics writes them, got {error}") from error
        if named != features:
            raise ValueError(f"{path}: expected statistics of {features}, got those of {named}")
        moments = cls()
        moments.count, moments.mean, moments.scatter = count, mean, covariance * (count - 1)
        return moments

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        if mean.shape != self.mean.shape:
            raise ValueError(f"rows: expected {len(self.mean)} columns, as before, got {len(mean)}")
        total = self.count + count
        apart = mean - self.mean
        self.mean = self.mean + apart * (count / total)
        self.scatter = self.scatter + scatter + torch.outer(apart, apart) * (self.count * count / total)
        self.count = total


class TimestepBins:
    """Mean loss of the samples whose timestep lies in [edges[i], edges[i + 1]), since the last reading.

    `update` reads nothing back from the device, and its sums are the same in every run: none of them is by atomics.

    Args:
        edges: rising bounds of the bins. The outer ones do not bound: what lies beyond is counted in the nearest bin.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        if len(edges) < 2 or any(low >= high for low, high in pairwise(edges)):
            raise ValueError(f"edges: expected two or more, rising, got {list(edges)}")
        self.names = [f"loss/t {low:g}-{high:g}" for low, high in pairwise(edges)]
        self._inner = torch.tensor(edges[1:-1], dtype=torch.float64)
        self._bins = torch.arange(len(self.names))
        self._sums = torch.zeros(2, len(self.names), dtype=torch.float64)  # of losses, of samples

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Take in the loss of every sample: timesteps [B] and losses [B] of any real dtype; where
        the losses are, there the sums will be."""
        if timesteps.dim() != 1 or timesteps.shape != losses.shape:
            shapes = f"{list(timesteps.shape)} and {list(losses.shape)}"
            raise ValueError(f"timesteps, losses: expected two of one shape [B], got {shapes}")
        if self._sums.device != losses.device:
            self._inner, self._bins, self._sums = (t.to(losses.device) for t in (self._inner, self._bins, self._sums))
        timesteps = timesteps.to(losses.device, torch.float64, non_blocking=True)
        bins = torch.bucketize(timesteps, self._inner, right=True)
        member = bins[:, None] == self._bins  # [B, bins]
        # by selection and not by a product, so that a NaN stays in its own bin
        self._sums[0] += torch.where(member, losses.detach().double()[:, None], 0.0).sum(0)
        self._sums[1] += member.sum(0)

    def all_reduce(self) -> None:
        """Make the sums those of all workers together; every worker calls it, right before reading."""
        sum_over_workers(self._sums)

    def read(self) -> dict[str, float]:
        """Mean losses by the names of the bins, such as "loss/t 0-100", the empty ones left out; then starts anew."""
        losses, counts = self._sums.tolist()
        self._sums.zero_()
        return {name: loss / n for name, loss, n in zip(self.names, losses, counts, strict=True) if n > 0}


def sum_over_workers(tensor: Tensor) -> None:
    """Replace a tensor by its sum over the workers of torch.distributed; without any it stays."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)


def max_over_workers(number: int) -> int:
    """The largest of the workers' numbers; without any the number."""
    told = torch.tensor(number)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def gather_over_workers(value: T) -> list[T]:
    """The values of all workers in order of rank; without any the value alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
