"""Stable Diffusion 3's training: three text encoders, then the MM-DiT between them and a given autoencoder."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.mmdit import MMDiT
from kolors_fast.pipelines.sd3_text import SD3TextEncoders
from kolors_fast.pipelines.text_encoders import load_text_encoder, load_tokenizer, save_text_encoder
from kolors_fast.schedulers import FlowMatchEulerDiscreteScheduler

from .config import DenoiserStage, EpsilonLinearStage, RectifiedFlowStage, SD3Recipe, Stage, TextEncoderStage
from .initial import draw_mmdit
from .mmdit import EpsilonLinearObjective, RectifiedFlowObjective, SD3Captions, encode_captions
from .objectives import Objective
from .session import Session
from .text_encoders import ClipObjective, T5Objective, TextEncoderObjective, make_clip, make_t5
from .text_tokenizers import END, PAD_OF_BIGG, train_clip_tokenizer, train_t5_tokenizer

CLIP, T5 = "CLIPTextModelWithProjection", "T5EncoderModel"
ENCODERS = {"text_encoder": CLIP, "text_encoder_2": CLIP, "text_encoder_3": T5}
TOKENIZERS = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5TokenizerFast"}


class SD3Session(Session):
    """The autoencoder is taken from elsewhere; all else is trained from nothing."""

    recipe: SD3Recipe
    index: ClassVar = {
        "_class_name": "StableDiffusion3Pipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{name: ["transformers", kind] for name, kind in (ENCODERS | TOKENIZERS).items()},
    }

    def _prepare(self) -> None:
        recipe = self.recipe
        for name, pad in (("tokenizer", END), ("tokenizer_2", PAD_OF_BIGG)):
            self._once(name, partial(train_clip_tokenizer, recipe.tokenizer, recipe.seed, pad=pad))
        self._once("tokenizer_3", partial(train_t5_tokenizer, recipe.tokenizer_3, recipe.seed))
        self._take(AutoencoderKL, "vae", recipe.vae)
        FlowMatchEulerDiscreteScheduler.from_config(recipe.scheduler).save_pretrained(self.folder / "scheduler")

    def _objective(self, stage: Stage, folder: Path) -> Objective:
        streams = self._streams(stage)
        if isinstance(stage, TextEncoderStage):
            tokenizer = self._tokenizer(stage.component.replace("text_encoder", "tokenizer"))
            config = getattr(self.recipe, stage.component)
            if stage.objective == "clip":
                return ClipObjective(make_clip(tokenizer, config), tokenizer, stage, streams)
            return T5Objective(make_t5(tokenizer, config), tokenizer, stage, streams)
        assert isinstance(stage, DenoiserStage)
        if self._trained("transformer"):
            mmdit = MMDiT.from_pretrained(self.folder, subfolder="transformer")
        else:
            mmdit = MMDiT(**self.recipe.transformer)
            draw_mmdit(mmdit)
        pool, held_out = self._pools(stage, folder, partial(encode_captions, self.encoders), SD3Captions)
        parts = mmdit, self._frozen(AutoencoderKL, "vae"), self.encoders, pool
        if isinstance(stage, RectifiedFlowStage):
            return RectifiedFlowObjective(*parts, stage, streams, held_out)
        assert isinstance(stage, EpsilonLinearStage)
        return EpsilonLinearObjective(*parts, stage, streams, held_out)

    def _keep(self, stage: Stage, objective: Objective, module: nn.Module) -> None:
        if isinstance(objective, TextEncoderObjective) and isinstance(stage, TextEncoderStage):
            objective.finish(module.model)
            save_text_encoder(module.model, self.folder / stage.component)
        else:
            assert isinstance(module, MMDiT)
            module.save_pretrained(self.folder / "transformer")

    @cached_property
    def encoders(self) -> SD3TextEncoders:
        """The text encoders with their tokenizers, trained."""
        return load_encoders(self.folder, self.recipe, self.world.device)

    def _tokenizer(self, name: str) -> Any:
        return load_tokenizer(self.folder, name, TOKENIZERS[name])


def load_encoders(folder: Path, recipe: SD3Recipe, device: torch.device | str = "cpu") -> SD3TextEncoders:
    """The text encoders of a pipeline folder with their tokenizers, frozen, for the recipe's denoiser."""
    parts: dict[str, Any] = {name: load_tokenizer(folder, name, kind) for name, kind in TOKENIZERS.items()}
    for name, kind in ENCODERS.items():
        parts[name] = load_text_encoder(folder, name, kind).requires_grad_(False).to(device)
    widths = recipe.transformer["joint_attention_dim"], recipe.transformer["pooled_projection_dim"]
    return SD3TextEncoders(*widths, **parts)
