"""PixArt's pipeline against diffusers', on the same random weights, written by diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from torch import Tensor

from kolors_fast import PixArtPipeline, savings, use_backend, without
from kolors_fast.pipelines.load import load_pipeline
from kolors_fast.pipelines.pixart import PixArtSigmaPipeline
from kolors_fast.pipelines.resolution_bins import nearest_bin, resized_and_cropped
from kolors_fast.pipelines.text_encoders import load_text_encoder, load_tokenizer
from kolors_fast.sampling.graphs import StepGraphs

from .text_models import JOINT_DIM, write_pixart_text

TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 24,
    "caption_channels": JOINT_DIM,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.18215,
}
CALL = {"num_inference_steps": 4, "max_sequence_length": 20, "use_resolution_binning": False}
ALL = tuple(savings.SAVINGS)


def write_pipeline(folder: Path, *, sigma: bool = False, **transformer: Any) -> Any:
    """diffusers' pipeline, whose folder this is."""
    write_pixart_text(folder)
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(**{**TRANSFORMER, **transformer})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn2" in name or "adaln" in name:  # so that text and time show in the picture
                parameter.mul_(2)
    kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    pipeline = kind(
        tokenizer=load_tokenizer(folder, "tokenizer", "T5Tokenizer"),
        text_encoder=load_text_encoder(folder, "text_encoder", "T5EncoderModel"),
        vae=diffusers.AutoencoderKL(**VAE).eval(),
        transformer=model.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pixart")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return write_pipeline(folder)


@pytest.fixture
def ours(theirs: Any, folder: Path) -> PixArtPipeline:
    pipeline = PixArtPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: Any, prompt: Any = "a photo of a cat", **arguments: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn: Tensor = pipeline(prompt, generator=generator, output_type="latent", **{**CALL, **arguments}).images
    return drawn


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().abs().max() / want.abs().max())


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without guidance": {"guidance_scale": 1.0},
    "negative": {"negative_prompt": "a fox"},
    "several": {"prompt": ["a cat", "the quick brown fox"], "num_images_per_prompt": 2},
    "not square": {"height": 24, "width": 40},
    "cleaned": {"prompt": "See https://example.com/x.png <b>TWO red circles</b>"},
    "as it is": {"prompt": "See https://example.com/x.png", "clean_caption": False},
    "own timesteps": {"timesteps": [900, 500, 100]},
}


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS.keys())
@pytest.mark.filterwarnings("ignore:text_encoder")
def test_latents_are_those_of_diffusers(theirs: Any, ours: PixArtPipeline, arguments: dict[str, Any]) -> None:
    assert relative(latents(ours, **arguments), latents(theirs, **arguments)) < 1e-5


def test_pictures_are_those_of_diffusers(theirs: Any, ours: PixArtPipeline) -> None:
    drawn = [
        pipeline("a cat", generator=torch.Generator().manual_seed(3), output_type="np", **CALL).images
        for pipeline in (theirs, ours)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() < 1e-4
    assert ours("a cat", **{**CALL, "use_resolution_binning": True}).images[0].size == (32, 32)  # no bins of that size


def test_other_schedulers(theirs: Any, ours: PixArtPipeline) -> None:
    for name in ("EulerDiscreteScheduler", "DDIMScheduler", "DDPMScheduler"):
        config = {"num_train_timesteps": 1000, "clip_sample": False} if name != "EulerDiscreteScheduler" else {}
        kind, our_kind = getattr(diffusers, name), getattr(__import__("kolors_fast.schedulers", fromlist=[name]), name)
        rival = type(theirs)(**{**theirs.components, "scheduler": kind(**config)})
        rival.set_progress_bar_config(disable=True)
        ours.scheduler = our_kind(**config)
        assert relative(latents(ours), latents(rival)) < 1e-5


def test_learned_variance(ours: PixArtPipeline) -> None:
    """DDPM by the variance that the model predicts, step by step by diffusers' scheduler; its pipeline drops it."""
    from kolors_fast.schedulers import DDPMScheduler

    config = {"variance_type": "learned_range", "clip_sample": False}
    ours.scheduler = DDPMScheduler(**config)
    found = latents(ours, guidance_scale=1.0)
    scheduler = diffusers.DDPMScheduler(**config)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    embeds, mask, _, _ = ours.encode_prompt("a photo of a cat", False, clean_caption=True, max_sequence_length=20)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            output = ours.transformer(sample, embeds, timestep, encoder_attention_mask=mask, return_dict=False)[0]
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
    assert relative(found, sample) < 1e-5
    ours.scheduler = DDPMScheduler(clip_sample=False)
    assert relative(latents(ours, guidance_scale=1.0), sample) > 1e-3


@pytest.mark.parametrize("sample_size", [32, 64, 128, 256])
def test_resolution_bins_are_those_of_diffusers(sample_size: int) -> None:
    tables = {
        32: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
        64: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
        128: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
        256: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
    }
    for height in range(8, 4000, 56):
        for width in (8, 400, 1000, 1024, 3000):
            expected = PixArtImageProcessor.classify_height_width_bin(height, width, tables[sample_size])
            assert nearest_bin(height, width, sample_size) == expected
    assert nearest_bin(37, 41, 16) == (37, 41)


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (24, 24), (48, 50)], ids=str)
def test_resizing_is_that_of_diffusers(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, 24, 24)
    expected = PixArtImageProcessor.resize_and_crop_tensor(images, size[1], size[0])
    assert torch.equal(resized_and_cropped(images, *size), expected)


