"""SD3's pipeline against diffusers', on the same random weights, written by diffusers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from kolors_fast import SD3Pipeline, savings, use_backend, without
from kolors_fast.pipelines.text_encoders import load_text_encoder, load_tokenizer
from kolors_fast.sampling.graphs import StepGraphs

from .text_models import JOINT_DIM, POOLED_DIM, write_sd3_text

TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 16,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": JOINT_DIM,
    "caption_projection_dim": 24,
    "pooled_projection_dim": POOLED_DIM,
    "out_channels": 16,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
VAE: dict[str, Any] = {  # 16 channels, without the 1x1 convolutions, scaled and shifted: as SD3's
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CALL = {"num_inference_steps": 4, "max_sequence_length": 9}  # of which prompts lose their ends
# of 4 steps the one between 1 and 3, both exclusive
SKIP = {"skip_guidance_layers": [1, 2], "skip_layer_guidance_start": 0.25, "skip_layer_guidance_stop": 0.75}
ALL = tuple(savings.SAVINGS)
pytestmark = pytest.mark.filterwarnings("ignore:text_encoder_3. the prompt has")


def write_pipeline(folder: Path, **scheduler: Any) -> Any:
    """diffusers' pipeline, whose folder this is."""
    write_sd3_text(folder)
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(**TRANSFORMER)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm1" in name or "context" in name:  # so that text and time show in the picture
                parameter.mul_(3)
    parts: dict[str, Any] = {}
    for suffix, text_class, tokenizer_class in (
        ("", "CLIPTextModelWithProjection", "CLIPTokenizer"),
        ("_2", "CLIPTextModelWithProjection", "CLIPTokenizer"),
        ("_3", "T5EncoderModel", "T5TokenizerFast"),
    ):
        parts[f"text_encoder{suffix}"] = load_text_encoder(folder, f"text_encoder{suffix}", text_class)
        parts[f"tokenizer{suffix}"] = load_tokenizer(folder, f"tokenizer{suffix}", tokenizer_class)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        vae=diffusers.AutoencoderKL(**VAE).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sd3")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return write_pipeline(folder)


@pytest.fixture
def ours(theirs: Any, folder: Path) -> SD3Pipeline:
    pipeline = SD3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: Any, prompt: Any = "a photo of a cat", **arguments: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn: Tensor = pipeline(prompt, generator=generator, output_type="latent", **{**CALL, **arguments}).images
    return drawn


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().abs().max() / want.detach().abs().max())


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without guidance": {"guidance_scale": 1.0},
    "other texts": {"prompt_2": "two red circles", "prompt_3": "a dog", "negative_prompt": "a fox"},
    "several": {"prompt": ["a cat", "the lazy dog"], "num_images_per_prompt": 2, "negative_prompt": ["a fox", ""]},
    "not square": {"height": 24, "width": 40},
    "own sigmas": {"sigmas": [1.0, 0.7, 0.2]},
    "clip_skip": {"clip_skip": 1},
    "skip-layer guidance": SKIP,
    "skip-layer guidance of several": {"prompt": ["a cat", "a dog"], **SKIP},
    "last layer skipped": {"skip_guidance_layers": [3], "skip_layer_guidance_stop": 0.8},
    "skipped layers without guidance": {"guidance_scale": 1.0, **SKIP},
}


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS.keys())
def test_latents_are_those_of_diffusers(theirs: Any, ours: SD3Pipeline, arguments: dict[str, Any]) -> None:
    assert relative(latents(ours, **arguments), latents(theirs, **arguments)) < 1e-5


@pytest.mark.parametrize("missing", [("3",), ("",), ("", "_2", "_3")], ids=str)
def test_missing_encoders(theirs: Any, folder: Path, missing: tuple[str, ...]) -> None:
    suffixes = ["_3"] if missing == ("3",) else list(missing)
    none = {f"{kind}{suffix}": None for kind in ("text_encoder", "tokenizer") for suffix in suffixes}
    pipeline = SD3Pipeline.from_pretrained(folder, **none)
    pipeline.set_progress_bar_config(disable=True)
    found = latents(pipeline)
    if suffixes == ["_3"]:  # diffusers can do without T5 only
        rival = diffusers.StableDiffusion3Pipeline(**{**theirs.components, **none})
        rival.set_progress_bar_config(disable=True)
        assert relative(found, latents(rival)) < 1e-5
    elif len(suffixes) == 3:  # no text at all: every prompt draws the same
        assert torch.equal(found, latents(pipeline, "a fox"))
    else:
        assert relative(found, latents(pipeline, "a fox")) > 1e-3


