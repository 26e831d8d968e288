"""PixArt's training: a class-conditional DiT, which then, with new modulations, learns to read captions."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kolors_fast.data.shapes import HeldOutPrompt, caption, parse, phrase, sample_training
from kolors_fast.data.shapes.scene import COLOURS, SHAPES, Asked, Request
from kolors_fast.data.shapes.split import CATEGORIES, NEW_PAIRS
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.checkpoint import Config
from kolors_fast.models.pixart import PixArtTransformer
from kolors_fast.models.pixart_blocks import CaptionProjection
from kolors_fast.pipelines.pixart_text import ALPHA_TOKENS, read_pixart_prompts
from kolors_fast.pipelines.text_encoders import load_text_encoder, load_tokenizer, save_text_encoder
from kolors_fast.schedulers import DPMSolverMultistepScheduler

from .checkpoint import read_state, tensors, write_state
from .config import CaptionConditionalStage, ClassConditionalStage, PixArtRecipe, RecipeError, Stage
from .dit import DiT
from .learned_variance import LearnedVarianceObjective
from .objectives import Objective
from .session import Session, pretrained_folder

KINDS = tuple((shape, colour) for colour in COLOURS for shape in SHAPES)  # the DiT's classes
DIT = "dit.pt"
_AT_ONCE = 256
_FITTED_CAPTIONS = 8192


class PixArtSession(Session):
    """The text encoder and the autoencoder are taken as they are; the transformer starts from the DiT."""

    recipe: PixArtRecipe
    index: ClassVar = {
        "_class_name": "PixArtAlphaPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }

    def _prepare(self) -> None:
        DPMSolverMultistepScheduler().save_pretrained(self.folder / "scheduler")
        self._take(AutoencoderKL, "vae", self.recipe.vae)
        if not self._trained("text_encoder"):
            source = pretrained_folder(self.recipe.text_encoder["pretrained"])
            save_text_encoder(
                load_text_encoder(source.parent, source.name, "T5EncoderModel"), self.folder / "text_encoder"
            )
        self._once("tokenizer", partial(shutil.copytree, pretrained_folder(self.recipe.tokenizer["pretrained"])))

    def _objective(self, stage: Stage, folder: Path) -> Objective:
        vae, streams = self._frozen(AutoencoderKL, "vae"), self._streams(stage)
        if isinstance(stage, ClassConditionalStage):
            pool, held_out = self._pools(stage, folder, encode_kinds, Kinds)
            return ClassConditionalObjective(self._dit(), vae, encode_kinds, pool, stage, streams, held_out)
        assert isinstance(stage, CaptionConditionalStage)
        tokenizer = load_tokenizer(self.folder, "tokenizer", "T5Tokenizer")
        text_encoder = load_text_encoder(self.folder, "text_encoder", "T5EncoderModel").to(self.world.device)
        encode = partial(encode_captions, text_encoder, tokenizer)
        pool, held_out = self._pools(stage, folder, encode, T5Captions)
        transformer = self._transformer()
        if stage.linear_captions:
            assert transformer.caption_projection is not None
            rng = np.random.default_rng(self.recipe.seed)  # for every process the same
            texts = [caption(sample_training(rng)[0], rng)[0] for _ in range(_FITTED_CAPTIONS)]
            make_linear(transformer.caption_projection, encode(texts).states)
        return TextObjective(transformer, vae, encode, pool, stage, streams, held_out)

    def _keep(self, stage: Stage, objective: Objective, module: nn.Module) -> None:
        if isinstance(module, PixArtTransformer):
            module.save_pretrained(self.folder / "transformer")
        else:
            write_state(self.output / DIT, tensors(module))

    @cached_property
    def _config(self) -> Config:
        return PixArtTransformer.empty(self.recipe.transformer).config

    def _dit(self) -> DiT:
        config = self._config
        model = DiT(
            classes=len(KINDS),
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            depth=config.num_layers,
            channels=config.in_channels,
            patch_size=config.patch_size,
            sample_size=config.sample_size,
        )
        if (self.output / DIT).exists():
            model.load_state_dict(read_state(self.output / DIT))
        return model

    def _transformer(self) -> PixArtTransformer:
        if self._trained("transformer"):
            return PixArtTransformer.from_pretrained(self.folder, subfolder="transformer")
        if not (self.output / DIT).exists():
            raise RecipeError("stages: expected one of objective 'class_conditional' before 'learned_variance'")
        return PixArtTransformer.from_dit(
            self.output / DIT,
            caption_channels=self._config.caption_channels,
            sample_size=self._config.sample_size,
            num_attention_heads=self._config.num_attention_heads,
            generator=torch.Generator().manual_seed(self.recipe.seed),
        )


# ---- what is read


@dataclass(frozen=True)
class Kinds:
    """Labels of M captions of one object each."""

    labels: Tensor  # int64 [M]

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, which: Tensor) -> Tensor:
        return self.labels[which]


def encode_kinds(texts: list[str]) -> Kinds:
    """Which of KINDS each caption names; len(KINDS), none of them, for the empty one."""
    labels = []
    for text in texts:
        request = parse(text)
        labels.append(
            len(KINDS) if request is None else KINDS.index((request.objects[0].shape, request.objects[0].colour))
        )
    return Kinds(torch.tensor(labels))


@dataclass(frozen=True)
class T5Captions:
    """M captions. `states[starts[i] : starts[i + 1]]` are T5's states of the tokens of caption i, its end included."""

    states: Tensor  # [total, D] fp16
    starts: Tensor  # int64 [M + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def gather(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Captions `which` [B] as states fp32 [B, N, D] and mask int64 [B, N], N the longest's tokens."""
        start = self.starts[which]
        length = self.starts[which + 1] - start
        rank = torch.arange(int(length.max()))
        present = rank < length[:, None]
        states = self.states[torch.where(present, start[:, None] + rank, 0)].float()
        return states.masked_fill(~present[..., None], 0.0), present.long()


