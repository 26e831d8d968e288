"""Euler's method on the straight paths of a rectified flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from .config import records_config
from .rectified_flow import Times, shift_timestep
from .schedule import Array, given_values, karras_sigmas, round_to_float32
from .scheduler import Generator, Scheduler, StepOutput, as_given, mix_noise
from .table import Row, StepTable, affine_row


class FlowMatchEulerDiscreteScheduler(Scheduler):
    """With v the predicted velocity, sigma the time from 1 (noise) to 0 and sigma' the next one:

        next = x + (sigma' - sigma) v                       x0 = x - sigma v
        next = (1 - sigma') x0 + sigma' n                   with stochastic_sampling

    The model is told num_train_timesteps * sigma, not an integer. Sigmas are evenly spaced from 1 to that of the first
    trained timestep, and then shifted to s sigma / (1 + (s - 1) sigma) by s = shift, or by the mu of the resolution
    where use_dynamic_shifting (Esser et al. 2024, https://arxiv.org/abs/2403.03206, section 5.3.2). The first trained
    timestep was shifted as well, so the low end is shifted twice: so are Stable Diffusion 3's own runs
    (https://github.com/Stability-AI/sd3.5). Given sigmas are shifted once.

    Constructor keys, defaults and methods are those of diffusers' class of this name; beta sigmas, times per token and
    stochastic sampling of inverted sigmas are refused.
    """

    refused: ClassVar = {"use_beta_sigmas": False}

    @records_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
    ) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps: expected at least 1, got {num_train_timesteps}")
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type: expected 'exponential' or 'linear', got {time_shift_type!r}")
        if use_karras_sigmas and use_exponential_sigmas:
            raise ValueError("use_exponential_sigmas: expected False with use_karras_sigmas=True, got True")
        if invert_sigmas and stochastic_sampling:
            raise ValueError("stochastic_sampling: expected False with invert_sigmas=True, got True")
        self._begin()
        self._shift = shift
        sigmas = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32) / num_train_timesteps
        if not use_dynamic_shifting:
            sigmas = shift_timestep(sigmas, shift)
        self.timesteps = sigmas * num_train_timesteps
        self.sigma_max, self.sigma_min = float(sigmas[0]), float(sigmas[-1])
        self._keep_sigmas(np.append(sigmas.numpy(), 0.0))

    @property
    def shift(self) -> float:
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Shift the sigmas of the next `set_timesteps` by this; its lowest sigma stays that of the config's shift."""
        self._shift = shift

    def time_shift(self, mu: float, sigma: float, t: Times) -> Times:
        """a / (a + (1/t - 1)^sigma), with a = e^mu ("exponential") or mu ("linear")."""
        a = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        return a * t**sigma / (a * t**sigma + (1 - t) ** sigma)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the run's timesteps: by their number, as given sigmas without the final one, or as given timesteps.

        Given timesteps are told to the model as they are, though the sigmas, theirs or given ones, are shifted.
        `mu` is the shift of use_dynamic_shifting, and not read without.
        """
        config, total = self.config, len(self)
        told = None if timesteps is None else round_to_float32(given_values("timesteps", timesteps, total))
        if sigmas is not None:
            levels = round_to_float32(given_values("sigmas", sigmas, 1.0))
        elif told is not None:
            levels = told / total
        elif num_inference_steps is not None and num_inference_steps >= 1:
            levels = np.linspace(total * self.sigma_max, total * self.sigma_min, num_inference_steps) / total
        else:
            raise ValueError(f"num_inference_steps: expected at least 1, got {num_inference_steps}")
        steps = len(levels) if told is None else len(told)
        if num_inference_steps not in (None, steps) or steps != len(levels):
            raise ValueError(
                "set_timesteps: expected num_inference_steps, sigmas and timesteps to be as many where given, got "
                f"{num_inference_steps}, {len(levels)} and {steps}"
            )
        levels = round_to_float32(self._spaced(levels, mu))
        if config.invert_sigmas:
            levels, told = round_to_float32(1 - levels), None
        self._keep_timesteps(total * levels if told is None else told, torch.float32, device)
        self._keep_sigmas(np.append(levels, self._last_sigma))

    @property
    def _last_sigma(self) -> float:
        return 1.0 if self.config.invert_sigmas else 0.0

    def _spaced(self, levels: Array, mu: float | None) -> Array:
        """The run's sigmas of evenly spaced or given ones."""
        config = self.config
        if not config.use_dynamic_shifting:
            levels = shift_timestep(levels, self.shift)
        elif mu is None:
            raise ValueError("mu: expected a number with use_dynamic_shifting=True, got None")
        else:
            levels = self.time_shift(mu, 1.0, levels)
        if config.shift_terminal:
            if levels[-1] == 1:
                raise ValueError("shift_terminal: expected a run whose last sigma is below 1, got one that ends at 1")
            levels = 1 - (1 - levels) * (1 - config.shift_terminal) / (1 - levels[-1])
        if config.use_karras_sigmas:
            return karras_sigmas(levels[-1], levels[0], len(levels))
        if config.use_exponential_sigmas:
            return np.geomspace(levels[0], levels[-1], len(levels))
        return levels

    def step_table(self, *, begin: int = 0) -> StepTable:
        rows = [self._row(a, b) for a, b in pairwise(self.sigmas.double().tolist())]
        return StepTable(
            timesteps=self.timesteps,
            input_scale=(1.0,) * len(rows),
            coefficients=torch.tensor(rows, dtype=torch.float64),
            needs_noise=(self.config.stochastic_sampling,) * len(rows),
            initial_scale=1.0,
            noise_dtype=torch.float32,
        )

    def _row(self, sigma: float, following: float) -> Row:
        x0 = (1.0, self._last_sigma - sigma)
        if self.config.stochastic_sampling:
            return affine_row(x0, sample=0.0, denoised=1 - following, noise=following)
        return (1.0, following - sigma, 0.0, 0.0, *x0)

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """One step towards less noise. `s_churn` to `s_noise` are taken and not read, as in diffusers."""
        self._check_timestep(timestep)
        if per_token_timesteps is not None:
            raise ValueError(f"per_token_timesteps: expected None, got {type(per_token_timesteps).__name__}")
        return as_given(self._execute(model_output, timestep, sample, generator), return_dict)

    def scale_noise(
        self,
        sample: Tensor,  # [B, ...]
        timestep: Tensor,  # [B]
        noise: Tensor,  # [B, ...]
    ) -> Tensor:
        """(1 - sigma) * sample + sigma * noise, for timesteps [B] of the run."""
        sigma = self._sigmas_at(timestep).to(sample.device)
        return mix_noise(sample, noise, 1 - sigma, sigma)
