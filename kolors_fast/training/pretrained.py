"""Further training of a pipeline that is there: its denoiser, or an adapter for it, on features of real pictures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kolors_fast.assets import BUNDLED, bundled
from kolors_fast.models.checkpoint import PretrainedModel, read_json
from kolors_fast.pipelines.folder import load_components
from kolors_fast.pipelines.kolors import KolorsPipeline
from kolors_fast.pipelines.load import pipeline_class
from kolors_fast.pipelines.pixart import PixArtPipeline
from kolors_fast.pipelines.sd3 import SD3Pipeline

from .config import (
    CaptionConditionalStage,
    EpsilonStage,
    PoolStage,
    PretrainedRecipe,
    RecipeError,
    RectifiedFlowStage,
    Stage,
)
from .mmdit import RectifiedFlowObjective
from .monitor import decode, write_grid
from .objectives import DenoiserObjective, EpsilonObjective, Objective
from .parallel import World
from .pixart import TextObjective
from .pool import Pool
from .precompute import PipelineEncoder, open_features
from .session import Session
from .streams import Streams

STAGES: dict[type, type[PoolStage]] = {
    KolorsPipeline: EpsilonStage,
    SD3Pipeline: RectifiedFlowStage,
    PixArtPipeline: CaptionConditionalStage,
}


class PretrainedSession(Session):
    """The pipeline is copied to the output; a stage trains its denoiser and puts it there, or writes an adapter."""

    recipe: PretrainedRecipe

    def __init__(self, recipe: PretrainedRecipe, output: Path, world: World, accept_changes: bool = False) -> None:
        name = recipe.pretrained
        self.source = bundled(name) if name in BUNDLED else Path(name)
        if not (self.source / "model_index.json").is_file():
            known = ", ".join(BUNDLED)
            raise RecipeError(f"pretrained: expected a pipeline's folder or one of {known}, got '{name}'")
        self.kind = pipeline_class(self.source)
        self.index = read_json(self.source / "model_index.json")  # type: ignore[misc]  # each recipe has its own
        super().__init__(recipe, output, world, accept_changes)

    def _prepare(self) -> None:
        for part in sorted(self.source.iterdir()):
            if part.is_dir():
                self._once(part.name, partial(shutil.copytree, part, copy_function=_link))

    def _objective(self, stage: Stage, folder: Path) -> Objective:
        expected = next(kind for pipeline, kind in STAGES.items() if issubclass(self.kind, pipeline))
        if not isinstance(stage, expected):
            known = {kind: name for name, kind in PretrainedRecipe.objectives.items()}
            raise RecipeError(
                f"stage '{stage.name}': objective: expected '{known[expected]}' for a {self.kind.index_name}, "
                f"got '{stage.objective}'"
            )
        if not stage.features:
            raise RecipeError(f"stage '{stage.name}': features: expected one of 'kolors-fast precompute', got none")
        pool = open_features(stage.features, self.source, synthetic=stage.synthetic, seed=self.recipe.seed)
        name, no_part = self.kind.denoiser_name, {"scheduler": None}
        parts = {name: self.kind.parts[name]}
        denoiser = load_components(self.folder, parts, None, None, None, given=no_part).components[name]
        held_out = open_features(stage.validation, self.source) if stage.validation else None
        made = denoiser_objective(denoiser, pool, stage, self._streams(stage), held_out)
        return _Drawing(made, self.source, stage.prompts if self.world.is_main else (), self.world.device)

    def _keep(self, stage: Stage, objective: Objective, module: nn.Module) -> None:
        assert isinstance(module, PretrainedModel)
        module.save_pretrained(self.folder / self.kind.denoiser_name)


def denoiser_objective(
    denoiser: Any, pool: Pool, stage: PoolStage, streams: Streams, held_out: Pool | None = None
) -> DenoiserObjective:
    """A stage's objective over features, without what only the monitors of the shapes world need."""
    nothing: Any = None
    if isinstance(stage, EpsilonStage):
        return EpsilonObjective(denoiser, nothing, nothing, nothing, pool, stage, streams, held_out)
    if isinstance(stage, RectifiedFlowStage):
        return RectifiedFlowObjective(denoiser, nothing, nothing, pool, stage, streams, held_out)
    assert isinstance(stage, CaptionConditionalStage)
    return TextObjective(denoiser, nothing, nothing, pool, stage, streams, held_out)


class _Drawing:
    """An objective whose monitor draws the stage's prompts, each always from the same noise.

    They are encoded once, before the first step: text encoders need not be there while the denoiser is trained.
    """

    def __init__(
        self, objective: DenoiserObjective, source: Path, prompts: Sequence[str], device: torch.device
    ) -> None:
        self.objective, self.held_out, self.loss_at = objective, objective.held_out, objective.loss_at
        self.draw, self.bins, self.count = objective.draw, getattr(objective, "bins", None), len(prompts)
        if prompts:
            encoder = PipelineEncoder(source, torch.float16 if device.type == "cuda" else None, device=device)
            self.vae, self.captions = encoder.vae, encoder.encode_captions(["", *prompts])

    @property
    def module(self) -> nn.Module:
        return self.objective.module

    @property
    def streams(self) -> Streams:
        return self.objective.streams

    @streams.setter
    def streams(self, value: Streams) -> None:
        self.objective.streams = value

    def loss(self, step: int) -> Tensor:
        return self.objective.loss(step)

    @torch.no_grad()
    def monitor(self, averaged: Any, folder: Path, step: int) -> dict[str, float]:
        pictures, side = [], averaged.config.sample_size
        for number in range(self.count):
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(1, self.vae.config.latent_channels, side, side, generator=generator)
            latents = self.draw(averaged, self.captions.gather(torch.tensor([0, number + 1])), noise)
            with torch.autocast(latents.device.type, enabled=False):
                pictures.append(decode(self.vae, latents))
        if pictures:
            write_grid(np.concatenate(pictures), folder / f"{step:06d}.png")
        return {}


def _link(source: str, target: str) -> None:
    """No second copy of weights that are not trained; whoever writes anew writes beside and renames."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
