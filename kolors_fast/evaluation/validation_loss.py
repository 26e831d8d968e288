"""A validation loss that two checkpoints can be compared by: the same noise at the same equidistant times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .statistics import Moments


class LossAt(Protocol):
    """The loss of a model, sample by sample, at times that it is told."""

    def __call__(self, items: Tensor, times: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Losses [B] of items int64 [B] at times [B].

        Times are in (0, 1), from the picture to the noise: t of a flow is the time, and a schedule of N timesteps takes
        number floor(N time). All that is random comes of the generators, one an item, as by `normal`.
        """
        ...


@dataclass(frozen=True)
class StratifiedLoss:
    """Mean losses over the items at each time, their mean over the times, and standard errors of all of them.

    The error of the total knows that an item's losses at two times go together: it is that of the items' own means.
    """

    times: tuple[float, ...]
    losses: tuple[float, ...]
    errors: tuple[float, ...]
    total: float
    total_error: float
    items: int

    def __str__(self) -> str:
        rows = zip(self.times, self.losses, self.errors, strict=True)
        lines = [f"validation loss: {self.total:.6g} ± {self.total_error:.2g} ({self.items} samples)"]
        return "\n".join([*lines, *(f"  at time {t:.4g}: {loss:.6g} ± {error:.2g}" for t, loss, error in rows)])

    def figures(self) -> dict[str, float]:
        """To be logged, by name."""
        by_time = {f"validation loss/t {t:.3g}": loss for t, loss in zip(self.times, self.losses, strict=True)}
        return {"validation loss": self.total, "validation loss error": self.total_error, **by_time}


@torch.no_grad()
def stratified_loss(
    loss_at: LossAt, batches: Iterable[Tensor], *, count: int = 8, seed: int = 0, over_workers: bool = False
) -> StratifiedLoss:
    """1/T sum over i < T of the mean over items of loss(item, (i + 1/2) / T).

    That is the integral over all times by the midpoint rule, every time weighing the same whatever density training
    draws them from. Esser et al. 2024 (https://arxiv.org/abs/2403.03206) find a loss at equidistant times, t = 1 left
    out, to go with the quality of pictures; at the midpoints t = 0 is out as well, where nothing of the noise can be
    known. The noise of an item at a time follows from `seed`, its number and the time's alone: not from the model, the
    batches or the worker.

    Args:
        loss_at: the model's.
        batches: the numbers of items, int64 [B], that are evaluated together; each item is in one of them.
        count: T.
        over_workers: the batches are this worker's share of the items, and the result is over all workers', which all
            call this.

    Raises:
        ValueError: fewer than two items, which have no standard error.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    times = [(number + 0.5) / count for number in range(count)]
    moments = Moments()
    for items in batches:
        columns = []
        for number, time in enumerate(times):
            generators = [_generator(seed, item, number) for item in items.tolist()]
            losses = loss_at(items, torch.full((len(items),), time), generators)
            if losses.shape != items.shape:
                raise ValueError(f"loss_at: expected losses {list(items.shape)}, got {list(losses.shape)}")
            columns.append(losses.double())
        moments.update(torch.stack(columns, dim=1))
    if over_workers:
        moments.all_reduce()
    errors, covariance = moments.standard_error, moments.covariance
    return StratifiedLoss(
        times=tuple(times),
        losses=tuple(moments.mean.tolist()),
        errors=tuple(errors.tolist()),
        total=float(moments.mean.mean()),
        total_error=float((covariance.mean() / moments.count).sqrt()),  # the variance of a row's mean over n
        items=moments.count,
    )


def normal(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Normal noise fp32 [B, ...] on the generators' device, each sample from its own generator."""
    if shape[0] != len(generators):
        raise ValueError(f"generators: expected one a sample, {shape[0]}, got {len(generators)}")
    return torch.stack([torch.randn(tuple(shape[1:]), generator=one, device=one.device) for one in generators])


def _generator(seed: int, item: int, number: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, item, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))
