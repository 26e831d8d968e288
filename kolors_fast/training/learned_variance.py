"""Noise prediction with a learned variance (Nichol & Dhariwal, arXiv 2102.09672), as DiT and PixArt are trained."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kolors_fast.data.shapes import HeldOutPrompt
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.schedulers import DPMSolverMultistepScheduler

from .config import LearnedVarianceStage
from .devices import sent, sent_to
from .monitor import STEPS, judge_prompts, noise_shape
from .objectives import add_noise, bins_up_to, draw_timesteps, first_texts, snr_weights, with_offset
from .pool import Bucket, Encode, Pool
from .streams import Streams

TRAIN_STEPS = 1000
GUIDANCE = 4.5
# of x_0 in x_t, below which errors weigh no more: A falls to 4e-5, and passing the noise on exactly would be all
_LEAST_SIGNAL = 0.01
_HALF_BIN = 1 / 255  # of values in [-1, 1] that were 8 bits
_LAST_BIN = 0.999  # values beyond lie in a bin that has no end
_LEAST_PROBABILITY = 1e-12


class DiffusionProcess:
    """q(x_t | x_0) = N(sqrt(A_t) x_0, 1 - A_t) with A_t the product of 1 - beta.

    Tables [T] are fp32, computed in float64.

    Args:
        betas: [T]; None: 1000 that rise linearly from 1e-4 to 0.02 (Ho et al. 2020).
    """

    def __init__(self, betas: Tensor | None = None) -> None:
        betas = torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64) if betas is None else betas.double()
        signal = torch.cumprod(1 - betas, dim=0)  # A
        noise = 1 - signal
        before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        posterior = betas * (1 - before) / noise  # beta~, zero at t = 0
        posterior[0] = posterior[1]  # or its logarithm had no bound
        self.signal = signal.float()
        self.log_largest, self.log_smallest = betas.log().float(), posterior.log().float()
        self.per_noise = (betas / ((1 - betas) * noise).sqrt()).float()  # how far the posterior's mean moves with it

    def variational_bound(self, output: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The timestep's term of the bound on -log p(x_0), in bits per value: [B].

            t > 0   KL(q(x_t-1 | x_t, x_0) to N(mu, s^2))
            t = 0   -log of what N(mu, s^2) gives the bin of x_0, of width 2/255, the outermost without an end
            log s^2 = f log beta_t + (1 - f) log beta~_t,  f = (v + 1) / 2

        mu follows from the predicted noise, which gets no gradient here; the true posterior's mean differs from it by
        beta_t / sqrt(a_t (1 - A_t)) times what the prediction differs from the noise.

        Args:
            output: predicted noise and v [B, 2C, h, w].
            latents, noise: x_0 and n [B, C, h, w] of x_t = sqrt(A_t) x_0 + sqrt(1 - A_t) n.
            timesteps: t, int64 [B] on the CPU.
        """
        predicted, v = output.chunk(2, dim=1)

        def at(table: Tensor) -> Tensor:
            return sent(table[timesteps].to(output.dtype), output.device).view(-1, 1, 1, 1)

        smallest = at(self.log_smallest)
        log_variance = smallest + (v + 1) / 2 * (at(self.log_largest) - smallest)
        apart = at(self.per_noise) * (predicted.detach() - noise)  # true mean - mu
        divergence = gaussian_divergence(apart, smallest, log_variance)
        likelihood = log_probability_of_bin(latents, apart, log_variance)
        first = sent(timesteps == 0, output.device).view(-1, 1, 1, 1)
        return torch.where(first, -likelihood, divergence).mean((1, 2, 3)) / math.log(2)


def gaussian_divergence(apart: Tensor, log_true: Tensor, log_model: Tensor) -> Tensor:
    """KL(N(m, exp(log_true)) to N(m - apart, exp(log_model))) of each value, in nats."""
    return (log_model - log_true + (log_true - log_model).exp() + apart.square() * (-log_model).exp() - 1) / 2


def log_probability_of_bin(x: Tensor, apart: Tensor, log_variance: Tensor) -> Tensor:
    """log of the integral of N(x - apart, exp(log_variance)) over the bin around each x, in nats."""
    scale = (-log_variance / 2).exp()
    above, below = (torch.special.ndtr((apart + side) * scale) for side in (_HALF_BIN, -_HALF_BIN))
    above = torch.where(x > _LAST_BIN, 1.0, above)
    below = torch.where(x < -_LAST_BIN, 0.0, below)
    return (above - below).clamp(min=_LEAST_PROBABILITY).log()