def encode_captions(text_encoder: Any, tokenizer: Any, texts: list[str]) -> T5Captions:
    """T5's states of captions, in full precision, as at inference; the empty one has the state of its end alone.

    Captions are not cleaned: cleaning takes Chinese out.
    """
    lengths = torch.tensor([len(ids) for ids in tokenizer([text.lower().strip() for text in texts])["input_ids"]])
    if (longest := int(lengths.max())) > ALPHA_TOKENS:
        raise ValueError(f"captions: expected at most {ALPHA_TOKENS} tokens, got {longest}")
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    states = torch.empty(int(starts[-1]), text_encoder.config.d_model, dtype=torch.float16)
    for some in lengths.argsort().split(_AT_ONCE):  # of about equal length
        with torch.autocast(text_encoder.device.type, enabled=False):
            features = read_pixart_prompts(
                tokenizer, text_encoder, [texts[i] for i in some], int(lengths[some].max()), clean_caption=False
            )
        present = features.prompt_attention_mask.bool()
        rows = (starts[some][:, None] + torch.arange(present.shape[1]))[present.cpu()]
        states[rows] = features.prompt_embeds[present].half().cpu()
    return T5Captions(states, starts)


@torch.no_grad()
def make_linear(projection: CaptionProjection, states: Tensor) -> None:
    """Replace the projection by its best linear fit over states [N, C], of a rank of half its width, and freeze it.

    gelu(z) - gelu(-z) = z, so its layers hold V z + b, z = W (x - mean), in pairs of hidden units. V and W are those of
    reduced-rank regression: least squares, and the main axes of what these predict (Izenman 1975).

    Why: T5 adds up what it says of a shape and of its colour, but a projection that is trained on few kinds of objects
    learns what is particular to each, and gives something else for a pair that no caption had: a "purple triangle" was
    drawn red. With only this layer's output replaced by the sum of a colour's and a shape's part it was drawn purple.
    """
    x = states.double()
    y = projection.double()(x)
    x_mean, y_mean = x.mean(0), y.mean(0)
    slope = torch.linalg.lstsq(x - x_mean, y - y_mean, driver="gelsd").solution  # [C, D]
    predicted = (x - x_mean) @ slope
    axes = torch.linalg.eigh(predicted.T @ predicted).eigenvectors  # [D, D], the main one last
    v = axes[:, -(len(axes) // 2) :]
    w = (slope @ v).T
    projection.linear_1.weight.copy_(torch.cat([w, -w]))
    projection.linear_1.bias.copy_(torch.cat([-w @ x_mean, w @ x_mean]))
    projection.linear_2.weight.copy_(torch.cat([v, -v], dim=1))
    projection.linear_2.bias.copy_(y_mean)
    projection.float().requires_grad_(False)


# ---- objectives


class ClassConditionalObjective(LearnedVarianceObjective):
    """Over a DiT and the kinds of lone objects."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        rng = np.random.default_rng(0)
        asked = [Request((Asked(*kind),)) for kind in KINDS if kind not in NEW_PAIRS]
        self.prompts = [HeldOutPrompt(phrase(one, rng, "en"), one, CATEGORIES[0], "en") for one in 2 * asked]

    def predict(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, texts: Tensor) -> Tensor:
        return module(noisy, timesteps, texts)


class TextObjective(LearnedVarianceObjective):
    """Over PixArt's transformer and captions read by T5.

    A dropped caption is T5's reading of the empty text, one token behind its mask, as at inference in diffusers'
    pipelines and in PixArt-Sigma; PixArt-alpha's own code puts a fixed random table in the caption's place.
    """

    def predict(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, texts: tuple[Tensor, Tensor]) -> Tensor:
        states, mask = texts
        return module(noisy, states, timesteps, encoder_attention_mask=mask, return_dict=False)[0]
