"""What a stage minimises: an objective owns the module it trains and makes the loss of any step by its number."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_fast.data.shapes import caption, phrase, render, sample_training
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.chatglm_tokenizer import ChatGLMTokenizer
from kolors_fast.models.unet import KolorsUNet

from .config import AutoencoderStage, EpsilonStage, LanguageModelStage
from .monitor import encode, judge_prompts, judge_reconstructions
from .pool import LatentPool, pad_left
from .streams import Streams

LANGUAGES = ("en", "zh")
_VALIDATION = 2**31 - 1  # a batch that no step trains on


class Objective(Protocol):
    """A loss that depends on nothing but the weights and the step's number."""

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        ...

    def loss(self, step: int) -> Tensor:
        """The step's loss of this process, a scalar with a gradient."""
        ...

    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Look at the averaged weights: figures to log; pictures, if any, go to `folder`."""
        ...


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


class AutoencoderObjective:
    """mean |d| + 2 mean d^2 + kl_weight * KL per latent value, in nats, to the standard normal; d = decode(sample) - x.

    The squares matter at first: with |d| alone the decoder long draws the background and no objects.
    """

    def __init__(self, vae: AutoencoderKL, stage: AutoencoderStage, streams: Streams) -> None:
        self.module, self.stage, self.streams = vae, stage, streams

    def pictures(self, step: int) -> Tensor:
        """The step's batch, all of one size; larger pictures come in smaller batches, of about equal pixels."""
        sizes = self.stage.sizes
        height, width = sizes[int(self.streams.shared(step).integers(len(sizes)))]
        count = max(1, round(self.stage.batch * sizes[0][0] * sizes[0][1] / (height * width)))
        rng = self.streams.numpy(step)
        return to_tensor(np.stack([render(sample_training(rng)[0], height, width) for _ in range(count)]))

    def loss(self, step: int) -> Tensor:
        pictures = self.pictures(step)
        posterior = self.module.encode(pictures)[0]
        error = self.module.decode(posterior.sample(self.streams.torch(step)))[0].float() - pictures
        divergence = posterior.kl().sum() / posterior.mean.numel()
        return error.abs().mean() + 2 * error.square().mean() + self.stage.kl_weight * divergence

    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        assert isinstance(averaged, AutoencoderKL)
        return judge_reconstructions(averaged, folder / f"{step:06d}.png")