@pytest.mark.parametrize("sigma", [False, True], ids=["alpha", "sigma"])
def test_binned_sizes_with_micro_conditioning(tmp_path: Path, sigma: bool) -> None:
    """The whole way at a released sample size; Sigma's model has it too and reads no sizes."""
    theirs = write_pipeline(tmp_path, sigma=sigma, sample_size=128, num_layers=1, use_additional_conditions=not sigma)
    pipeline = load_pipeline(tmp_path)
    assert type(pipeline) is (PixArtSigmaPipeline if sigma else PixArtPipeline)
    pipeline.set_progress_bar_config(disable=True)
    # a VAE of factor 4: the bins of 1024 pixels are there whatever the latents' side
    arguments = {"num_inference_steps": 2, "height": 256, "width": 1000, "use_resolution_binning": True}
    drawn = [
        one("a cat", generator=torch.Generator().manual_seed(0), output_type="np", **arguments).images
        for one in (theirs, pipeline)
    ]
    assert drawn[1].shape == (1, 256, 1000, 3)
    assert np.abs(drawn[0] - drawn[1]).max() < 1e-4


def test_encode_prompt(theirs: Any, ours: PixArtPipeline) -> None:
    arguments = {"negative_prompt": "a fox", "num_images_per_prompt": 2, "max_sequence_length": 20}
    expected = theirs.encode_prompt(["a cat", "a dog"], **arguments)
    for got, want in zip(ours.encode_prompt(["a cat", "a dog"], **arguments), expected, strict=True):
        assert got.shape == want.shape
        assert relative(got.float().detach(), want.float().detach()) < 1e-5
    assert ours.encode_prompt("a cat", False)[2:] == (None, None)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    features = dict(zip(names, ours.encode_prompt("a cat", max_sequence_length=20), strict=True))
    assert torch.equal(latents(ours, None, negative_prompt=None, **features), latents(ours, "a cat"))


def test_guidance_of_each_prompt_is_that_of_the_prompt_alone(ours: PixArtPipeline) -> None:
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    prompts, scales = ["a cat", "the quick brown fox", "a dog"], [7.0, 1.0, 3.0]
    together = latents(ours, prompts, guidance_scale=scales, latents=noise)
    for i, (prompt, scale) in enumerate(zip(prompts, scales, strict=True)):
        alone = latents(ours, prompt, guidance_scale=scale, latents=noise[i : i + 1])
        assert relative(together[i : i + 1], alone) < 1e-5


def test_captured_steps_are_the_eager_ones(ours: PixArtPipeline) -> None:
    eager = latents(ours)
    ours._graphs = StepGraphs(ours.transformer, record=lambda program: program.run)  # in the place of a CUDA graph
    assert relative(latents(ours), eager) < 1e-5  # keys that do not count fill up to a multiple
    latents(ours, "a longer prompt")
    assert len(ours._graphs) <= 2


def test_fused_trajectory_is_the_reference(ours: PixArtPipeline) -> None:
    fused = latents(ours)
    with use_backend("reference"), without(*ALL):
        reference = latents(ours)
    assert relative(fused, reference) < 1e-5
    assert not torch.equal(fused, reference)  # two ways of computing it


def test_callbacks(theirs: Any, ours: PixArtPipeline) -> None:
    seen: dict[str, list[Any]] = {"theirs": [], "ours": []}
    for name, pipeline in (("theirs", theirs), ("ours", ours)):
        kept = seen[name]
        latents(pipeline, callback=lambda row, t, x, kept=kept: kept.append((row, int(t), x.clone())), callback_steps=2)
    assert [one[:2] for one in seen["ours"]] == [one[:2] for one in seen["theirs"]]
    for (*_, got), (*_, want) in zip(seen["ours"], seen["theirs"], strict=True):
        assert relative(got, want) < 1e-5
    plain = latents(ours)
    changed = latents(ours, callback_on_step_end=lambda _p, row, _t, x: {"latents": x["latents"] + (row == 1)})
    assert not torch.equal(changed, plain)


def test_saved_pipelines_are_read_by_both(theirs: Any, ours: PixArtPipeline, tmp_path: Path) -> None:
    expected = latents(ours)
    ours.save_pretrained(tmp_path)
    assert torch.equal(latents(load_pipeline(tmp_path)), expected)
    again = diffusers.PixArtAlphaPipeline.from_pretrained(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again), latents(theirs))


def test_bfloat16(ours: PixArtPipeline) -> None:
    wide = latents(ours)
    assert relative(latents(ours.to(torch.bfloat16)).float(), wide) < 0.1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "size": ({"height": 36}, "height: expected a positive multiple of 8, got 36"),
    "prompt": ({"prompt": 3}, "prompt: expected a string or a non-empty list of strings, got 3"),
    "no prompt": ({"prompt": None}, "prompt: expected a prompt or prompt_embeds, got None"),
    "mask": ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 32)}, "prompt_attention_mask: expected exactly when"),
    "negatives": ({"negative_prompt": ["a", "b"]}, "negative_prompt: expected one text or 1, got 2"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps: expected a whole number from 1, got 0"),
    "tokens": ({"max_sequence_length": 0}, "max_sequence_length: expected a whole number from 1, got 0"),
    "both": ({"timesteps": [3], "sigmas": [1.0]}, "timesteps: expected None together with sigmas, got a list"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(ours: PixArtPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        latents(ours, **{"prompt": "a cat", **arguments})
