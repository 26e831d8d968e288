"""A pipeline trained further on pictures of one's own, in all its weights or by an adapter, for every system."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_fast.assets import bundled
from kolors_fast.cli import main
from kolors_fast.models.lora_adapter import load_lora
from kolors_fast.pipelines.load import load_pipeline
from kolors_fast.schedulers import EulerDiscreteScheduler
from kolors_fast.training import run, session
from kolors_fast.training.config import RecipeError, load_recipe
from kolors_fast.training.lora import narrow_frozen as narrow
from kolors_fast.training.parallel import World
from kolors_fast.training.pretrained import PretrainedSession

OBJECTIVES = {"kolors-tiny": "epsilon", "sd3-tiny": "rectified_flow", "pixart-tiny": "learned_variance"}
RECIPE = """
name = "mine"
system = "pretrained"
pretrained = "{model}"
seed = 1
[[stage]]
name = "style"
objective = "{objective}"
features = "{features}"
prompts = ["a red circle", "一个蓝色正方形"]
validation = "{features}"
steps = 3
batch = 4
learning_rate = 1e-3
warmup = 1
decay = 1
monitor_every = 3
{more}
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(9):
        noise = rng.integers(0, 256, (8, 8 + 4 * (number % 2), 3), np.uint8)
        picture = Image.fromarray(noise).resize((128 + 64 * (number % 2), 128))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number} of noise")
    return folder


@pytest.fixture(scope="module", params=OBJECTIVES)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, pictures: Path, model: str) -> Path:
    folder = tmp_path_factory.mktemp(model) / "features"
    arguments = ["--model", model, "--area", "128", "--min", "64", "--limit", "256"]
    assert main(["precompute", str(pictures), "-o", str(folder), *arguments]) == 0
    return folder


def recipe_of(folder: Path, model: str, features: Path | str, more: str = "", objective: str = "") -> Path:
    objective = objective or OBJECTIVES[model]
    text = RECIPE.format(model=model, objective=objective, features=features, more=more)
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    return folder / "mine.toml"


def weights(pipeline: Any) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in pipeline.denoiser.parameters()])


def test_all_weights(tmp_path: Path, model: str, features: Path) -> None:
    before = load_pipeline(model)
    run(recipe_of(tmp_path, model, features), tmp_path / "out")
    after = load_pipeline(tmp_path / "out" / "pipeline")
    assert type(after) is type(before)
    moved = (weights(after) - weights(before)).abs().max()
    assert 1e-5 < float(moved) < 1e-2  # three steps of 1e-3
    assert torch.equal(weights(load_pipeline(model)), weights(before))  # what was linked is as it was
    sheet = Image.open(tmp_path / "out" / "style" / "samples" / "000003.png")
    assert sheet.size[0] % 2 == 0 and len(np.unique(np.asarray(sheet))) > 3
    assert (tmp_path / "out" / "style" / "report.png").is_file()
    lines = [json.loads(line) for line in (tmp_path / "out" / "style" / "log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if any("validation" in name for name in line)]
    assert len(losses) == 1 and losses[0]["step"] == 3
    if find_spec("tensorboard") is not None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "out" / "style" / "tensorboard"))
        events.Reload()
        assert events.Tags()["images"] == ["samples"]


def test_the_monitor_draws_as_the_pipeline_does(tmp_path: Path, model: str, features: Path) -> None:
    for predicted in ("epsilon", "v_prediction") if model == "kolors-tiny" else ("epsilon",):
        more = 'prediction = "v"' if predicted == "v_prediction" else ""
        recipe: Any = load_recipe(recipe_of(tmp_path, model, features, more))
        objective = PretrainedSession(recipe, tmp_path / "out", World())._objective(recipe.stages[0], tmp_path)
        objective.monitor(objective.module.eval(), tmp_path, 0)
        pipeline, own = load_pipeline(model), {}
        if predicted == "v_prediction":
            pipeline.scheduler = EulerDiscreteScheduler.from_config(
                pipeline.scheduler.config, prediction_type=predicted
            )
        if model == "pixart-tiny":
            own["clean_caption"] = False
        noise = [torch.Generator().manual_seed(number) for number in range(2)]
        steps, guidance = {"kolors-tiny": (20, 5.0), "sd3-tiny": (25, 5.0), "pixart-tiny": (20, 4.5)}[model]
        images = pipeline(
            list(recipe.stages[0].prompts), num_inference_steps=steps, guidance_scale=guidance, generator=noise, **own
        ).images
        drawn = np.asarray(Image.open(tmp_path / "000000.png")).astype(int)
        found = np.abs(drawn[:, : 2 * images[0].width] - np.concatenate([np.asarray(one) for one in images], axis=1))
        assert np.quantile(found, 0.99) <= 2 and found.mean() < 0.3  # features are kept in half precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_adapter(
    tmp_path: Path, model: str, features: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = f'lora = {{rank = 4}}\nprecision = "{precision}"\nactivations = "selective"'
    recipe = recipe_of(tmp_path, model, features, more)
    narrowed: list[torch.dtype] = []
    monkeypatch.setattr(session, "narrow_frozen", lambda module, dtype: narrowed.append(dtype) or narrow(module, dtype))
    run(recipe, tmp_path / "out")
    assert narrowed == ([torch.bfloat16] if precision == "bf16" else [])  # the branches' halves are not autocast's
    pipeline = load_pipeline(tmp_path / "out" / "pipeline")
    assert torch.equal(weights(pipeline), weights(load_pipeline(model)))
    count = len(list(pipeline.denoiser.parameters()))
    load_lora(pipeline.denoiser, tmp_path / "out" / "style" / "pytorch_lora_weights.safetensors")
    assert len(list(pipeline.denoiser.parameters())) > count


def test_features_of_another_model_are_refused(tmp_path: Path, model: str, features: Path) -> None:
    other = "sd3-tiny" if model == "kolors-tiny" else "kolors-tiny"
    with pytest.raises(OSError, match=r"expected features of models with the hash .*, got "):
        run(recipe_of(tmp_path, other, features), tmp_path / "out")


def test_validation_pictures_are_looked_for_before_the_first_step(tmp_path: Path, features: Path, model: str) -> None:
    recipe = recipe_of(tmp_path, model, features)
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace(f'validation = "{features}"', 'validation = "nowhere"'), encoding="utf-8")
    with pytest.raises(OSError, match=r"nowhere/index\.json is missing: expected a folder that 'kolors-fast precomp"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "style" / "checkpoints").exists()


def test_recipes_that_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="objective: expected 'epsilon' for a KolorsPipeline, got 'rectified_flow'"):
        run(recipe_of(tmp_path, "kolors-tiny", tmp_path, objective="rectified_flow"), tmp_path / "out")
    with pytest.raises(RecipeError, match="features: expected one of 'kolors-fast precompute', got none"):
        run(recipe_of(tmp_path, "kolors-tiny", ""), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"pretrained: expected a pipeline's folder or one of .*, got 'kolors-huge'"):
        run(recipe_of(tmp_path, "kolors-huge", "", objective="epsilon"), tmp_path / "out")
    assert (bundled("kolors-tiny") / "model_index.json").is_file()
