"""What the MM-DiT's training minimises: the velocity of a rectified flow, or, to compare, the noise of a diffusion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from kolors_fast.evaluation.statistics import TimestepBins
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.mmdit import MMDiT
from kolors_fast.pipelines.sd3_text import SD3TextEncoders, SD3TextParts, read_sd3_parts, without_encoders
from kolors_fast.schedulers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from kolors_fast.schedulers.rectified_flow import interpolate, parse_density, shift_timestep, velocity_target

from .config import DenoiserStage, EpsilonLinearStage, RectifiedFlowStage
from .devices import sent_to
from .monitor import GUIDANCE, judge_prompts, noise_shape
from .objectives import add_noise, alpha_bar, bins_up_to, first_texts
from .pool import Bucket, Pool
from .streams import Streams

STEPS = 25  # of what is drawn to be judged
TRAIN_STEPS = 1000  # timesteps that the model is told go up to here
_AT_ONCE = 256

Sampler = FlowMatchEulerDiscreteScheduler | DDIMScheduler


@dataclass(frozen=True)
class SD3Captions(SD3TextParts):
    """M captions, the three encoders' outputs apart, fp16."""

    def gather(self, which: Tensor) -> SD3TextParts:
        """Captions `which` [B], fp32."""
        return SD3TextParts(*(getattr(self, part.name)[which].float() for part in fields(self)))


def encode_parts(encoders: SD3TextEncoders, texts: Sequence[str]) -> SD3TextParts:
    """What the encoders say of texts, T5's padded to its tokenizer's length; in full precision, as at inference."""
    with torch.autocast("cpu", enabled=False):
        return read_sd3_parts(encoders, [list(texts)] * 3, encoders.tokenizer_3.model_max_length)


def encode_captions(encoders: SD3TextEncoders, texts: Sequence[str]) -> SD3Captions:
    """As `encode_parts`, of many texts, as they are kept."""
    parts = [encode_parts(encoders, texts[i : i + _AT_ONCE]) for i in range(0, len(texts), _AT_ONCE)]
    with torch.autocast("cpu", enabled=False):  # which cannot concat halves
        return SD3Captions(*(torch.cat([getattr(p, f.name).half().cpu() for p in parts]) for f in fields(SD3Captions)))


