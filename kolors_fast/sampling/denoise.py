"""The denoising loop: run a model along the rows of a step table, guidance fused into each step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..schedulers import StepTable
from ..schedulers.table import draw_noise

# (inputs [P*B, ...], row of the table) -> predictions [P*B, ...]
Model = Callable[[Tensor, int], Tensor]
# (row, sample, weights, previous, noise) -> (next, denoised), which the next call may overwrite
Step = Callable[[int, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def _never() -> bool:
    return False


@torch.no_grad()
def denoise(
    model: Model,
    table: StepTable,
    sample: Tensor,
    weights: Tensor | Callable[[int], Tensor],
    *,
    start: int = 0,
    stop: int | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    callback: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    interrupted: Callable[[], bool] = _never,
    step: Step | None = None,
) -> Tensor:
    """Execute rows `start` to `stop` of `table`.

    At each row the model sees P copies of the scaled sample, stacked on the batch axis, and answers with P predictions,
    whose sum weighted by `weights` makes the step: weights (1 - g, g) over (negative, positive) are classifier-free
    guidance of scale g (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598). Weights may differ among the items of
    the batch; (0, 1) are the unguided prediction, exactly.

    Args:
        model: called as model(inputs [P*B, ...], row); the timestep is table.timesteps[row].
        table: of a scheduler whose first executed row is `start`, see `Scheduler.step_table(begin=start)`.
        sample: [B, ...], already of standard deviation `table.initial_scale` when starting at row 0.
        weights: float32 [P], or [P, B] with one column per item, on the sample's device; or a function of the row for
            guidance that changes on the way.
        start, stop: the rows executed; `stop` None is the end of the table.
        generator: of the noise of stochastic samplers; a list has one per item of the batch.
        callback: called as callback(row, timestep, sample) after each step; what it returns is the sample from there.
        interrupted: asked before each step; True ends the run.
        step: what executes a row in the place of `model` and the table, such as a captured graph.

    Returns:
        The sample [B, ...] after the last step, in its own dtype.
    """
    previous = None
    for row in range(start, len(table) if stop is None else stop):
        if interrupted():
            break
        mix = weights(row) if callable(weights) else weights
        noise = None
        if table.needs_noise[row]:
            dtype = table.noise_dtype or sample.dtype
            noise = draw_noise(tuple(sample.shape), generator, sample.device, dtype)
        if step is not None:
            sample, denoised = step(row, sample, mix, previous, noise)
        else:
            predictions = model(torch.cat([sample * table.input_scale[row]] * len(mix)), row)
            sample, denoised = table.advance(row, sample, predictions, mix, previous=previous, noise=noise)
        if table.uses_previous:
            previous = denoised
        if callback is not None:
            sample = callback(row, table.timesteps[row], sample if step is None else sample.clone())
    return sample if step is None else sample.clone()
