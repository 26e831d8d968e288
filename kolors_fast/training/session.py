"""What every system's training shares: stages in order, and a pipeline folder that grows as they finish."""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from kolors_fast.assets import BUNDLED, bundled
from kolors_fast.data.features import FeatureDataset
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.checkpoint import PretrainedModel, write_file
from kolors_fast.models.lora_adapter import save_lora

from .config import PoolStage, Recipe, RecipeError, Stage
from .lora import add_lora, narrow_frozen
from .objectives import Objective
from .parallel import World
from .pool import Captions, Encode, Pool, build_pool
from .streams import Streams
from .trainer import AUTOCAST, Trainer, computing_in

VALIDATION_SCENES = 64

ModelT = TypeVar("ModelT", bound=PretrainedModel)


class Session(ABC):
    """The models of one recipe, as far as they are trained, kept as a pipeline folder in diffusers' layout.

    A system's session writes what needs no training in `_prepare`, makes the objective of a stage in `_objective`, and
    puts what a stage has trained into the folder in `_keep`.
    """

    index: ClassVar[dict[str, Any]]  # model_index.json

    def __init__(self, recipe: Recipe, output: Path, world: World, accept_changes: bool = False) -> None:
        self.recipe, self.output, self.world, self.accept_changes = recipe, output, world, accept_changes
        self.folder = output / "pipeline"
        if world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._prepare()
            index = {"_diffusers_version": "0.30.0", **self.index}
            write_file(self.folder / "model_index.json", (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        world.wait()

    def train(self, stage: Stage) -> None:
        """Run a stage, unless it is finished, and put its model into the pipeline folder."""
        folder = self.output / stage.name
        done = folder / "done.json"
        if done.exists():
            return
        torch.manual_seed(self.recipe.seed)  # of the initial weights
        objective = self._objective(stage, folder)
        if stage.lora is not None:
            add_lora(objective.module, stage.lora, seed=self.recipe.seed)
            if stage.autocast in AUTOCAST and not self.world.sharded:  # FSDP2 gathers weights of one dtype
                narrow_frozen(objective.module, AUTOCAST[stage.autocast])
        seed, accept = self.recipe.seed, self.accept_changes
        module = Trainer(stage, objective, folder, self.world, seed=seed, accept_changes=accept).run()
        if self.world.is_main and stage.lora is not None:
            save_lora(module, folder / "pytorch_lora_weights.safetensors", base_model=self.recipe.name)
        elif self.world.is_main:
            self._keep(stage, objective, module)
        if self.world.is_main:
            write_file(done, json.dumps({"steps": stage.steps}).encode())
        self.world.wait()

    @abstractmethod
    def _prepare(self) -> None:
        """Write tokenizers, the scheduler and components trained before; the main process does."""

    @abstractmethod
    def _objective(self, stage: Stage, folder: Path) -> Objective:
        """What a stage minimises, over the models trained so far; `folder` is the stage's own."""

    @abstractmethod
    def _keep(self, stage: Stage, objective: Objective, module: nn.Module) -> None:
        """Put a stage's averaged module into the pipeline folder; the main process does."""

    def _streams(self, stage: Stage) -> Streams:
        return Streams(self.recipe.seed, stage.name, self.world.rank, self.world.size)

    def _frozen(self, kind: type[ModelT], name: str) -> ModelT:
        """A component that is trained already."""
        return kind.from_pretrained(self.folder, subfolder=name).requires_grad_(False).to(self.world.device)

    def _trained(self, name: str) -> bool:
        return (self.folder / name / "config.json").exists()

    def _pools(self, stage: PoolStage, folder: Path, encode: Encode, kind: type[Captions]) -> tuple[Pool, Pool | None]:
        """What a stage is trained and what it is validated on: its features; or scenes, encoded by the autoencoder and
        the system's text encoders, in files that the main process makes."""
        if stage.features:
            features = FeatureDataset(stage.features, kind, synthetic=stage.synthetic, seed=self.recipe.seed)
            return features, FeatureDataset(stage.validation, kind) if stage.validation else None
        vae, streams = self._frozen(AutoencoderKL, "vae"), self._streams(stage)
        others, one_caption = replace(streams, stage=f"{stage.name} validation"), replace(stage, captions=1)
        if not self.world.is_main:
            self.world.wait()
        with computing_in(stage.autocast, self.world.device.type):
            pool = build_pool(vae, encode, kind, stage, streams, stage.scenes, folder / "pool.safetensors")
            held_out = build_pool(
                vae, encode, kind, one_caption, others, VALIDATION_SCENES, folder / "validation.safetensors"
            )
        if self.world.is_main:
            self.world.wait()
        return pool, held_out

    def _once(self, name: str, make: Callable[[Path], object]) -> None:
        """Let `make` write a part of the folder, unless it is there; what a killed run left unfinished is not."""
        if not (self.folder / name).exists():
            scratch = self.folder / f".{name}.tmp"
            shutil.rmtree(scratch, ignore_errors=True)
            make(scratch)
            os.replace(scratch, self.folder / name)

    def _take(self, kind: type[PretrainedModel], name: str, table: dict[str, Any]) -> None:
        """Copy the `pretrained` component that a model table names; its other keys change the config."""
        if not self._trained(name):
            model = kind.from_pretrained(pretrained_folder(table["pretrained"]))
            model.register_config(**{key: value for key, value in table.items() if key != "pretrained"})
            model.save_pretrained(self.folder / name)


def pretrained_folder(name: str) -> Path:
    """The folder of a component: of a bundled model, such as "kolors-tiny/vae", or any other.

    Raises:
        RecipeError: there is no such folder.
    """
    model, _, component = name.partition("/")
    folder = bundled(model) / component if model in BUNDLED else Path(name)
    if not (folder / "config.json").exists() and not (folder / "tokenizer_config.json").exists():
        raise RecipeError(
            f"pretrained: expected a component of a bundled model ({', '.join(BUNDLED)}), such as kolors-tiny/vae, or "
            f"its folder, got '{name}'"
        )
    return folder
