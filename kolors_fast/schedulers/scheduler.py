"""What all schedulers share: the schedule, the step counter, and executing one table row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import Configured
from .schedule import Array, training_betas, training_sigmas
from .table import StepTable, draw_noise

Generator = torch.Generator | list[torch.Generator] | None


class StepOutput(NamedTuple):
    """What `step` returns."""

    prev_sample: Tensor  # [B, ...], the sample of the next, less noisy step
    pred_original_sample: Tensor  # [B, ...], the clean sample as predicted at this step


class Scheduler(Configured):
    """Base of all schedulers. A subclass chooses timesteps and sigmas, and writes `step_table`."""

    order = 1  # model calls per step, read by diffusers' pipelines
    counts_steps = True  # False: the row is found by the timestep's value at every call
    learned_variance = False  # True: the model predicts [B, 2C, ...], see StepTable
    refused: ClassVar[dict[str, Any]] = {}  # config key -> the only value that is affine and implemented

    # subclasses differ in their options:
    # set_timesteps(num_inference_steps, device) chooses `timesteps`;
    # step_table(begin=0) is the table of the run over them, whose row `begin` is the first to be executed
    set_timesteps: Callable[..., None]
    step_table: Callable[..., StepTable]
    timesteps: Tensor
    sigmas: Tensor  # float32 [N + 1], on the host

    def _begin(self) -> None:
        """Check the config; no run is chosen yet."""
        for key, supported in self.refused.items():
            if self.config[key] != supported:
                raise ValueError(f"{key}: expected {supported!r}, got {self.config[key]!r}")
        self.num_inference_steps: int | None = None
        self._restart()

    def _prepare(self) -> None:
        """Check the config and compute the training schedule of betas."""
        self._begin()
        config = self.config
        betas = training_betas(
            config.num_train_timesteps,
            config.beta_start,
            config.beta_end,
            config.beta_schedule,
            config.trained_betas,
        )
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)  # float32 [T]
        self._alpha_bar: Array = self.alphas_cumprod.double().numpy()
        self._train_sigmas = training_sigmas(self.alphas_cumprod)

    def _restart(self) -> None:
        """Forget the position in the run and everything computed for the previous timesteps."""
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._started_at = 0
        self._previous: Tensor | None = None
        self._tables: dict[tuple[Any, ...], StepTable] = {}

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first sample."""
        return 1.0

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Let the next run start at this position of `timesteps` (image-to-image)."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as the model wants to see it at `timestep`."""
        return sample

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Position of `timestep` in `timesteps`; of two equal ones the second, as diffusers chooses."""
        found = (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)).nonzero()
        if len(found) == 0:
            raise ValueError(f"timestep: expected one of scheduler.timesteps, got {float(timestep)}")
        return int(found[1 if len(found) > 1 else 0])

    def _check_timestep(self, timestep: float | Tensor) -> None:
        """For classes whose timesteps are fractional, so that an integer is likely to be a position."""
        integer = not timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, int)
        if integer:
            raise ValueError(
                f"timestep: expected one of the floating-point scheduler.timesteps, got the integer {int(timestep)}"
            )

    def _position(self, timestep: float | Tensor) -> int:
        if not self.counts_steps:
            return self.index_for_timestep(timestep)
        if self._step_index is None:
            found = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
            self._step_index = self._started_at = found
        if self._step_index >= len(self.timesteps):
            raise ValueError(f"step: expected at most {len(self.timesteps)} calls after set_timesteps, got one more")
        return self._step_index

    def _execute(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator,
        noise: Tensor | None = None,
        **options: Any,
    ) -> StepOutput:
        """Run the row of `timestep`; `options` go to `step_table`."""
        expected, given = tuple(sample.shape), tuple(model_output.shape)
        if self.learned_variance:
            expected = (expected[0], 2 * expected[1], *expected[2:])
        if given != expected:
            meaning = "twice the sample's channels" if self.learned_variance else "the sample's shape"
            raise ValueError(f"model_output: expected {meaning} {expected}, got {given}")
        index = self._position(timestep)
        key = (self._started_at, *sorted(options.items()))
        if key not in self._tables:
            self._tables = {key: self.step_table(begin=self._started_at, **options)}
        table = self._tables[key]
        if not table.needs_noise[index]:
            noise = None
        elif noise is None:
            dtype = table.noise_dtype or model_output.dtype
            noise = draw_noise(tuple(sample.shape), generator, sample.device, dtype)
        wide = torch.promote_types(sample.dtype, model_output.dtype)
        after, denoised = table.advance(
            index,
            sample.to(wide),
            model_output.to(wide),
            torch.ones(1, device=sample.device),
            previous=self._previous,
            noise=noise,
        )
        if table.uses_previous:
            self._previous = denoised
        if self._step_index is not None:
            self._step_index += 1
        return StepOutput(after.to(sample.dtype), denoised.to(sample.dtype))

    def _sigmas_at(self, timesteps: Tensor) -> Tensor:
        """The run's sigmas at `timesteps` [B], float32 on their device; where a begin index is set, the sigma there.

        The begin index stands for image-to-image, which noises once before the run; the step index for
        inpainting, which noises between steps.
        """
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            index = self._begin_index if self._step_index is None else self._step_index
            indices = [index] * len(timesteps)
        return self.sigmas[indices].to(timesteps.device)

    def _signals_at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha-bar) and sqrt(1 - alpha-bar) at trained timesteps [B], float32 on their device."""
        self.alphas_cumprod = self.alphas_cumprod.to(timesteps.device)  # kept there for the next training step
        alpha_bar = self.alphas_cumprod[timesteps]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _keep_timesteps(self, timesteps: Array, dtype: torch.dtype, device: str | torch.device | None) -> None:
        self.num_inference_steps = len(timesteps)
        self.timesteps = torch.from_numpy(timesteps.copy()).to(device=device, dtype=dtype)
        self._restart()

    def _keep_sigmas(self, sigmas: Array) -> None:
        self.sigmas = torch.from_numpy(np.asarray(sigmas, dtype=np.float32))  # stays on the host: no syncs


def mix_noise(original: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """signal * original + sigma * noise, per item of the batch [B], in at least float32, rounded once."""
    shape = (-1, *[1] * (original.dim() - 1))
    working = torch.promote_types(original.dtype, torch.float32)
    mixed = signal.reshape(shape) * original.to(working) + sigma.reshape(shape) * noise.to(working)
    return mixed.to(original.dtype)


def as_given(output: StepOutput, return_dict: bool) -> StepOutput | tuple[Tensor, Tensor]:
    """diffusers' switch between the named output and a plain tuple."""
    return output if return_dict else (output.prev_sample, output.pred_original_sample)
