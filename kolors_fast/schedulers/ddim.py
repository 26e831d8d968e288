"""Denoising diffusion implicit models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .config import records_config
from .schedule import spaced_timesteps
from .scheduler import Generator, Scheduler, StepOutput, as_given, mix_noise
from .table import Row, StepTable, affine_row, denoised_from


class DDIMScheduler(Scheduler):
    """next = sqrt(A') x0 + sqrt(1 - A' - w²) e + w n, w² = eta² (1 - A')/(1 - A) (1 - A/A').

    A is alpha-bar at the timestep, A' at timestep - T // N, e the noise that the model sees (Song et al. 2020,
    https://arxiv.org/abs/2010.02502, equations 12 and 16). Constructor keys, defaults and methods are those of
    diffusers' class of this name; thresholding and zero-terminal-SNR betas are refused.
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
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.final_alpha_cumprod = 1.0 if set_alpha_to_one else float(self._alpha_bar[0])

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the run's timesteps by their number."""
        config = self.config
        chosen = spaced_timesteps(config.timestep_spacing, len(self), num_inference_steps, config.steps_offset)
        self._keep_timesteps(chosen.round(), torch.int64, device)

    def step_table(self, *, begin: int = 0, eta: float = 0.0, use_clipped_model_output: bool = False) -> StepTable:
        if self.num_inference_steps is None:
            raise ValueError("step: expected set_timesteps to be called first, got a scheduler without timesteps")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: expected 0 (DDIM) to 1 (DDPM), got {eta}")
        rows = [self._row(t, eta, use_clipped_model_output) for t in self.timesteps.tolist()]
        return StepTable(
            timesteps=self.timesteps,
            input_scale=(1.0,) * len(rows),
            coefficients=torch.tensor(rows, dtype=torch.float64),
            needs_noise=(eta > 0,) * len(rows),
            initial_scale=1.0,
            clip=self.config.clip_sample_range if self.config.clip_sample else None,
        )

    def _row(self, timestep: int, eta: float, direction_from_clipped: bool) -> Row:
        before = timestep - len(self) // int(self.num_inference_steps or 1)
        bar = float(self._alpha_bar[timestep])
        bar_next = float(self._alpha_bar[before]) if before >= 0 else self.final_alpha_cumprod
        variance = eta**2 * (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)
        alpha, sigma = bar**0.5, (1 - bar) ** 0.5
        direction = (1 - bar_next - variance) ** 0.5
        x0 = denoised_from(self.config.prediction_type, alpha, sigma)
        # e = (sample - alpha * x0) / sigma, so its weight moves onto the sample and the prediction
        keep, swap = direction / sigma, bar_next**0.5 - direction * alpha / sigma
        if not self.config.clip_sample:
            return affine_row(x0, sample=keep, denoised=swap, noise=variance**0.5)
        if direction_from_clipped:
            return (keep, 0.0, swap, variance**0.5, *x0)
        unclipped = (keep - keep * alpha * x0[0], -keep * alpha * x0[1])
        return (*unclipped, bar_next**0.5, variance**0.5, *x0)

    def step(
        self,
        model_output: Tensor,  # [B, ...]
        timestep: int | Tensor,
        sample: Tensor,  # [B, ...]
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """One step towards less noise; `eta` > 0 draws noise, unless `variance_noise` is given."""
        if variance_noise is not None and generator is not None:
            raise ValueError("variance_noise: expected None together with generator, got a tensor")
        output = self._execute(
            model_output,
            timestep,
            sample,
            generator,
            variance_noise,
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
        )
        return as_given(output, return_dict)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(A) * original + sqrt(1 - A) * noise, for trained `timesteps` [B]."""
        return mix_noise(original_samples, noise, *self._signals_at(timesteps.to(original_samples.device)))
