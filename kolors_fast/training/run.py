"""From a recipe to a pipeline folder: what needs no training, then each stage with what the earlier ones made."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .config import KolorsRecipe, PixArtRecipe, PretrainedRecipe, Recipe, SD3Recipe, load_recipe
from .kolors import KolorsSession
from .parallel import World
from .pixart import PixArtSession
from .pretrained import PretrainedSession
from .sd3 import SD3Session
from .session import Session

SESSIONS: dict[type[Recipe], type[Session]] = {
    KolorsRecipe: KolorsSession,
    SD3Recipe: SD3Session,
    PixArtRecipe: PixArtSession,
    PretrainedRecipe: PretrainedSession,
}


def run(
    recipe: str | Path,
    output: str | Path,
    *,
    stages: list[str] | None = None,
    threads: int | None = None,
    engine: str = "ddp",
    device: str | None = None,
    accept_changes: bool = False,
) -> Path:
    """Train the stages of a recipe in order and write the pipeline folder.

    Started again on the same output it resumes: finished stages are taken as they are. Under torchrun the processes
    train together, each on its part of every batch.

    Args:
        recipe: a TOML file, or the name of a bundled recipe.
        output: folder for checkpoints, logs and samples; the pipeline goes to `<output>/pipeline`.
        stages: names of the stages to run; None runs all. One left out must be finished where a later one needs it.
        threads: CPU threads of each process; None leaves torch's own choice.
        engine: of several processes, "ddp", "fsdp" or "hybrid": see `World`.
        device: None takes a GPU, one a process, where torch sees any.
        accept_changes: resume a stage although its settings are not those of its checkpoint.

    Returns:
        The pipeline folder, in diffusers' layout.
    """
    plan = load_recipe(recipe)
    unknown = sorted(set(stages or []) - {stage.name for stage in plan.stages})
    if unknown:
        raise ValueError(f"stages: expected some of {[s.name for s in plan.stages]}, got '{unknown[0]}'")
    if threads is not None:
        torch.set_num_threads(threads)
    world = World.join(engine, device)
    session = SESSIONS[type(plan)](plan, Path(output), world, accept_changes)
    for stage in plan.stages:
        if stages is None or stage.name in stages:
            session.train(stage)
    world.leave()
    return session.folder


def export(output: str | Path, assets: str | Path) -> None:
    """Copy a trained pipeline folder to `assets` with all weights in fp16, as it is shipped."""
    source, target = Path(output) / "pipeline", Path(assets)
    for file in sorted(source.rglob("*")):
        if file.is_dir():
            continue
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".safetensors":
            shutil.copyfile(file, copy)
            continue
        with safe_open(file, "pt") as weights:
            tensors = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118, it is no dict
            halves = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
            save_file(halves, copy, weights.metadata())


if __name__ == "__main__":
    tqdm.write(str(run(sys.argv[1], sys.argv[2], stages=sys.argv[3:] or None, threads=1)))
