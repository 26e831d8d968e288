"""What a stage minimises: an objective owns the module it trains and makes the loss of any step by its number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kolors_fast.data.shapes import caption, render, sample_training
from kolors_fast.data.shapes.scene import REQUEST_PARTS, Request, request_parts
from kolors_fast.data.shapes.split import CATEGORIES
from kolors_fast.evaluation.statistics import TimestepBins
from kolors_fast.evaluation.validation_loss import StratifiedLoss, normal, stratified_loss
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.chatglm_tokenizer import ChatGLMTokenizer
from kolors_fast.models.unet import KolorsUNet

from .config import AutoencoderStage, EpsilonStage, LanguageModelStage
from .devices import sent_to
from .monitor import encode, judge_prompts, judge_reconstructions, noise_shape, sample, validation_prompts
from .pool import Bucket, Pool
from .streams import Streams

Texts = tuple[Tensor, Tensor, Tensor]  # of Kolors' UNet: states, key bias and pooled state

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}  # of a stage, and of a scheduler
_VALIDATION = 2**31 - 1  # a batch that no step trains on


class Objective(Protocol):
    """A loss that depends on nothing but the weights and the step's number.

    Of a denoiser, `bins` gathers losses by timestep, to be logged, and `held_out`, where there is one, is a pool that
    the trainer validates it on: see `DenoiserObjective`.
    """

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        ...

    def loss(self, step: int) -> Tensor:
        """The step's loss of this process, a scalar with a gradient."""
        ...

    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Look at the averaged weights: figures to log; pictures, if any, go to `folder`. The main process does."""
        ...


class DenoiserObjective(Objective, Protocol):
    """An objective over latents of a pool, of which there is a loss at every time."""

    held_out: Pool | None
    streams: Streams  # whose rows of a batch it sees

    def loss_at(self, module: nn.Module, bucket: Bucket, items: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """What `loss` is the mean of, [B], for items [B] of a bucket with their first captions.

        Args:
            times: [B] in (0, 1), from the picture to the noise.
            noise: [B, C, h, w].
        """
        ...

    def draw(self, module: nn.Module, texts: Any, noise: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] of pictures, guided, from noise of that shape. `texts` is what `Captions.gather`
        gives of 2B captions, the empty ones first."""
        ...


