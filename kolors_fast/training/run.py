"""From a recipe to a pipeline folder: the tokenizer, then each stage with what the earlier ones made."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.chatglm_tokenizer import ChatGLMTokenizer
from kolors_fast.models.checkpoint import PretrainedModel, write_file
from kolors_fast.models.unet import KolorsUNet
from kolors_fast.schedulers import EulerDiscreteScheduler

from .config import AutoencoderStage, EpsilonStage, LanguageModelStage, Recipe, Stage, load_recipe
from .initial import drop_head, fix_posterior, scale_residual_stream, zero_residual_branches
from .objectives import AutoencoderObjective, CaptionReader, EpsilonObjective, LanguageModelObjective, Objective
from .parallel import World
from .pool import build_pool
from .streams import Streams
from .tokenizer import train_tokenizer
from .trainer import Trainer, computing_in

PIPELINE = "pipeline"


def train_command(
    recipe: str | Path, output: str | Path, stages: list[str] | None = None, threads: int | None = None
) -> Path:
    """What `kolors-fast train` does; see `run`."""
    return run(recipe, output, stages=stages, threads=threads)


def run(recipe: str | Path, output: str | Path, *, stages: list[str] | None = None, threads: int | None = None) -> Path:
    """Train the stages of a recipe in order and write the pipeline folder.

    Started again on the same output it resumes: finished stages are taken as they are. Under torchrun the processes
    train together, each on its own data.

    Args:
        recipe: a TOML file, or the name of a bundled recipe.
        output: folder for checkpoints, logs and samples; the pipeline goes to `<output>/pipeline`.
        stages: names of the stages to run; None runs all. One left out must be finished where a later one needs it.
        threads: CPU threads of each process; None leaves torch's own choice.

    Returns:
        The pipeline folder, in diffusers' layout.
    """
    plan = load_recipe(recipe)
    unknown = sorted(set(stages or []) - {stage.name for stage in plan.stages})
    if unknown:
        raise ValueError(f"stages: expected some of {[s.name for s in plan.stages]}, got '{unknown[0]}'")
    if threads is not None:
        torch.set_num_threads(threads)
    session = Session(plan, Path(output), World.join())
    for stage in plan.stages:
        if stages is None or stage.name in stages:
            session.train(stage)
    return session.folder


class Session:
    """The models of one recipe, as far as they are trained, kept as a pipeline folder."""

    def __init__(self, recipe: Recipe, output: Path, world: World) -> None:
        self.recipe, self.output, self.world = recipe, output, world
        self.folder = output / PIPELINE
        if world.is_main and not (self.folder / "tokenizer").exists():
            train_tokenizer(recipe.tokenizer, recipe.seed, self.folder / "tokenizer")
        if world.is_main:
            self._write_pipeline()
        world.wait()
        self.tokenizer = ChatGLMTokenizer.from_pretrained(self.folder, subfolder="tokenizer")

    def train(self, stage: Stage) -> None:
        """Run a stage, unless it is finished, and put its model into the pipeline folder."""
        folder = self.output / stage.name
        done = folder / "done.json"
        if done.exists():
            return
        torch.manual_seed(self.recipe.seed)  # of the initial weights
        objective = self._objective(stage, folder)
        module = Trainer(stage, objective, folder, self.world).run()
        if self.world.is_main:
            if isinstance(module, AutoencoderKL) and isinstance(objective, AutoencoderObjective):
                fix_posterior(module)
                self._measure_scale(module, objective.stage)
            elif isinstance(module, CaptionReader) and isinstance(objective, LanguageModelObjective):
                module = module.model
                scale_residual_stream(module, 1 / objective.rms_of_states(module))
                drop_head(module)
            assert isinstance(module, PretrainedModel)
            module.save_pretrained(self.folder / self._subfolder(stage))
            write_file(done, json.dumps({"steps": stage.steps}).encode())
        self.world.wait()

    def _objective(self, stage: Stage, folder: Path) -> Objective:
        streams = Streams(self.recipe.seed, stage.name, self.world.rank)
        if isinstance(stage, AutoencoderStage):
            return AutoencoderObjective(AutoencoderKL(**self.recipe.vae), stage, streams)
        if isinstance(stage, LanguageModelStage):
            model = ChatGLM(**self.recipe.text_encoder, add_lm_head=True)
            if model.config.padded_vocab_size < self.tokenizer.vocab_size:
                raise ValueError(
                    f"text_encoder: padded_vocab_size: expected {self.tokenizer.vocab_size} or more, "
                    f"got {model.config.padded_vocab_size}"
                )
            return LanguageModelObjective(model, self.tokenizer, stage, streams)
        assert isinstance(stage, EpsilonStage)
        vae = AutoencoderKL.from_pretrained(self.folder, subfolder="vae").requires_grad_(False)
        text_encoder = ChatGLM.from_pretrained(self.folder, subfolder="text_encoder").requires_grad_(False)
        trained = (self.folder / "unet" / "config.json").exists()
        if trained:
            unet = KolorsUNet.from_pretrained(self.folder, subfolder="unet")
        else:
            unet = KolorsUNet(**self.recipe.unet)
            zero_residual_branches(unet)
        cache = folder / f"pool-{self.world.rank}-of-{self.world.size}.safetensors"
        count = math.ceil(stage.scenes / self.world.size)
        with computing_in(stage.precision):
            pool = build_pool(vae, text_encoder, self.tokenizer, stage, streams, count, cache)
        return EpsilonObjective(unet, vae, text_encoder, self.tokenizer, pool, stage, streams)

    @torch.no_grad()
    def _measure_scale(self, vae: AutoencoderKL, stage: AutoencoderStage) -> None:
        """Set the config's scaling_factor, so that scaled latents have unit variance."""
        objective = AutoencoderObjective(vae, stage, Streams(self.recipe.seed, f"{stage.name} scale"))
        values = [vae.encode(objective.pictures(i))[0].mode().flatten() for i in range(16)]
        vae.register_config(scaling_factor=round(1 / float(torch.cat(values).std()), 5))

    def _subfolder(self, stage: Stage) -> str:
        return {"autoencoder": "vae", "language_model": "text_encoder", "epsilon": "unet"}[stage.objective]

    def _write_pipeline(self) -> None:
        """model_index.json and the scheduler; the models join as they are trained."""
        EulerDiscreteScheduler.from_config(self.recipe.scheduler).save_pretrained(self.folder / "scheduler")
        index = {
            "_class_name": "KolorsPipeline",
            "_diffusers_version": "0.30.0",
            "force_zeros_for_empty_prompt": False,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": ["kolors", "ChatGLMModel"],
            "tokenizer": ["kolors", "ChatGLMTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        write_file(self.folder / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())


def export(output: str | Path, assets: str | Path) -> None:
    """Copy a trained pipeline folder to `assets` in fp16, as it is shipped."""
    source, target = Path(output) / PIPELINE, Path(assets)
    for kind, name in ((AutoencoderKL, "vae"), (ChatGLM, "text_encoder"), (KolorsUNet, "unet")):
        kind.from_pretrained(source, subfolder=name).half().save_pretrained(target / name)
    ChatGLMTokenizer.from_pretrained(source, subfolder="tokenizer").save_pretrained(target / "tokenizer")
    EulerDiscreteScheduler.from_pretrained(source, subfolder="scheduler").save_pretrained(target / "scheduler")
    write_file(target / "model_index.json", (source / "model_index.json").read_bytes())


if __name__ == "__main__":
    tqdm.write(str(run(sys.argv[1], sys.argv[2], stages=sys.argv[3:] or None, threads=1)))