class LanguageModelObjective:
    """Cross-entropy of the next token over `[gMASK] sop caption eos`, or `... caption eos caption eos`.

    The second caption says the same in other words, and of the first it sees the last token only. To predict it, that
    token's states must carry all that the caption says: they are the pooled text that the UNet reads. The rest of the
    caption is plain causal language modelling.
    """

    def __init__(
        self, model: ChatGLM, tokenizer: ChatGLMTokenizer, stage: LanguageModelStage, streams: Streams
    ) -> None:
        self.module, self.tokenizer, self.stage, self.streams = model, tokenizer, stage, streams

    def tokens(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """ids, targets [B, S] and visible [B, 1, S, S], padded on the right.

        Targets are -100 where there is nothing to predict; `visible` says which keys each query sees.
        """
        rng = self.streams.numpy(step)
        rows = [self._row(rng) for _ in range(self.stage.batch)]
        width = max(map(len, rows)) - 1
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        targets = torch.full_like(ids, -100)
        visible = torch.ones(len(rows), 1, width, width, dtype=torch.bool).tril()
        prefix = len(self.tokenizer.prefix)
        for i, row in enumerate(rows):
            end = row.index(self.tokenizer.eos_token_id)
            visible[i, 0, end:, prefix : end - 1] = False
            ids[i, : len(row) - 1] = torch.tensor(row[:-1])
            targets[i, 1 : len(row) - 1] = torch.tensor(row[2:])  # sop after [gMASK] is not predicted
        return ids, targets, visible

    def _row(self, rng: np.random.Generator) -> list[int]:
        scene = sample_training(rng)[0]
        text, request = caption(scene, rng)
        row = [*self.tokenizer.encode(text), self.tokenizer.eos_token_id]
        if rng.random() < self.stage.pairs:
            again = phrase(request, rng, LANGUAGES[int(rng.integers(2))])
            row += [*self.tokenizer.encode(again)[len(self.tokenizer.prefix) :], self.tokenizer.eos_token_id]
        return row

    def loss(self, step: int) -> Tensor:
        ids, targets, visible = self.tokens(step)
        logits = self.module.logits(ids, visible=visible)  # pads on the right are seen by no token that counts
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        assert isinstance(averaged, ChatGLM)
        ids, targets, visible = self.tokens(_VALIDATION)
        logits = averaged.logits(ids, visible=visible).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        losses = losses.unflatten(0, targets.shape)
        # behind the first caption's end
        again = ((ids == self.tokenizer.eos_token_id).cumsum(1) > 0) & (targets != -100)
        return {
            "validation loss": float(losses[targets != -100].mean()),
            "loss of second captions": float(losses[again].mean()),
            "rms of states": self.rms_of_states(averaged),
        }

    @torch.no_grad()
    def rms_of_states(self, model: nn.Module, captions: int = 256) -> float:
        """Root mean square of what the UNet will read at the tokens of captions, the prefix left out."""
        assert isinstance(model, ChatGLM)
        rng = self.streams.numpy(_VALIDATION)
        texts = [sample_training(rng)[1] for _ in range(captions)]
        embeds, key_bias, _ = model.text_features_collapsed(*encode(self.tokenizer, texts))
        start = 1 + len(self.tokenizer.prefix)  # behind the pad and the prefix
        return float(embeds[:, start:][key_bias[:, start:] == 0].square().mean().sqrt())


class EpsilonObjective:
    """mean w(t) (unet(sqrt(A_t) x + sqrt(1 - A_t) n, t, text) - n)^2 over latents x of the pool (Ho et al. 2020).

    t is uniform over all training steps, A_t the schedule's alpha-bar, w that of `snr_weights`. A share of the captions
    is replaced by the empty one, for classifier-free guidance.
    """

    def __init__(
        self,
        unet: KolorsUNet,
        vae: AutoencoderKL,
        text_encoder: ChatGLM,
        tokenizer: ChatGLMTokenizer,
        pool: LatentPool,
        stage: EpsilonStage,
        streams: Streams,
    ) -> None:
        self.module, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.pool, self.stage, self.streams = pool, stage, streams
        self.alpha_bar = alpha_bar(stage.train_steps, stage.beta_end)  # [T]

    def loss(self, step: int) -> Tensor:
        rng, generator = self.streams.numpy(step), self.streams.torch(step)
        bucket, items = self.pool.batch(step, self.stage.batch)
        height, width = bucket.size
        latents = bucket.latents[items].float()  # [B, C, h, w]
        chosen = bucket.captions[items, rng.integers(self.stage.captions, size=len(items))]  # [B, tokens]
        chosen[torch.from_numpy(rng.random(len(items)) < self.stage.caption_dropout)] = self.pool.empty
        ids, mask = pad_left(chosen)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(len(self.alpha_bar), (len(items),), generator=generator)
        noisy = add_noise(latents, noise, self.alpha_bar[timesteps])
        predicted = self.predict(noisy, timesteps, ids, mask, height, width)
        error = (predicted.float() - noise).square().mean((1, 2, 3))  # [B]
        return (error * snr_weights(self.alpha_bar[timesteps], self.stage.snr_gamma)).mean()

    def predict(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, mask: Tensor, height: int, width: int) -> Tensor:
        """The UNet's prediction for latents of whole pictures of height x width pixels."""
        with torch.no_grad():
            embeds, key_bias, pooled = self.text_encoder.text_features_collapsed(ids, mask)
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
        added = {"text_embeds": pooled, "time_ids": sizes.expand(len(noisy), -1)}
        output = self.module(
            noisy, timesteps, embeds, added_cond_kwargs=added, encoder_key_bias=key_bias, return_dict=False
        )
        return output[0]

    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        assert isinstance(averaged, KolorsUNet)
        side = self.stage.area
        return judge_prompts(
            averaged,
            self.vae,
            self.text_encoder,
            self.tokenizer,
            folder / f"{step:06d}.png",
            size=(side, side),
            train_steps=self.stage.train_steps,
            beta_end=self.stage.beta_end,
        )


def alpha_bar(train_steps: int, beta_end: float, beta_start: float = 0.00085) -> Tensor:
    """Products of 1 - beta for the scaled-linear betas of SDXL (1000 steps, 0.012) and Kolors (1100, 0.014): [T]."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, train_steps, dtype=torch.float32)
    return torch.cumprod(1 - roots**2, dim=0)


def add_noise(latents: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """sqrt(A) x + sqrt(1 - A) n, with A = signal [B]."""
    signal = signal.reshape(-1, 1, 1, 1)
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def snr_weights(signal: Tensor, gamma: float) -> Tensor:
    """(min(SNR, gamma) + 1) / SNR, at most 50, with SNR = A / (1 - A); ones where gamma is 0.

    On the noise, that is the v-loss capped at low noise (min-SNR-gamma for v). With min(SNR, gamma) / SNR, an error in
    what is decided at high noise (background, colours, places) would cost next to nothing.
    """
    if gamma == 0:
        return torch.ones_like(signal)
    ratio = signal / (1 - signal)
    return ((ratio.clamp(max=gamma) + 1) / ratio).clamp(max=50)
