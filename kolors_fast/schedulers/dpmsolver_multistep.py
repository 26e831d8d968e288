"""DPM-Solver++ of first and second order, multistep, as an ODE or an SDE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .config import records_config
from .schedule import given_values, karras_sigmas, sigma_to_timestep, spaced_timesteps
from .scheduler import Generator, Scheduler, StepOutput, as_given, mix_noise
from .table import Row, StepTable, affine_row, denoised_from

FEW_STEPS = 15  # lower_order_final ends runs shorter than this with a first-order step


class DPMSolverMultistepScheduler(Scheduler):
    """With alpha = 1/sqrt(sigma² + 1), s = sigma alpha, lambda = -ln sigma, h = lambda' - lambda, m the predicted x0:

        dpmsolver++       next = s'/s x + alpha' (1 - e^-h) m + D
        sde-dpmsolver++   next = s'/s e^-h x + alpha' (1 - e^-2h) m + D + s' sqrt(1 - e^-2h) n

    Order 2 adds D = g (m - m_before) h / h_before, where g is half the factor of m ("midpoint") or
    alpha' (1 - (1 - e^-kh) / (k h)), k = 1 or 2 ("heun"). Lu et al. 2022, https://arxiv.org/abs/2211.01095.
    Constructor keys, defaults and methods are those of diffusers' class of this name; order 3, the non-++ algorithms,
    lu, exponential, beta and flow sigmas, thresholding, learned variances and clipped lambdas are refused.
    """

    refused: ClassVar = {
        "thresholding": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
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
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        for key, choices in {
            "solver_order": (1, 2),
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "solver_type": ("midpoint", "heun"),
            "final_sigmas_type": ("zero", "sigma_min"),
        }.items():
            if self.config[key] not in choices:
                raise ValueError(f"{key}: expected one of {choices}, got {self.config[key]!r}")
        self._prepare()
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._keep_sigmas(self._train_sigmas)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the run's timesteps: by number, or as given `timesteps`."""
        if mu is not None:
            raise ValueError(f"mu: expected None without flow sigmas, got {mu}")
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps: expected exactly one of num_inference_steps, timesteps, got both or none")
        config = self.config
        if timesteps is not None:
            if config.use_karras_sigmas:
                raise ValueError("timesteps: expected None with use_karras_sigmas=True, got a list")
            chosen = given_values("timesteps", timesteps, len(self) - 1)
        else:
            spare = 0 if config.timestep_spacing == "trailing" else 1
            chosen = spaced_timesteps(
                config.timestep_spacing, len(self), num_inference_steps or 0, config.steps_offset, spare=spare
            ).round()
        levels = np.interp(chosen, np.arange(len(self)), self._train_sigmas)
        if config.use_karras_sigmas:
            # the whole trained range, where Euler takes the range of the chosen timesteps
            levels = karras_sigmas(self._train_sigmas[0], self._train_sigmas[-1], len(chosen))
            chosen = sigma_to_timestep(levels, self._train_sigmas)
            if config.beta_schedule != "squaredcos_cap_v2":
                chosen = chosen.round()
        last = 0.0 if config.final_sigmas_type == "zero" else self._train_sigmas[0]
        self._keep_timesteps(np.trunc(chosen), torch.int64, device)
        self._keep_sigmas(np.append(levels, last))

    def step_table(self, *, begin: int = 0) -> StepTable:
        if self.num_inference_steps is None:
            raise ValueError("step: expected set_timesteps to be called first, got a scheduler without timesteps")
        rows = [self._row(index, begin) for index in range(self.num_inference_steps)]
        stochastic = self.config.algorithm_type == "sde-dpmsolver++"
        return StepTable(
            timesteps=self.timesteps,
            input_scale=(1.0,) * len(rows),
            coefficients=torch.tensor(rows, dtype=torch.float64),
            needs_noise=(stochastic,) * len(rows),
            initial_scale=1.0,
            noise_dtype=torch.float32,
            uses_previous=self.config.solver_order > 1,
        )

    def _first_order(self, index: int, begin: int) -> bool:
        config, steps = self.config, len(self.timesteps)
        short = config.lower_order_final and steps < FEW_STEPS
        at_end = index == steps - 1 and (config.euler_at_final or short or config.final_sigmas_type == "zero")
        return config.solver_order == 1 or index <= begin or at_end

    def _row(self, index: int, begin: int) -> Row:
        sigma, following = (float(value) for value in self.sigmas[index : index + 2])
        alpha = (sigma**2 + 1) ** -0.5
        alpha_next = (following**2 + 1) ** -0.5
        decay = following / sigma  # e^-h
        power = 2 if self.config.algorithm_type == "sde-dpmsolver++" else 1
        keep = alpha_next / alpha * decay**power  # s'/s = alpha'/alpha e^-h
        gain = alpha_next * (1 - decay**power)
        noise = following * alpha_next * (1 - decay**2) ** 0.5 if power == 2 else 0.0
        slope = 0.0  # weight of m - m_before
        if not self._first_order(index, begin):
            h = math.log(sigma / following)
            h_before = math.log(float(self.sigmas[index - 1]) / sigma)
            heun = alpha_next - gain / (power * h)
            slope = (0.5 * gain if self.config.solver_type == "midpoint" else heun) * h / h_before
        x0 = denoised_from(self.config.prediction_type, alpha, sigma * alpha)
        return affine_row(x0, sample=keep, denoised=gain + slope, previous=-slope, noise=noise)

    def step(
        self,
        model_output: Tensor,  # [B, ...]
        timestep: int | Tensor,
        sample: Tensor,  # [B, ...]
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """One step towards less noise; the SDE draws float32 noise, unless `variance_noise` is given."""
        return as_given(self._execute(model_output, timestep, sample, generator, variance_noise), return_dict)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha(t) * original + s(t) * noise, for `timesteps` [B] of the run."""
        sigma = self._sigmas_at(timesteps).to(original_samples.device)
        alpha = (sigma**2 + 1).rsqrt()
        return mix_noise(original_samples, noise, alpha, sigma * alpha)
