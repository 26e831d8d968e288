"""Euler's method with ancestral noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .config import records_config
from .euler_discrete import SigmaScheduler
from .schedule import round_to_float32, spaced_timesteps
from .scheduler import Generator, StepOutput, as_given
from .table import Row, StepTable, affine_row, denoised_from


class EulerAncestralDiscreteScheduler(SigmaScheduler):
    """next = x0 + down * (x - x0) / sigma + up * n, up² = s²(sigma² - s²)/sigma², down² = s² - up², s the next sigma.

    The sampler is k-diffusion's sample_euler_ancestral (https://github.com/crowsonkb/k-diffusion). Constructor keys,
    defaults and methods are those of diffusers' class of this name; zero-terminal-SNR betas are refused.
    """

    refused: ClassVar = {"rescale_betas_zero_snr": False}

    @records_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the run's timesteps by their number."""
        config = self.config
        chosen = round_to_float32(
            spaced_timesteps(config.timestep_spacing, len(self), num_inference_steps, config.steps_offset)
        )
        self._set_run(chosen, np.append(self._sigmas_of(chosen), 0.0), device)

    def step_table(self, *, begin: int = 0) -> StepTable:
        sigmas = self.sigmas.double().tolist()
        return self._table([self._row(a, b) for a, b in pairwise(sigmas)], True)

    def _row(self, sigma: float, following: float) -> Row:
        up = following * (1 - (following / sigma) ** 2) ** 0.5
        down = following**2 / sigma
        x0 = denoised_from(self.config.prediction_type, 1.0, sigma)
        return affine_row(x0, sample=down / sigma, denoised=1 - down / sigma, noise=up)

    def step(
        self,
        model_output: Tensor,  # [B, ...]
        timestep: float | Tensor,
        sample: Tensor,  # [B, ...]
        generator: Generator = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """One step towards less noise; draws in the model's dtype at every step, the last one included."""
        self._check_timestep(timestep)
        return as_given(self._execute(model_output, timestep, sample, generator), return_dict)
