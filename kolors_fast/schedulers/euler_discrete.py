"""Euler's method on the probability-flow ODE, in the variance-exploding form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .config import records_config
from .schedule import Array, given_values, karras_sigmas, round_to_float32, sigma_to_timestep, spaced_timesteps
from .scheduler import Generator, Scheduler, StepOutput, as_given, mix_noise
from .table import Row, StepTable, affine_row, denoised_from, draw_noise


class SigmaScheduler(Scheduler):
    """Base of the Euler samplers: sample = x0 + sigma * noise, the model sees sample / sqrt(sigma² + 1)."""

    @property
    def init_noise_sigma(self) -> float:
        largest = float(self.sigmas.max())
        if self.config.timestep_spacing in ("linspace", "trailing"):
            return largest
        return float((largest**2 + 1) ** 0.5)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """sample / sqrt(sigma² + 1), for the sigma of `timestep` or of the running step."""
        if self._step_index is None and timestep is None:
            raise ValueError("timestep: expected one of scheduler.timesteps at the first step, got None")
        sigma = float(self.sigmas[self._position(timestep if timestep is not None else 0.0)])
        return sample / (sigma**2 + 1) ** 0.5

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """original + sigma(t) * noise, for `timesteps` [B] of the run."""
        sigma = self._sigmas_at(timesteps).to(original_samples.device)
        return mix_noise(original_samples, noise, torch.ones_like(sigma), sigma)

    def _prepare(self) -> None:
        super()._prepare()
        self.timesteps = torch.arange(len(self) - 1, -1, -1, dtype=torch.float32)
        self._keep_sigmas(np.append(self._train_sigmas[::-1], 0.0))

    def _set_run(self, timesteps: Array, sigmas: Array, device: str | torch.device | None) -> None:
        self._keep_timesteps(timesteps, torch.float32, device)
        self._keep_sigmas(sigmas)

    def _sigmas_of(self, timesteps: Array) -> Array:
        return np.interp(timesteps, np.arange(len(self)), self._train_sigmas)

    def _table(self, rows: list[Row], needs_noise: bool) -> StepTable:
        sigmas = self.sigmas[:-1].double()
        return StepTable(
            timesteps=self.timesteps,
            input_scale=tuple((1 / (sigmas**2 + 1).sqrt()).tolist()),
            coefficients=torch.tensor(rows, dtype=torch.float64),
            needs_noise=(needs_noise,) * len(rows),
            initial_scale=self.init_noise_sigma,
        )


class EulerDiscreteScheduler(SigmaScheduler):
    """next = x0 + sigma_next * (x - x0) / sigma (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1).

    Constructor keys, defaults and methods are those of diffusers' class of this name. The interpolation in log sigma,
    the exponential and beta spacings, continuous timesteps and zero-terminal-SNR betas are refused with a ValueError.
    """

    refused: ClassVar = {
        "interpolation_type": "linear",
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
    }

    @records_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:
        if final_sigmas_type not in ("zero", "sigma_min"):
            raise ValueError(f"final_sigmas_type: expected 'zero' or 'sigma_min', got {final_sigmas_type!r}")
        self._prepare()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the run's timesteps: by number, or as given `timesteps`, or as given `sigmas` with their final one."""
        given = [value is not None for value in (num_inference_steps, timesteps, sigmas)]
        if sum(given) != 1:
            raise ValueError(
                f"set_timesteps: expected exactly one of num_inference_steps, timesteps, sigmas, got {sum(given)}"
            )
        if timesteps is not None and self.config.use_karras_sigmas:
            raise ValueError("timesteps: expected None with use_karras_sigmas=True, got a list")
        if sigmas is not None:
            levels = round_to_float32(given_values("sigmas", sigmas, math.inf))
            self._set_run(sigma_to_timestep(levels[:-1], self._train_sigmas), levels, device)
            return
        if timesteps is not None:
            chosen = given_values("timesteps", timesteps, len(self) - 1)
        else:
            config = self.config
            chosen = spaced_timesteps(config.timestep_spacing, len(self), num_inference_steps or 0, config.steps_offset)
        chosen = round_to_float32(chosen)
        levels = self._sigmas_of(chosen)
        if self.config.use_karras_sigmas:
            levels = self._karras(levels)
            chosen = sigma_to_timestep(levels, self._train_sigmas)
        last = 0.0 if self.config.final_sigmas_type == "zero" else self._train_sigmas[0]
        self._set_run(chosen, np.append(levels, last), device)

    def _karras(self, levels: Array) -> Array:
        low, high = self.config.sigma_min, self.config.sigma_max
        return karras_sigmas(levels[-1] if low is None else low, levels[0] if high is None else high, len(levels))

    def step_table(self, *, begin: int = 0) -> StepTable:
        sigmas = self.sigmas.double().tolist()
        return self._table([self._row(a, a, b) for a, b in pairwise(sigmas)], False)

    def _row(self, sigma: float, raised: float, following: float) -> Row:
        """From `raised`, which is `sigma` but for churn, to `following`."""
        noise_level = raised if self.config.prediction_type == "epsilon" else sigma
        x0 = denoised_from(self.config.prediction_type, 1.0, noise_level)
        return affine_row(x0, sample=following / raised, denoised=1 - following / raised)

    def step(
        self,
        model_output: Tensor,  # [B, ...]
        timestep: float | Tensor,
        sample: Tensor,  # [B, ...]
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """One step towards less noise; with `s_churn`, after raising the noise level as Karras et al. do."""
        self._check_timestep(timestep)
        index = self._position(timestep)
        sigma, following = (float(value) for value in self.sigmas[index : index + 2])
        churn = min(s_churn / len(self.timesteps), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        if churn <= 0:
            return as_given(self._execute(model_output, timestep, sample, generator), return_dict)
        raised = sigma * (1 + churn)
        noise = draw_noise(tuple(sample.shape), generator, sample.device, model_output.dtype)
        lifted = sample.float() + s_noise * (raised**2 - sigma**2) ** 0.5 * noise.float()
        table = self._table([self._row(sigma, raised, following)], False)
        output = table.advance(0, lifted, model_output.float(), torch.ones(1, device=sample.device))
        self._step_index = index + 1
        return as_given(StepOutput(*(value.to(sample.dtype) for value in output)), return_dict)
