"""A sampler is a table: every scheduler here is affine in (sample, guided prediction, previous prediction, noise)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.guided_step import guided_step

Row = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class StepTable:
    """All steps of one run, built in float64 on the host.

    Row i turns the sample into the next one:

        guided   = sum_p weights[p] * predictions_p
        denoised = c4 * sample + c5 * guided
        next     = c0 * sample + c1 * guided + c2 * previous + c3 * noise

    `previous` is the denoised of the step before (multistep samplers); where `clip` is set it is this step's own
    denoised, clamped to [-clip, clip], and `next` is affine in that.

    Where the variance is learned, a row ends with two log variances, low and high; predictions [P * B, 2C, ...] are
    C channels as above, then C channels v, where from low (-1) to high (1) the log variance lies. Noise is first
    multiplied by its deviation, that of the last of the P predictions, for guidance does not push it:

        noise = noise * exp(((1 - v) low + (1 + v) high) / 4)
    """

    timesteps: Tensor  # [N], float32 or int64: what the model is told
    input_scale: tuple[float, ...]  # [N], the model sees sample * input_scale
    coefficients: Tensor  # [N, 6] float64, or [N, 8] with the log variances between which one is learned
    needs_noise: tuple[bool, ...]  # [N], a draw is made, even where c3 is 0, so that generators advance as in diffusers
    initial_scale: float  # standard deviation of the first sample
    noise_dtype: torch.dtype | None = None  # None: the sample's dtype
    uses_previous: bool = False
    clip: float | None = None
    _moved: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.coefficients)

    @property
    def learned_variance(self) -> bool:
        return self.coefficients.shape[1] == 8

    def coefficients_on(self, device: torch.device) -> Tensor:
        """The coefficients as float32 [N, 6 or 8] on `device`, copied there once."""
        if device not in self._moved:
            self._moved[device] = self.coefficients.to(device=device, dtype=torch.float32)
        return self._moved[device]

    def advance(
        self,
        index: int,
        sample: Tensor,  # [B, ...]
        predictions: Tensor,  # [P * B, ...], [P * B, 2C, ...] with a learned variance
        weights: Tensor,  # [P] or [P, B] float32
        *,
        previous: Tensor | None = None,  # [B, ...]
        noise: Tensor | None = None,  # [B, ...]
    ) -> tuple[Tensor, Tensor]:
        """Execute row `index`; returns (next, denoised), both in the sample's dtype.

        Weights [P, B] take one step per item, the very step of the item alone.
        """
        coefficients = self.coefficients_on(sample.device)[index]
        return self.advance_from(coefficients, None, sample, predictions, weights, previous=previous, noise=noise)

    def advance_from(
        self,
        coefficients: Tensor,  # [6 or 8], or [N, 6 or 8] with row
        row: Tensor | None,  # int64 [1], which the host does not read
        sample: Tensor,
        predictions: Tensor,
        weights: Tensor,
        *,
        previous: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`advance` with coefficients of the caller's."""
        if weights.dim() == 2:
            per_item = predictions.unflatten(0, weights.shape)  # [P, B, ...]
            items = [
                self.advance_from(
                    coefficients,
                    row,
                    sample[i : i + 1],
                    per_item[:, i],
                    weights[:, i],
                    previous=None if previous is None else previous[i : i + 1],
                    noise=None if noise is None else noise[i : i + 1],
                )
                for i in range(len(sample))
            ]
            return torch.cat([after for after, _ in items]), torch.cat([denoised for _, denoised in items])
        if self.learned_variance:
            coefficients, between = coefficients[..., :6], coefficients[..., 6:]
            if predictions.shape[1] != 2 * sample.shape[1]:
                wanted = f"{2 * sample.shape[1]} channels, noise and variance"
                raise ValueError(f"predictions: expected {wanted}, got {predictions.shape[1]}")
            predictions, position = predictions.chunk(2, dim=1)
            if noise is not None:
                between = between if row is None else between.index_select(0, row)[0]
                noise = noise * learned_deviation(position[-len(sample) :], between)
        noise = None if noise is None else noise.to(sample.dtype)
        if self.clip is not None:
            _, denoised = guided_step(sample, predictions, weights, coefficients, row=row, return_denoised=True)
            previous = denoised.clamp(-self.clip, self.clip)
        after, denoised = guided_step(
            sample, predictions, weights, coefficients, previous=previous, noise=noise, row=row, return_denoised=True
        )
        return after, denoised if self.clip is None or previous is None else previous


def denoised_from(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Coefficients (a, b) of x0 = a * sample + b * prediction, where sample = alpha * x0 + sigma * noise.

    v = alpha' * noise - sigma' * x0 with (alpha', sigma') scaled to unit length (Salimans & Ho 2022,
    https://arxiv.org/abs/2202.00512), so the same formula serves variance-preserving and exploding samples.
    """
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "sample":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        squared = alpha**2 + sigma**2
        return alpha / squared, -sigma / squared**0.5
    raise ValueError(f"prediction_type: expected 'epsilon', 'v_prediction' or 'sample', got {prediction_type!r}")


def affine_row(
    x0: tuple[float, float], *, sample: float, denoised: float, previous: float = 0.0, noise: float = 0.0
) -> Row:
    """Row of next = sample * x + denoised * x0 + previous * (x0 of the step before) + noise * n."""
    return (sample + denoised * x0[0], denoised * x0[1], previous, noise, *x0)


def learned_deviation(position: Tensor, between: Tensor) -> Tensor:
    """exp(((1 - v) low + (1 + v) high) / 4) in float32, for v [B, C, ...] and the log variances (low, high) [2].

    Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, equation 15.
    """
    share = (position.float() + 1) / 2
    return torch.exp(0.5 * ((1 - share) * between[0] + share * between[1]))


def draw_noise(
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Standard normal noise; with a list, one generator per item of the batch.

    Drawn on the generator's own device and moved, so that a CPU generator gives the same noise everywhere.
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"generator: expected a list of {shape[0]} generators, got {len(generator)}")
        return torch.cat([draw_noise((1, *shape[1:]), one, device, dtype) for one in generator])
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)
