"""Kolors' training: autoencoder, language model, then the UNet on Kolors' noise schedules."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.chatglm_tokenizer import ChatGLMTokenizer
from kolors_fast.models.checkpoint import PretrainedModel
from kolors_fast.models.unet import KolorsUNet
from kolors_fast.schedulers import EulerDiscreteScheduler

from .config import AutoencoderStage, EpsilonStage, KolorsRecipe, LanguageModelStage, Stage
from .encoded import EncodedCaptions, encode_texts
from .initial import drop_head, fix_posterior, scale_residual_stream, zero_residual_branches
from .objectives import AutoencoderObjective, CaptionReader, EpsilonObjective, LanguageModelObjective, Objective
from .session import Session
from .streams import Streams
from .tokenizer import train_tokenizer


class KolorsSession(Session):
    """Every component is trained from nothing."""

    recipe: KolorsRecipe
    index: ClassVar = {
        "_class_name": "KolorsPipeline",
        "force_zeros_for_empty_prompt": False,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["kolors", "ChatGLMModel"],
        "tokenizer": ["kolors", "ChatGLMTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }

    @property
    def tokenizer(self) -> ChatGLMTokenizer:
        return ChatGLMTokenizer.from_pretrained(self.folder, subfolder="tokenizer")

    def _prepare(self) -> None:
        self._once("tokenizer", partial(train_tokenizer, self.recipe.tokenizer, self.recipe.seed))
        EulerDiscreteScheduler.from_config(self.recipe.scheduler).save_pretrained(self.folder / "scheduler")

    def _objective(self, stage: Stage, folder: Path) -> Objective:
        streams, tokenizer = self._streams(stage), self.tokenizer
        if isinstance(stage, AutoencoderStage):
            return AutoencoderObjective(AutoencoderKL(**self.recipe.vae), stage, streams)
        if isinstance(stage, LanguageModelStage):
            model = ChatGLM(**self.recipe.text_encoder, add_lm_head=True)
            if model.config.padded_vocab_size < tokenizer.vocab_size:
                raise ValueError(
                    f"text_encoder: padded_vocab_size: expected {tokenizer.vocab_size} or more, "
                    f"got {model.config.padded_vocab_size}"
                )
            return LanguageModelObjective(model, tokenizer, stage, streams)
        assert isinstance(stage, EpsilonStage)
        text_encoder = self._frozen(ChatGLM, "text_encoder")
        if self._trained("unet"):
            unet = KolorsUNet.from_pretrained(self.folder, subfolder="unet")
        else:
            unet = KolorsUNet(**self.recipe.unet)
            zero_residual_branches(unet)
        encode = partial(encode_texts, text_encoder, tokenizer)
        pool, held_out = self._pools(stage, folder, encode, EncodedCaptions)
        vae = self._frozen(AutoencoderKL, "vae")
        return EpsilonObjective(unet, vae, text_encoder, tokenizer, pool, stage, streams, held_out)

    def _keep(self, stage: Stage, objective: Objective, module: nn.Module) -> None:
        if isinstance(module, AutoencoderKL) and isinstance(objective, AutoencoderObjective):
            fix_posterior(module)
            measure_scale(module, objective.stage, Streams(self.recipe.seed, f"{stage.name} scale"))
        elif isinstance(module, CaptionReader) and isinstance(objective, LanguageModelObjective):
            module = module.model
            scale_residual_stream(module, 1 / objective.rms_of_states(module))
            drop_head(module)
        assert isinstance(module, PretrainedModel)
        name = {"autoencoder": "vae", "language_model": "text_encoder", "epsilon": "unet"}[stage.objective]
        module.save_pretrained(self.folder / name)


@torch.no_grad()
def measure_scale(vae: AutoencoderKL, stage: AutoencoderStage, streams: Streams) -> None:
    """Set the config's scaling_factor, so that scaled latents have unit variance."""
    objective = AutoencoderObjective(vae, stage, streams)
    values = [vae.encode(objective.pictures(i).to(vae.device))[0].mode().flatten() for i in range(16)]
    vae.register_config(scaling_factor=round(1 / float(torch.cat(values).std()), 5))