class LearnedVarianceObjective(ABC):
    """mean w(t) (predicted - n)^2 + bound(v), over latents of the pool.

    t is drawn by `draw_timesteps` and w is that of `snr_weights`, uniform and 1 by default as in PixArt; the bound is
    `DiffusionProcess.variational_bound`. A share of the captions is replaced by the empty one, encoded as any other,
    for classifier-free guidance.
    """

    prompts: list[HeldOutPrompt] | None = None  # that the monitor draws; None: those of validation

    def __init__(
        self,
        module: nn.Module,
        vae: AutoencoderKL,
        encode: Encode,
        pool: Pool,
        stage: LearnedVarianceStage,
        streams: Streams,
        held_out: Pool | None = None,
    ) -> None:
        self.module, self.vae, self.encode = module, vae, encode
        self.pool, self.stage, self.streams, self.held_out = pool, stage, streams, held_out
        self.process, self.bins = DiffusionProcess(), bins_up_to(TRAIN_STEPS)

    @abstractmethod
    def predict(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, texts: Any) -> Tensor:
        """Noise and v [B, 2C, h, w], from what `Captions.gather` gives."""

    def loss(self, step: int) -> Tensor:
        stage, drawn = self.stage, self.pool.draw(step, self.stage.batch, self.stage.caption_dropout, self.streams)
        timesteps = draw_timesteps(
            stage.batch, TRAIN_STEPS, stage.timestep_power, stage.timestep_falloff, self.streams.torch(step)
        )[drawn.rows]
        noise = with_offset(drawn.noise, stage.noise_offset, self.streams, step)
        losses = self._losses(self.module, drawn.latents, drawn.texts, noise, timesteps)
        self.bins.update(timesteps, losses)
        return losses.mean()

    def loss_at(self, module: nn.Module, bucket: Bucket, items: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """See `DenoiserObjective`."""
        latents, texts = bucket.mean(items), first_texts(bucket, items)
        return self._losses(module, latents, texts, noise, (len(self.process.signal) * times).long())

    def _losses(self, module: nn.Module, latents: Tensor, texts: Any, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal = self.process.signal[timesteps]
        weights = snr_weights(signal.clamp(min=_LEAST_SIGNAL), self.stage.snr_gamma)
        noisy, told, texts, latents, noise, weights = sent_to(
            module, add_noise(latents, noise, signal), timesteps, texts, latents, noise, weights
        )
        output = self.predict(module, noisy, told, texts).float()
        error = (output.chunk(2, dim=1)[0] - noise).square().mean((1, 2, 3))  # [B]
        return error * weights + self.process.variational_bound(output, latents, noise, timesteps)  # [B]

    def draw(self, module: nn.Module, texts: Any, noise: Tensor) -> Tensor:
        """See `DenoiserObjective`."""
        noise, texts = sent_to(module, noise, texts)
        return sample(lambda noisy, time: self.predict(module, noisy, time, texts), noise)

    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        def draw(prompts: list[str], generator: torch.Generator) -> Tensor:
            captions, count = self.encode([*prompts, ""]), len(prompts)
            noise = torch.randn(count, *noise_shape(self.vae, self.stage.area), generator=generator)
            rows = torch.cat([torch.full((count,), count), torch.arange(count)])  # of the empty caption, of the prompts
            return self.draw(averaged, captions.gather(rows), noise)

        return judge_prompts(draw, self.vae, folder / f"{step:06d}.png", self.prompts)


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int = STEPS, guidance: float = GUIDANCE
) -> Tensor:
    """Latents [B, C, h, w] by DPM-Solver++, guided: `predict` takes the noisy latents and timesteps of 2B samples, of
    the empty captions first, and its last C channels are not used."""
    scheduler = DPMSolverMultistepScheduler()  # whose defaults are the process's
    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise
    for timestep in scheduler.timesteps:
        output = predict(torch.cat([latents, latents]), timestep.expand(2 * len(latents))).float()
        negative, positive = output.chunk(2, dim=1)[0].chunk(2)
        latents = scheduler.step(negative + guidance * (positive - negative), timestep, latents)[0]
    return latents
