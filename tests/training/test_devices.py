"""Training on a device that is not the CPU: inputs get there, no step waits for it, and the losses are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kolors_fast.assets import bundled
from kolors_fast.cli import main
from kolors_fast.evaluation.statistics import TimestepBins
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.chatglm_tokenizer import ChatGLMTokenizer
from kolors_fast.pipelines.text_encoders import load_tokenizer
from kolors_fast.training import monitor, objectives, run
from kolors_fast.training.config import AutoencoderStage, LanguageModelStage, TextEncoderStage, tomllib
from kolors_fast.training.objectives import AutoencoderObjective, LanguageModelObjective, Objective
from kolors_fast.training.parallel import World
from kolors_fast.training.streams import Streams
from kolors_fast.training.text_encoders import ClipObjective, T5Objective, make_clip, make_t5
from kolors_fast.training.trainer import Trainer

from . import test_pretrained, test_run, tiny
from .second_device import DEVICE, SecondDevice, second_device

STREAMS = Streams(7, "tiny")


@pytest.fixture
def device() -> Iterator[SecondDevice]:
    with second_device() as mode:
        yield mode


def autoencoder() -> tuple[Any, Objective]:
    stage = AutoencoderStage(objective="autoencoder", sizes=((64, 64), (32, 64)), **_settings())
    return stage, AutoencoderObjective(AutoencoderKL(**_table("vae")), stage, STREAMS)


def language_model() -> tuple[Any, Objective]:
    stage = LanguageModelStage(objective="language_model", **_settings())
    tokenizer = ChatGLMTokenizer.from_pretrained(bundled("kolors-tiny"), subfolder="tokenizer")
    config = {**_table("text_encoder"), "padded_vocab_size": tokenizer.vocab_size, "add_lm_head": True}
    return stage, LanguageModelObjective(ChatGLM(**config), tokenizer, stage, STREAMS)


def clip() -> tuple[Any, Objective]:
    tokenizer = load_tokenizer(bundled("sd3-tiny"), "tokenizer", "CLIPTokenizer")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "projection_dim": 8, "num_hidden_layers": 2}
    stage = TextEncoderStage(objective="clip", **_settings())
    return stage, ClipObjective(make_clip(tokenizer, {**sizes, "num_attention_heads": 2}), tokenizer, stage, STREAMS)


def t5() -> tuple[Any, Objective]:
    tokenizer = load_tokenizer(bundled("sd3-tiny"), "tokenizer_3", "T5TokenizerFast")
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    stage = TextEncoderStage(objective="t5", component="text_encoder_3", **_settings())
    return stage, T5Objective(make_t5(tokenizer, sizes), tokenizer, stage, STREAMS)


def _settings() -> dict[str, Any]:
    return {key: value for key, value in tiny.SETTINGS.items() if key != "captions"}


def _table(name: str) -> dict[str, Any]:
    """Of the miniature recipe."""
    table: dict[str, Any] = tomllib.loads(test_run.RECIPE)[name]
    return table


def denoiser(name: str) -> Callable[[], tuple[Any, Objective]]:
    return lambda: tiny.make(name)


MAKERS: dict[str, Callable[[], tuple[Any, Objective]]] = {
    **{name: denoiser(name) for name in tiny.OBJECTIVES},
    "autoencoder": autoencoder, "language_model": language_model, "clip": clip, "t5": t5,
}  # fmt: skip


def losses(make: Callable[[], tuple[Any, Objective]], folder: Path, device: torch.device) -> list[Tensor]:
    torch.manual_seed(5)
    stage, objective = make()
    trainer = Trainer(stage, objective, folder, World(device=device))
    return [trainer.train_step() for _ in range(3)]


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_on_a_device_is_the_same_and_waits_for_nothing(tmp_path: Path, name: str) -> None:
    expected = losses(MAKERS[name], tmp_path, torch.device("cpu"))
    with second_device() as device:
        found = losses(MAKERS[name], tmp_path, DEVICE)
        assert device.read == ([] if name != "t5" else ["aten._local_scalar_dense.default"])  # of transformers' masks
        assert all(one.device == DEVICE for one in found)
        assert [float(one) for one in found] == pytest.approx([float(one) for one in expected], rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_a_gpu_trains_as_the_cpu_does(
    tmp_path: Path, name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at no time does its host wait for it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = losses(lambda: tiny.make(name), tmp_path, torch.device("cpu"))
    stage, objective = tiny.make(name, precision=precision)
    trainer = Trainer(stage, objective, tmp_path, World(device=torch.device("cuda")))
    found = [trainer.train_step()]  # in which kernels are compiled and loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += [trainer.train_step() for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    slack = 1e-4 if precision == "fp32" else 3e-2
    assert [float(one) for one in found] == pytest.approx([float(one) for one in expected], rel=slack)


def test_the_device_refuses_tensors_of_the_cpu(device: SecondDevice) -> None:
    """That what these tests look for would be seen."""
    there = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"aten.add.Tensor: expected tensors of one device, got \['lazy', 'cpu'\]"):
        there + torch.ones(3)
    assert device.read == []
    assert float(there.sum()) == 3 and (there.cpu() == torch.ones(3)).all()
    assert device.read == ["aten._local_scalar_dense.default", "aten._to_copy.default"]


def test_bins_are_where_the_losses_are(device: SecondDevice) -> None:
    bins = TimestepBins([0, 500, 1000])
    bins.update(torch.tensor([100, 900, 700]), torch.tensor([1.0, 2.0, 4.0]).to(DEVICE))
    assert device.read == []
    assert bins.read() == {"loss/t 0-500": 1.0, "loss/t 500-1000": 3.0}


@contextmanager
def watched() -> Iterator[None]:
    """No step reads anything back, and what is drawn to be looked at is little."""
    step, few = Trainer.train_step, monitor.validation_prompts(2)
    with second_device() as device, pytest.MonkeyPatch.context() as patch:

        def train_step(trainer: Trainer) -> Tensor:
            device.read.clear()
            loss = step(trainer)
            assert device.read == []
            return loss

        patch.setattr(Trainer, "train_step", train_step)
        for module in (monitor, objectives):
            patch.setattr(module, "validation_prompts", lambda count=2: few)
        yield


def test_a_whole_recipe(tmp_path: Path) -> None:
    """Every stage of Kolors', with the pictures that are looked at; each takes what the ones before it left."""
    (tmp_path / "recipe.toml").write_text(test_run.RECIPE)
    with watched():
        run(tmp_path / "recipe.toml", tmp_path / "out", device=str(DEVICE))
    for stage in ("autoencoder", "concepts", "quality"):
        assert (tmp_path / "out" / stage / "samples").is_dir()


@pytest.mark.parametrize("model", ["sd3-tiny", "pixart-tiny"])
def test_a_pipeline_that_is_there(tmp_path: Path, model: str) -> None:
    """An adapter for it, validated and drawn with."""
    pictures, features = tmp_path / "pictures", tmp_path / "features"
    pictures.mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("noise")
    sizes = ["--area", "64", "--min", "64", "--limit", "64"]
    assert main(["precompute", str(pictures), "-o", str(features), "--model", model, *sizes]) == 0
    recipe = test_pretrained.recipe_of(tmp_path, model, features, 'lora = {rank = 2}\nprecision = "fp32"')
    with watched():
        run(recipe, tmp_path / "out", device=str(DEVICE))
    assert (tmp_path / "out" / "style" / "samples" / "000003.png").is_file()


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a CUDA device")
    with pytest.raises(ValueError, match="device: expected cpu, for torch sees no CUDA device, got 'cuda'"):
        World.join(device="cuda")
