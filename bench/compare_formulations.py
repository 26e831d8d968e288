"""How the tiny MM-DiT learns under densities of rectified flow's times, and from the noise of a diffusion:

    python bench/compare_formulations.py --model kolors_fast/assets/sd3-tiny

Every formulation trains from the same fresh weights on the same pictures of one object, captions and order of both for
equally many steps, once for each seed, and draws held-out prompts in 5 and in 25 steps, which the oracle judges. That
is table 1 of Esser et al. 2024, https://arxiv.org/abs/2403.03206, in the small. Started again it resumes; what is
finished is kept.
Rows go to bench/results/, with the command, commit and machine, and their table to stdout.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kolors_fast.benchmark_report import provenance
from kolors_fast.data.shapes import held_out_prompts
from kolors_fast.data.shapes.split import CATEGORIES
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.checkpoint import write_file
from kolors_fast.models.mmdit import MMDiT
from kolors_fast.training.config import DenoiserStage, EpsilonLinearStage, RectifiedFlowStage, SD3Recipe, load_recipe
from kolors_fast.training.initial import draw_mmdit
from kolors_fast.training.mmdit import (
    EpsilonLinearObjective,
    MMDiTObjective,
    RectifiedFlowObjective,
    SD3Captions,
    encode_captions,
    encode_parts,
    sample,
)
from kolors_fast.training.monitor import judge_prompts, noise_shape
from kolors_fast.training.pool import LatentPool, build_pool
from kolors_fast.training.sd3 import load_encoders
from kolors_fast.training.streams import Streams
from kolors_fast.training.trainer import Trainer

EPSILON = "eps/linear"
FORMULATIONS = ("uniform", "logit_normal(0, 1)", "mode(1.29)", "cosmap", EPSILON)
DRAWN_IN = (5, 25)  # steps
FIGURES = ("right", "objects", "colours")


@dataclass(frozen=True)
class LoneObjects(DenoiserStage):
    objects: ClassVar[int | None] = 1


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    recipe: SD3Recipe
    vae: AutoencoderKL
    encoders: Any
    pool: LatentPool
    options: argparse.Namespace

    def figures(self, formulation: str, seed: int) -> dict[str, Any]:
        """One run's row, from its folder where it is finished."""
        folder = self.folder(formulation, seed)
        done, settings = folder / "figures.json", stage_settings(self.options)
        if not done.exists():
            objective = self.objective(formulation, seed)
            averaged = Trainer(objective.stage, objective, folder).run()
            row = {"formulation": formulation, "seed": seed}
            for steps in DRAWN_IN:
                row |= {f"{key} in {steps}": value for key, value in self.judge(objective, averaged, steps).items()}
            write_file(done, json.dumps({"settings": settings, "row": row}).encode())
        found = json.loads(done.read_text())
        if found["settings"] != settings:
            raise ValueError(f"--work: expected a folder for these settings, got {done} of {found['settings']}")
        return found["row"]

    def folder(self, formulation: str, seed: int) -> Path:
        """Such as logit_normal-0-1-seed-0."""
        return self.options.work / f"{re.sub('[^a-z0-9._]+', '-', formulation).strip('-')}-seed-{seed}"

    def objective(self, formulation: str, seed: int) -> MMDiTObjective:
        torch.manual_seed(seed)  # of the initial weights
        mmdit = MMDiT(**self.recipe.transformer)
        draw_mmdit(mmdit)
        streams = Streams(seed, "study")
        parts = mmdit, self.vae, self.encoders, LatentPool(self.pool.buckets, streams)
        common = stage_settings(self.options)
        if formulation == EPSILON:
            return EpsilonLinearObjective(
                *parts, EpsilonLinearStage(name=formulation, objective="epsilon_linear", **common), streams
            )
        stage = RectifiedFlowStage(name=formulation, objective="rectified_flow", density=formulation, **common)
        return RectifiedFlowObjective(*parts, stage, streams)

    def judge(self, objective: MMDiTObjective, mmdit: Any, steps: int) -> dict[str, float]:
        """The oracle's figures on held-out prompts drawn in so many steps."""

        def draw(prompts: list[str], generator: torch.Generator) -> Tensor:
            texts = encode_parts(self.encoders, [""] * len(prompts) + prompts)
            noise = torch.randn(len(prompts), *noise_shape(self.vae, self.options.side), generator=generator)
            return sample(mmdit, objective.sampler(), texts, noise, steps=steps)

        path = self.folder(objective.stage.name, objective.streams.seed) / f"drawn-in-{steps}.png"
        # of one object is every fifth
        lone = [one for one in held_out_prompts(5 * self.options.prompts) if one.category == CATEGORIES[0]]
        found = judge_prompts(draw, self.vae, path, lone)
        return {key: found[key] for key in FIGURES}


def stage_settings(options: argparse.Namespace) -> dict[str, Any]:
    side = options.side
    return {
        "steps": options.steps,
        "batch": options.batch,
        "learning_rate": options.learning_rate,
        "warmup": options.steps // 20,
        "decay": options.steps - options.steps // 20,
        "precision": "bf16",
        "monitor_every": options.steps,
        "scenes": options.scenes,
        "captions": 2,
        "area": side,
        "shortest": side,
        "longest": side,
        "divisor": 32,
        "square_share": 1.0,
        "encoder_dropout": 0.2,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the shares with all and with the colours drawn right, mean ± standard deviation over the seeds."""
    columns = [(f"{key} in {steps}", f"{key}, {steps} steps") for key in ("right", "colours") for steps in DRAWN_IN]
    lines = ["| formulation | " + " | ".join(heading for _, heading in columns) + " |", "|---" * 5 + "|"]
    for formulation in dict.fromkeys(row["formulation"] for row in rows):
        cells = []
        for key, _ in columns:
            values = [100 * row[key] for row in rows if row["formulation"] == formulation]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread} %")
        lines.append(f"| {formulation} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder whose encoders and VAE are taken")
    parser.add_argument("--recipe", default="sd3-tiny", help="whose transformer is trained; default: sd3-tiny")
    parser.add_argument("--formulations", nargs="+", default=FORMULATIONS, help="densities, or eps/linear")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--scenes", type=int, default=20000)
    parser.add_argument("--side", type=int, default=128, help="of the pictures, in pixels")
    parser.add_argument("--prompts", type=int, default=200, help="held-out ones, judged after each run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/formulations"), help="checkpoints of unfinished runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("bench/results/formulations.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = load_recipe(options.recipe)
    assert isinstance(recipe, SD3Recipe)
    vae = AutoencoderKL.from_pretrained(options.model, subfolder="vae").requires_grad_(False)
    encoders = load_encoders(options.model, recipe)
    stage = LoneObjects(name="pool", objective="", **stage_settings(options))
    cache, streams = options.work / "pool.safetensors", Streams(0, "pool")
    pool = build_pool(vae, partial(encode_captions, encoders), SD3Captions, stage, streams, options.scenes, cache)
    study = Study(recipe, vae, encoders, pool, options)
    rows = []
    for seed in options.seeds:
        for formulation in options.formulations:
            rows.append(study.figures(formulation, seed))
            write_report(options, rows)
    print(table(rows))


def write_report(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """All rows so far, with what they come from."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    command = " ".join(["python", *sys.argv])
    settings = {
        "model": str(options.model),
        "recipe": options.recipe,
        **stage_settings(options),
        "prompts": options.prompts,
    }
    report = {**provenance(torch.device("cpu")), "command": command, "commit": commit, "settings": settings}
    write_file(options.output, (json.dumps({**report, "rows": list(rows)}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