class MMDiTObjective(ABC):
    """mean (mmdit(z_t, t, text) - target)^2 over latents of the pool; a subclass says how z_t and target are made.

    A share of the captions is replaced by the empty one, whose prediction is the negative one of classifier-free
    guidance in this library and in diffusers. Beyond that, each encoder's output is zero for a share of the captions,
    by a draw of its own (Esser et al. 2024, appendix B.3): a model so trained can do without some of them.
    """

    def __init__(
        self,
        mmdit: MMDiT,
        vae: AutoencoderKL,
        encoders: SD3TextEncoders,
        pool: Pool,
        stage: DenoiserStage,
        streams: Streams,
        held_out: Pool | None = None,
    ) -> None:
        self.module, self.vae, self.encoders = mmdit, vae, encoders
        self.pool, self.stage, self.streams, self.held_out = pool, stage, streams, held_out

    bins: TimestepBins

    @abstractmethod
    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps [count] to train at."""

    @abstractmethod
    def timesteps_at(self, times: Tensor) -> Tensor:
        """Timesteps at times [B] in (0, 1)."""

    @abstractmethod
    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and noise [B, C, h, w] -> z_t, the timesteps [B] told to the model, and the target."""

    @abstractmethod
    def sampler(self) -> Sampler:
        """What draws with a model trained so."""

    def loss(self, step: int) -> Tensor:
        batch, generator = self.stage.batch, self.streams.torch(step)
        drawn = self.pool.draw(step, self.stage.batch, self.stage.caption_dropout, self.streams)
        drops = torch.rand(3, batch, generator=generator) < self.stage.encoder_dropout
        parts = without_encoders(drawn.texts, drops[:, drawn.rows])
        timesteps = self.draw_timesteps(batch, generator)[drawn.rows]
        squares = self._squares(self.module, drawn.latents, parts, drawn.noise, timesteps)
        self.bins.update(timesteps, squares.mean((1, 2, 3)))
        return squares.mean()

    def loss_at(self, module: nn.Module, bucket: Bucket, items: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """See `DenoiserObjective`."""
        latents, parts = bucket.mean(items), first_texts(bucket, items)
        return self._squares(module, latents, parts, noise, self.timesteps_at(times)).mean((1, 2, 3))

    def _squares(
        self, module: nn.Module, latents: Tensor, parts: SD3TextParts, noise: Tensor, timesteps: Tensor
    ) -> Tensor:
        noisy, told, target, parts = sent_to(module, *self.corrupt(latents, noise, timesteps), parts)
        text = parts.join()
        predicted = module(noisy, text.prompt_embeds, text.pooled_prompt_embeds, told, return_dict=False)[0]
        squares: Tensor = (predicted.float() - target).square()
        return squares

    def draw(self, module: nn.Module, texts: SD3TextParts, noise: Tensor) -> Tensor:
        """See `DenoiserObjective`."""
        assert isinstance(module, MMDiT)
        return sample(module, self.sampler(), texts, noise)

    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        def draw(prompts: list[str], generator: torch.Generator) -> Tensor:
            texts = encode_parts(self.encoders, [""] * len(prompts) + prompts)
            noise = torch.randn(len(prompts), *noise_shape(self.vae, self.stage.area), generator=generator)
            return self.draw(averaged, texts, noise)

        return judge_prompts(draw, self.vae, folder / f"{step:06d}.png")


class RectifiedFlowObjective(MMDiTObjective):
    """z_t = (1 - t) x + t n, target n - x, t of the stage's density, shifted for the resolution; told is 1000 t."""

    def __init__(
        self,
        mmdit: MMDiT,
        vae: AutoencoderKL,
        encoders: SD3TextEncoders,
        pool: Pool,
        stage: RectifiedFlowStage,
        streams: Streams,
        held_out: Pool | None = None,
    ) -> None:
        super().__init__(mmdit, vae, encoders, pool, stage, streams, held_out)
        self.density, self.shift, self.bins = parse_density(stage.density), stage.shift, bins_up_to(1)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        return shift_timestep(self.density.sample((count,), generator), self.shift)

    def timesteps_at(self, times: Tensor) -> Tensor:
        return times

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return interpolate(latents, noise, timesteps), TRAIN_STEPS * timesteps, velocity_target(latents, noise)

    def sampler(self) -> Sampler:
        return FlowMatchEulerDiscreteScheduler(shift=self.shift)


class EpsilonLinearObjective(MMDiTObjective):
    """z_t = sqrt(A_t) x + sqrt(1 - A_t) n, target n, t uniform over the 1000 steps of latent diffusion's schedule.

    "eps/linear" of Esser et al. 2024: sqrt(beta) is linear from sqrt(0.00085) to sqrt(0.012); drawn by DDIM.
    """

    def __init__(
        self,
        mmdit: MMDiT,
        vae: AutoencoderKL,
        encoders: SD3TextEncoders,
        pool: Pool,
        stage: EpsilonLinearStage,
        streams: Streams,
        held_out: Pool | None = None,
    ) -> None:
        super().__init__(mmdit, vae, encoders, pool, stage, streams, held_out)
        self.alpha_bar, self.bins = alpha_bar(TRAIN_STEPS, beta_end=0.012), bins_up_to(TRAIN_STEPS)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(TRAIN_STEPS, (count,), generator=generator)

    def timesteps_at(self, times: Tensor) -> Tensor:
        return (TRAIN_STEPS * times).long()

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return add_noise(latents, noise, self.alpha_bar[timesteps]), timesteps, noise

    def sampler(self) -> Sampler:
        return DDIMScheduler(
            num_train_timesteps=TRAIN_STEPS,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="trailing",  # from pure noise
            clip_sample=False,
            set_alpha_to_one=True,
        )


@torch.no_grad()
def sample(
    mmdit: MMDiT,
    scheduler: Sampler,
    texts: SD3TextParts,
    noise: Tensor,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Scaled latents [B, C, h, w] from noise of that shape, guided: `texts` are 2B captions', the empty ones' first."""
    latents, texts = sent_to(mmdit, noise, texts)
    text = texts.join()
    scheduler.set_timesteps(steps, device=latents.device)
    for timestep in scheduler.timesteps:
        both = torch.cat([latents, latents])
        told = timestep.float().expand(len(both))
        predicted = mmdit(both, text.prompt_embeds, text.pooled_prompt_embeds, told, return_dict=False)[0]
        negative, positive = predicted.float().chunk(2)
        latents = scheduler.step(negative + guidance * (positive - negative), timestep, latents)[0]
    return latents
