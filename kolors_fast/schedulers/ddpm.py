"""Denoising diffusion probabilistic models: ancestral sampling, and the noising of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .config import records_config
from .schedule import given_values, spaced_timesteps
from .scheduler import Generator, Scheduler, StepOutput, as_given, mix_noise
from .table import StepTable, affine_row, denoised_from

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")


class DDPMScheduler(Scheduler):
    """next = sqrt(A') b/(1 - A) x0 + sqrt(a) (1 - A')/(1 - A) x + std n, with a = A/A' and b = 1 - a.

    A' is alpha-bar at the next timestep of the run, 1 after the last (Ho et al. 2020, https://arxiv.org/abs/2006.11239,
    equation 7). std² is (1 - A')/(1 - A) b ("fixed_small") or b ("fixed_large"), or the model chooses between these two
    ("learned_range", Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672) and predicts 2C channels, see StepTable.
    Constructor keys, defaults and methods are those of diffusers' class of this name; variances learned without bounds,
    thresholding and zero-terminal-SNR betas are refused.
    """

    counts_steps = False
    refused: ClassVar = {"thresholding": False, "rescale_betas_zero_snr": False}

    @records_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if variance_type not in VARIANCES:
            raise ValueError(f"variance_type: expected one of {VARIANCES}, got {variance_type!r}")
        self._prepare()
        self.learned_variance = variance_type == "learned_range"
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the run's timesteps: by number, or as given descending `timesteps`."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps: expected exactly one of num_inference_steps, timesteps, got both or none")
        if timesteps is not None:
            chosen = given_values("timesteps", timesteps, len(self) - 1)
        else:
            config = self.config
            chosen = spaced_timesteps(config.timestep_spacing, len(self), num_inference_steps or 0, config.steps_offset)
        self._keep_timesteps(chosen.round(), torch.int64, device)

    def step_table(self, *, begin: int = 0) -> StepTable:
        timesteps = self.timesteps.tolist()
        rows = [self._row(t, after) for t, after in zip(timesteps, [*timesteps[1:], -1], strict=True)]
        return StepTable(
            timesteps=self.timesteps,
            input_scale=(1.0,) * len(rows),
            coefficients=torch.tensor(rows, dtype=torch.float64),
            needs_noise=tuple(t > 0 for t in timesteps),
            initial_scale=1.0,
            clip=self.config.clip_sample_range if self.config.clip_sample else None,
        )

    def _row(self, timestep: int, after: int) -> tuple[float, ...]:
        bar = float(self._alpha_bar[timestep])
        bar_next = float(self._alpha_bar[after]) if after >= 0 else 1.0
        step_alpha = bar / bar_next
        large = 1 - step_alpha
        small = max(large * (1 - bar_next) / (1 - bar), 1e-20)
        between = (math.log(small), math.log(large)) if self.learned_variance else ()
        deviations = {"fixed_large": large**0.5, "learned_range": 1.0}  # of the latter the noise has its own
        std = deviations.get(self.config.variance_type, small**0.5) if timestep > 0 else 0.0
        x0 = denoised_from(self.config.prediction_type, bar**0.5, (1 - bar) ** 0.5)
        keep = step_alpha**0.5 * (1 - bar_next) / (1 - bar)
        swap = bar_next**0.5 * large / (1 - bar)
        if self.config.clip_sample:
            return (keep, 0.0, swap, std, *x0, *between)
        return (*affine_row(x0, sample=keep, denoised=swap, noise=std), *between)

    def step(
        self,
        model_output: Tensor,  # [B, ...], [B, 2C, ...] with a learned variance
        timestep: int | Tensor,
        sample: Tensor,  # [B, ...]
        generator: Generator = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """One step towards less noise; draws noise at every timestep above 0."""
        return as_given(self._execute(model_output, timestep, sample, generator), return_dict)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(A) * original + sqrt(1 - A) * noise, for trained `timesteps` [B]."""
        return mix_noise(original_samples, noise, *self._signals_at(timesteps.to(original_samples.device)))