def test_pictures_are_those_of_diffusers(theirs: Any, ours: SD3Pipeline) -> None:
    drawn = [
        pipeline("a cat", generator=torch.Generator().manual_seed(3), output_type="np", **CALL).images
        for pipeline in (theirs, ours)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() < 1e-4
    assert ours("a cat", **CALL).images[0].size == (32, 32)


@pytest.mark.parametrize("config", [{"use_dynamic_shifting": True}, {"use_karras_sigmas": True}], ids=str)
def test_other_schedules(tmp_path: Path, config: dict[str, Any]) -> None:
    theirs = write_pipeline(tmp_path, **config)
    pipeline = SD3Pipeline.from_pretrained(tmp_path)
    assert relative(latents(pipeline), latents(theirs)) < 1e-5
    if "use_dynamic_shifting" in config:
        assert relative(latents(pipeline, mu=0.8), latents(theirs, mu=0.8)) < 1e-5
        assert relative(latents(pipeline, mu=0.8), latents(theirs)) > 1e-3


def test_encode_prompt(theirs: Any, ours: SD3Pipeline) -> None:
    arguments = {"prompt": ["a cat", "a dog"], "negative_prompt": "a fox", "max_sequence_length": 9}
    expected = theirs.encode_prompt(prompt_2=None, prompt_3=None, num_images_per_prompt=2, **arguments)
    for got, want in zip(ours.encode_prompt(num_images_per_prompt=2, **arguments), expected, strict=True):
        assert relative(got, want) < 1e-5
    positive, nothing, pooled, none = ours.encode_prompt("a cat", do_classifier_free_guidance=False)
    assert nothing is None and none is None
    again = ours.encode_prompt("a cat")
    features = dict(zip(("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
                         "negative_pooled_prompt_embeds"), again, strict=True))  # fmt: skip
    assert torch.equal(positive, again[0]) and torch.equal(pooled, again[2])
    assert torch.equal(latents(ours, None, **features), latents(ours, "a cat", max_sequence_length=None))


def test_guidance_of_each_prompt_is_that_of_the_prompt_alone(ours: SD3Pipeline) -> None:
    noise = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    prompts, scales = ["a cat", "a dog", "a fox"], [7.0, 1.0, 3.0]
    together = latents(ours, prompts, guidance_scale=scales, latents=noise, **SKIP)
    for i, (prompt, scale) in enumerate(zip(prompts, scales, strict=True)):
        own = SKIP if scale > 1 else {}
        if not own:
            continue  # alone it runs without guidance, and so without skipped layers
        alone = latents(ours, prompt, guidance_scale=scale, latents=noise[i : i + 1], **own)
        assert relative(together[i : i + 1], alone) < 1e-5


def test_captured_steps_are_the_eager_ones(ours: SD3Pipeline) -> None:
    eager = latents(ours, **SKIP)
    ours._graphs = StepGraphs(ours.transformer, record=lambda program: program.run)  # in the place of a CUDA graph
    assert torch.equal(latents(ours, **SKIP), eager)
    assert len(ours._graphs) == 2  # with and without the third prediction
    latents(ours, skip_guidance_layers=[2], skip_layer_guidance_stop=0.8)
    assert len(ours._graphs) == 3
    latents(ours, "another prompt", **SKIP)
    assert len(ours._graphs) == 3


def test_fused_trajectory_is_the_reference(ours: SD3Pipeline) -> None:
    fused = latents(ours, **SKIP)
    with use_backend("reference"), without(*ALL):
        reference = latents(ours, **SKIP)
    assert relative(fused, reference) < 1e-5
    assert not torch.equal(fused, reference)  # two ways of computing it


def test_a_callback_replaces_tensors(theirs: Any, ours: SD3Pipeline) -> None:
    def change(_pipeline: Any, row: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if row == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"] * 2
            tensors["latents"] = tensors["latents"] + 0.1
        return tensors

    arguments = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }
    assert relative(latents(ours, **arguments), latents(theirs, **arguments)) < 1e-5


def test_saved_pipelines_are_read_by_both(theirs: Any, ours: SD3Pipeline, tmp_path: Path) -> None:
    expected = latents(ours)
    ours.save_pretrained(tmp_path)
    assert torch.equal(latents(SD3Pipeline.from_pretrained(tmp_path)), expected)
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again), latents(theirs))
    without_t5 = SD3Pipeline(**{**ours.components, "text_encoder_3": None, "tokenizer_3": None})
    without_t5.save_pretrained(tmp_path / "small")
    index = json.loads((tmp_path / "small" / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None]
    assert SD3Pipeline.from_pretrained(tmp_path / "small").text_encoder_3 is None


def test_bfloat16(ours: SD3Pipeline) -> None:
    wide = latents(ours)
    assert relative(latents(ours.to(torch.bfloat16)).float(), wide) < 0.1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "size": ({"height": 36}, "height: expected a positive multiple of 8, got 36"),
    "prompt": ({"prompt": 3}, "prompt: expected a string or a non-empty list of strings, got 3"),
    "no prompt": ({"prompt": None}, "prompt: expected a prompt or prompt_embeds, got None"),
    "prompt_2": ({"prompt": ["a", "b"], "prompt_2": ["a"]}, "prompt_2: expected one string or 2, got 1"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps: expected a whole number from 1, got 0"),
    "tokens": ({"max_sequence_length": 900}, "max_sequence_length: expected 1 to 512, got 900"),
    "layers": ({**SKIP, "skip_guidance_layers": [4]}, "skip_layers: expected numbers from 0 to 3, got [4]"),
    "lora": ({"joint_attention_kwargs": {"x": 1}}, "joint_attention_kwargs: expected no key but 'scale', got ['x']"),
    "picture": ({"ip_adapter_image": 1}, "ip_adapter_image: expected None, for image prompts"),
    "too large": ({"height": 104}, "hidden_states: expected sides up to 24"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(ours: SD3Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        latents(ours, **{"prompt": "a cat", **arguments})


def test_a_folder_of_another_system(theirs: Any, folder: Path, tmp_path: Path) -> None:
    from kolors_fast import KolorsPipeline, PixArtPipeline
    from kolors_fast.pipelines.load import load_pipeline

    for kind, part in ((KolorsPipeline, "text_encoder"), (PixArtPipeline, "tokenizer")):
        with pytest.raises(OSError, match=f"{part}: expected the class"):
            kind.from_pretrained(folder)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(OSError, match="_class_name: expected one of KolorsPipeline, StableDiffusion3Pipeline"):
        load_pipeline(tmp_path)
    assert isinstance(load_pipeline(folder), SD3Pipeline)
    with pytest.raises(ValueError, match="text_encoder_4: expected a component, one of transformer, vae"):
        SD3Pipeline.from_pretrained(folder, text_encoder_4=None)