def validation_loss(
    objective: DenoiserObjective,
    module: nn.Module,
    pool: Pool,
    *,
    batch: int,
    count: int = 8,
    seed: int = 0,
    rank: int = 0,
    size: int = 1,
) -> StratifiedLoss:
    """`stratified_loss` of a module over a pool that it was not trained on, at `count` times.

    Args:
        batch: samples at once.
        rank, size: of several workers, which all call this, each with the whole module.
    """
    starts = np.cumsum([0, *(len(bucket) for bucket in pool.buckets)])  # items are counted through the buckets

    def batches() -> Iterator[Tensor]:
        for start, end in pairwise(starts.tolist()):
            yield from torch.arange(start, end).split(batch)

    def loss_at(items: Tensor, times: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        number = int(np.searchsorted(starts, int(items[0]), side="right")) - 1
        bucket = pool.buckets[number]
        noise = normal((len(items), *bucket.shape), generators)
        return objective.loss_at(module, bucket, items - int(starts[number]), times, noise)

    mine = islice(batches(), rank, None, size)
    return stratified_loss(loss_at, mine, count=count, seed=seed, over_workers=size > 1)


def first_texts(bucket: Bucket, items: Tensor) -> Any:
    """What the denoiser reads of the first caption of each item [B]."""
    return bucket.texts(items, torch.zeros_like(items), torch.zeros_like(items, dtype=torch.bool))


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


class AutoencoderObjective:
    """mean |d| + 2 mean d^2 + moment_weight M + colour_weight mean (z_rgb - c)^2, with d = decode(z + s n) - x.

    z is the posterior's mean, n normal noise, and s is drawn from U(0, noise) for each picture: latents that bear noise
    are easy to denoise (Yang et al. 2025, "Latent Denoising Makes Good Visual Tokenizers"). M keeps the channels
    uncorrelated and of unit variance, without which noise would have no size. c are the mean colours of the pixels
    behind a latent, whitened; the first three channels are drawn to them. Left alone, this autoencoder put all
    colours on one line, green 0.3 from blue and 6 from yellow, and a UNet, whose loss is a distance between latents,
    painted blue-green objects.
    The squares matter at first: with |d| alone the decoder long draws the background and no objects.
    """

    def __init__(self, vae: AutoencoderKL, stage: AutoencoderStage, streams: Streams) -> None:
        self.module, self.stage, self.streams = vae, stage, streams
        if vae.config.latent_channels < 3:
            raise ValueError(f"latent_channels: expected 3 or more, got {vae.config.latent_channels}")
        self.side = 2 ** (len(vae.config.block_out_channels) - 1)  # of the pixels behind a latent
        whole = replace(streams, rank=0, size=1)  # all processes draw to the same colours
        batches = (self.pictures(_VALIDATION - k, whole) for k in range(32))
        colours = torch.cat([mean_colours(pictures, self.side).flatten(0, 2) for pictures in batches])
        self.centre, self.whitening = colours.mean(0), whitening(torch.cov(colours.T))  # [3], [3, 3]

    def pictures(self, step: int, streams: Streams | None = None) -> Tensor:
        """This process's part of the step's batch, all of one size; larger pictures come in smaller batches, of about
        equal pixels."""
        sizes, streams = self.stage.sizes, streams or self.streams
        height, width = sizes[int(streams.choice(step).integers(len(sizes)))]
        pixels = self.stage.batch * sizes[0][0] * sizes[0][1]
        count = streams.size * max(1, round(pixels / (height * width * streams.size)))
        rng = streams.numpy(step)
        scenes = [sample_training(rng)[0] for _ in range(count)]
        return to_tensor(np.stack([render(scene, height, width) for scene in scenes[streams.share(count)]]))

    def loss(self, step: int) -> Tensor:
        (pictures,), generator = sent_to(self.module, self.pictures(step)), self.streams.torch(step)
        latents = self.module.encode(pictures)[0].mean.float()  # [B, 4, h, w]
        count = len(latents) * self.streams.size
        size = self.stage.noise * torch.rand(count, 1, 1, 1, generator=generator)[self.streams.share(count)]
        noise = size * self.streams.noise(step, count, latents.shape[1:])
        noise, centre, whiten = sent_to(self.module, noise, self.centre, self.whitening)
        error = self.module.decode(latents + noise)[0].float() - pictures
        cells = latents.permute(0, 2, 3, 1)  # [B, h, w, 4]
        colours = (mean_colours(pictures, self.side) - centre) @ whiten
        return (
            error.abs().mean()
            + 2 * error.square().mean()
            + self.stage.moment_weight * moments_from_normal(cells.flatten(0, 2))
            + self.stage.colour_weight * (cells[..., :3] - colours).square().mean()
        )

    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        assert isinstance(averaged, AutoencoderKL)
        return judge_reconstructions(averaged, folder / f"{step:06d}.png", self.stage.sizes[0])


def mean_colours(pictures: Tensor, side: int) -> Tensor:
    """[B, 3, H, W] -> [B, H / side, W / side, 3], the means over squares."""
    return F.avg_pool2d(pictures, side).permute(0, 2, 3, 1)


def whitening(covariance: Tensor) -> Tensor:
    """The symmetric W with W covariance W = 1."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T


def moments_from_normal(samples: Tensor) -> Tensor:
    """How far the moments of samples [N, C] are from those of N(0, 1): zero where they agree.

    The mean over channels of KL(N(mean, variance) to N(0, 1)), plus the mean square of covariance between channels.
    """
    covariance = torch.cov(samples.T)
    variance = covariance.diagonal()
    divergence = (variance + samples.mean(0).square() - 1 - variance.log()) / 2
    return divergence.mean() + (covariance - variance.diag()).square().mean()


class CaptionReader(nn.Module):
    """A language model, with one linear layer that reads a request off the final state of a caption's last token."""

    def __init__(self, model: ChatGLM) -> None:
        super().__init__()
        self.model = model
        self.parts = nn.Linear(model.config.hidden_size, sum(map(len, REQUEST_PARTS)))
        nn.init.normal_(self.parts.weight, std=0.02)

    def forward(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ids [B, S], padded on the right, and lengths [B] -> next-token logits [B, S, V], [B, n] for each part."""
        hidden = self.model(ids, output_hidden_states=False).last_hidden_state.transpose(0, 1)  # [B, S, D]
        last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        assert self.model.output_layer is not None
        return self.model.output_layer(hidden), self.parts(last).split([len(part) for part in REQUEST_PARTS], dim=1)


class LanguageModelObjective:
    """Cross-entropy of the next token over `[gMASK] sop caption eos`, and of what the caption asks for.

    A small language model has no need to sum up a caption at its end, and the UNet's pooled text is the state of the
    last token. So a linear layer must read every part of the request (colours, shapes, places...) off that state.
    """

    def __init__(
        self, model: ChatGLM, tokenizer: ChatGLMTokenizer, stage: LanguageModelStage, streams: Streams
    ) -> None:
        self.module = CaptionReader(model)
        self.tokenizer, self.stage, self.streams = tokenizer, stage, streams

    def captions(self, step: int) -> list[tuple[str, Request]]:
        """The step's captions, and what each asserts."""
        rng = self.streams.numpy(step)
        drawn = [caption(sample_training(rng)[0], rng) for _ in range(self.stage.batch)]
        return drawn[self.streams.share(len(drawn))]

    def tensors(self, captions: list[tuple[str, Request]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids and next tokens [B, S], padded on the right with 0 and -100, lengths [B] and parts [B, P]."""
        rows = [torch.tensor(self.tokenizer.encode(text)) for text, _ in captions]
        parts = torch.tensor([request_parts(request) for _, request in captions])
        ids = pad_sequence(rows, batch_first=True)
        eos = torch.tensor([self.tokenizer.eos_token_id])
        following = [torch.cat([row[1:], eos]) for row in rows]
        targets = pad_sequence(following, batch_first=True, padding_value=-100)
        targets[:, 0] = -100  # sop is not predicted
        return ids, targets, torch.tensor([len(row) for row in rows]), parts

    def loss(self, step: int) -> Tensor:
        ids, targets, lengths, parts = sent_to(self.module, *self.tensors(self.captions(step)))
        logits, of_parts = self.module(ids, lengths)
        reading = sum(F.cross_entropy(one.float(), parts[:, k]) for k, one in enumerate(of_parts))
        return next_token_loss(logits, targets) + self.stage.reading_weight * reading

    @torch.no_grad()
    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """The next-token loss on captions like those trained on, and how many held-out ones are read right."""
        assert isinstance(averaged, CaptionReader)
        ids, targets, lengths, _ = sent_to(averaged, *self.tensors(self.captions(_VALIDATION)))
        figures = {"validation loss": float(next_token_loss(averaged(ids, lengths)[0], targets))}
        prompts = validation_prompts(200)
        ids, _, lengths, parts = sent_to(averaged, *self.tensors([(one.prompt, one.request) for one in prompts]))
        read = torch.stack([one.argmax(1) for one in averaged(ids, lengths)[1]], dim=1)
        right = (read == parts).all(1).tolist()
        for category in CATEGORIES:
            chosen = [ok for ok, one in zip(right, prompts, strict=True) if one.category == category]
            figures[f"{category} read right"] = float(np.mean(chosen))
        return figures | {"rms of states": self.rms_of_states(averaged.model)}

    @torch.no_grad()
    def rms_of_states(self, model: ChatGLM, captions: int = 256) -> float:
        """Root mean square of what the UNet will read at the tokens of captions, the prefix left out."""
        rng = self.streams.numpy(_VALIDATION)
        texts = [sample_training(rng)[1] for _ in range(captions)]
        ids, mask = sent_to(model, *encode(self.tokenizer, texts))
        embeds, key_bias, _ = model.text_features_collapsed(ids, mask)
        start = 1 + len(self.tokenizer.prefix)  # behind the pad and the prefix
        return float(embeds[:, start:][key_bias[:, start:] == 0].square().mean().sqrt())


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)


class EpsilonObjective:
    """mean w(t) (unet(sqrt(A_t) x + sqrt(1 - A_t) n, t, text) - n)^2 over latents x of the pool (Ho et al. 2020).

    Of a stage whose prediction is "v" the target is v = sqrt(A_t) n - sqrt(1 - A_t) x (Salimans and Ho 2022). Its error
    is the noise's over sqrt(A_t), and with min-SNR weights the loss of one and the same picture stays the same.

    t is drawn by `draw_timesteps`, A_t is the schedule's alpha-bar, w that of `snr_weights`. A share of the captions is
    replaced by the empty one, for classifier-free guidance.
    """

    def __init__(
        self,
        unet: KolorsUNet,
        vae: AutoencoderKL,
        text_encoder: ChatGLM,
        tokenizer: ChatGLMTokenizer,
        pool: Pool,
        stage: EpsilonStage,
        streams: Streams,
        held_out: Pool | None = None,
    ) -> None:
        self.module, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.pool, self.stage, self.streams, self.held_out = pool, stage, streams, held_out
        self.alpha_bar = alpha_bar(stage.train_steps, stage.beta_end)  # [T]
        self.bins = bins_up_to(stage.train_steps)

    def loss(self, step: int) -> Tensor:
        stage, drawn = self.stage, self.pool.draw(step, self.stage.batch, self.stage.caption_dropout, self.streams)
        timesteps = draw_timesteps(
            stage.batch, len(self.alpha_bar), stage.timestep_power, stage.timestep_falloff, self.streams.torch(step)
        )[drawn.rows]
        noise = with_offset(drawn.noise, stage.noise_offset, self.streams, step)
        losses = self._losses(self.module, drawn.latents, drawn.texts, drawn.time_ids, noise, timesteps)
        self.bins.update(timesteps, losses)
        return losses.mean()

    def loss_at(self, module: nn.Module, bucket: Bucket, items: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """See `DenoiserObjective`."""
        latents, texts, timesteps = bucket.mean(items), first_texts(bucket, items), len(self.alpha_bar) * times
        return self._losses(module, latents, texts, bucket.time_ids(items), noise, timesteps.long())

    def _losses(
        self, module: nn.Module, latents: Tensor, texts: Texts, time_ids: Tensor, noise: Tensor, timesteps: Tensor
    ) -> Tensor:
        signal, velocity = self.alpha_bar[timesteps], self.stage.prediction == "v"
        noisy, target = add_noise(latents, noise, signal), add_noise(noise, -latents, signal) if velocity else noise
        weights = snr_weights(signal, self.stage.snr_gamma)
        weights = weights * signal if velocity and self.stage.snr_gamma else weights
        noisy, timesteps, texts, time_ids, target, weights = sent_to(
            module, noisy, timesteps, texts, time_ids, target, weights
        )
        predicted = self.predict(module, noisy, timesteps, texts, time_ids).float()
        return (predicted - target).square().mean((1, 2, 3)) * weights  # [B]

    def predict(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, texts: Texts, time_ids: Tensor) -> Tensor:
        """The UNet's prediction; time_ids [B, 6] are those of `FeatureBatch`."""
        embeds, key_bias, pooled = texts
        added = {"text_embeds": pooled, "time_ids": time_ids}
        output: Tensor = module(
            noisy, timesteps, embeds, added_cond_kwargs=added, encoder_key_bias=key_bias, return_dict=False
        )[0]
        return output

    def draw(self, module: nn.Module, texts: Texts, noise: Tensor) -> Tensor:
        """See `DenoiserObjective`."""
        assert isinstance(module, KolorsUNet)
        prediction, schedule = PREDICTION_TYPES[self.stage.prediction], (self.stage.train_steps, self.stage.beta_end)
        return sample(module, texts, noise, train_steps=schedule[0], beta_end=schedule[1], prediction=prediction)

    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        @torch.no_grad()
        def draw(prompts: list[str], generator: torch.Generator) -> Tensor:
            asked = encode(self.tokenizer, [""] * len(prompts) + prompts)
            texts = self.text_encoder.text_features_collapsed(*sent_to(self.text_encoder, *asked))
            noise = torch.randn(len(prompts), *noise_shape(self.vae, self.stage.area), generator=generator)
            return self.draw(averaged, texts, noise)

        return judge_prompts(draw, self.vae, folder / f"{step:06d}.png")


def bins_up_to(last: float) -> TimestepBins:
    """Eight bins of timesteps, for the losses that are logged."""
    return TimestepBins([last * i / 8 for i in range(9)])


def with_offset(noise: Tensor, offset: float, streams: Streams, step: int) -> Tensor:
    """noise + offset * one normal number for each picture and channel: what lets a model change mean colours
    (Guttenberg, "Diffusion with offset noise", 2023)."""
    if offset == 0:
        return noise
    return noise + offset * streams.noise(step, len(noise) * streams.size, (noise.shape[1], 1, 1), 2)


def draw_timesteps(count: int, train_steps: int, power: float, falloff: float, generator: torch.Generator) -> Tensor:
    """int64 [count] in [0, T), with P(t < x) = 1 - (1 - (x / T)^power)^falloff, by inversion (Kumaraswamy 1980).

    Uniform for 1 and 1; a power above 1 draws more of the high noise, a falloff above 1 less of the highest.
    """
    uniform = torch.rand(count, generator=generator)
    drawn = train_steps * (1 - (1 - uniform) ** (1 / falloff)) ** (1 / power)
    return drawn.long().clamp(max=train_steps - 1)  # the power may round up to 1


def alpha_bar(train_steps: int, beta_end: float, beta_start: float = 0.00085) -> Tensor:
    """Products of 1 - beta for the scaled-linear betas of SDXL (1000 steps, 0.012) and Kolors (1100, 0.014): [T]."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, train_steps, dtype=torch.float32)
    return torch.cumprod(1 - roots**2, dim=0)


def add_noise(latents: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """sqrt(A) x + sqrt(1 - A) n, with A = signal [B]."""
    signal = signal.reshape(-1, 1, 1, 1)
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def snr_weights(signal: Tensor, gamma: float) -> Tensor:
    """(min(SNR, gamma) + 1) / SNR with SNR = A / (1 - A); ones where gamma is 0.

    On the noise, that is the v-loss capped at low noise (min-SNR-gamma for v): an error of e in the predicted picture
    costs (min(SNR, gamma) + 1) e^2. With min(SNR, gamma) / SNR, or with a cap on the weights, an error in what is
    decided at high noise (background, places, colours) would cost next to nothing, and the text would go unread there.
    """
    if gamma == 0:
        return torch.ones_like(signal)
    ratio = signal / (1 - signal)
    return (ratio.clamp(max=gamma) + 1) / ratio
