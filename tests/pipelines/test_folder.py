"""Pipeline folders: read from and written for diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from kolors_fast.models.checkpoint import CheckpointError
from kolors_fast.pipelines.kolors import KolorsPipeline

CALL = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}


def draw(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    images: np.ndarray = pipeline("a photo", **CALL, generator=torch.Generator().manual_seed(0)).images
    return images


def test_saved_pipelines_are_read_by_both(ours: KolorsPipeline, tmp_path: Path) -> None:
    ours.config.force_zeros_for_empty_prompt = True
    expected = draw(ours)
    ours.save_pretrained(tmp_path / "new" / "pipeline")
    again = KolorsPipeline.from_pretrained(tmp_path / "new" / "pipeline")
    assert again.config.force_zeros_for_empty_prompt is True
    assert again.scheduler.config == ours.scheduler.config
    np.testing.assert_array_equal(draw(again), expected)
    theirs = diffusers.KolorsPipeline.from_pretrained(str(tmp_path / "new" / "pipeline"))
    assert theirs.config.force_zeros_for_empty_prompt is True
    assert theirs.scheduler.config.num_train_timesteps == 1100
    theirs.register_to_config(force_zeros_for_empty_prompt=False)
    again.config.force_zeros_for_empty_prompt = False
    assert np.abs(draw(theirs) - draw(again)).max() < 1e-4


def test_variant_and_dtype(ours: KolorsPipeline, tmp_path: Path) -> None:
    ours.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert (tmp_path / "text_encoder" / "model.fp16.safetensors").is_file()
    half = KolorsPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16, variant="fp16")
    assert {half.unet.dtype, half.text_encoder.dtype, half.vae.dtype} == {torch.float16}
    assert KolorsPipeline.from_pretrained(tmp_path, variant="fp16").dtype == torch.float32
    with pytest.raises(CheckpointError, match="has no weights"):
        KolorsPipeline.from_pretrained(tmp_path)


def test_moving_and_casting(ours: KolorsPipeline) -> None:
    assert ours.to(torch.float64) is ours
    assert {model.dtype for model in (ours.unet, ours.vae, ours.text_encoder)} == {torch.float64}
    ours.to("meta", torch.float32)
    assert ours.device == torch.device("meta")
    assert ours.dtype == torch.float32
    assert list(ours.components) == ["vae", "text_encoder", "tokenizer", "unet", "scheduler"]


def copy(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    index = target / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))
    return target


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
        KolorsPipeline.from_pretrained(folder / "unet")
    with pytest.raises(CheckpointError, match="no model folder 'nowhere' exists"):
        KolorsPipeline.from_pretrained("nowhere")
    wrong = copy(folder, tmp_path / "a", unet=["diffusers", "SD3Transformer2DModel"])
    with pytest.raises(
        CheckpointError, match="unet: expected the class UNet2DConditionModel, got SD3Transformer2DModel"
    ):
        KolorsPipeline.from_pretrained(wrong)
    wrong = copy(folder, tmp_path / "b", scheduler=["diffusers", "PNDMScheduler"])
    with pytest.raises(CheckpointError, match=r"scheduler: expected one of DDIMScheduler, .*, got PNDMScheduler"):
        KolorsPipeline.from_pretrained(wrong)
    wrong = copy(folder, tmp_path / "c", vae="AutoencoderKL")
    with pytest.raises(CheckpointError, match=r"vae: expected \[library, class\], got 'AutoencoderKL'"):
        KolorsPipeline.from_pretrained(wrong)


def test_image_prompt_parts_are_left_out_with_a_warning(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path / "a", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    with pytest.warns(UserWarning, match="image_encoder is not loaded"):
        KolorsPipeline.from_pretrained(path)
