"""Every bad argument gets one sentence that names it, what was expected and what came."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from kolors_fast.pipelines.kolors import KolorsPipeline

EMBEDS, POOLED = torch.zeros(1, 256, 32), torch.zeros(1, 32)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt: expected a prompt or prompt_embeds, got None"),
    ({"prompt": 7}, "prompt: expected a string or a non-empty list of strings, got 7"),
    ({"prompt": []}, r"prompt: expected a string or a non-empty list of strings, got \[\]"),
    ({"negative_prompt": [1]}, r"negative_prompt: expected a string or a non-empty list of strings, got \[1\]"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt: expected one string or 1, got 2"),
    ({"height": 60}, "height: expected a positive multiple of 8, got 60"),
    ({"width": 0}, "width: expected a positive multiple of 8, got 0"),
    ({"width": 64.0}, r"width: expected a positive multiple of 8, got 64\.0"),
    ({"num_inference_steps": 0}, "num_inference_steps: expected a whole number from 1, got 0"),
    ({"num_inference_steps": 2.5}, r"num_inference_steps: expected a whole number from 1, got 2\.5"),
    ({"num_inference_steps": True}, "num_inference_steps: expected a whole number from 1, got True"),
    ({"num_inference_steps": 1200}, "num_inference_steps: expected 1 to num_train_timesteps=1100, got 1200"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt: expected a whole number from 1, got 0"),
    ({"max_sequence_length": 257}, "max_sequence_length: expected 2 to 256, got 257"),
    ({"max_sequence_length": 1}, "max_sequence_length: expected 2 to 256, got 1"),
    ({"output_type": "jpg"}, "output_type: expected one of pil, np, pt, latent, got 'jpg'"),
    ({"denoising_end": 1.5}, r"denoising_end: expected a share of the run above 0 and up to 1, got 1\.5"),
    ({"timesteps": [9], "sigmas": [1.0, 0.0]}, "timesteps: expected None together with sigmas"),
    (
        {"guidance_scale": [5.0, 6.0]},
        r"guidance_scale: expected a finite number, or 1 for as many prompts, got \[5.0, 6",
    ),
    ({"guidance_scale": "5"}, "guidance_scale: expected a finite number, or 1 for as many prompts, got '5'"),
    ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number, .* got nan"),
    ({"ip_adapter_image": "cat.png"}, "ip_adapter_image: expected None, for image prompts are not supported, got str"),
    ({"ip_adapter_image_embeds": []}, "ip_adapter_image_embeds: expected None, .* got list"),
    (
        {"negative_target_size": (8, 8)},
        r"negative_original_size: expected negative_target_size beside it, got None and",
    ),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"callback_on_step_end_tensor_inputs: .* got \['noise'\]"),
    ({"generator": [torch.Generator()] * 2}, "generator: expected a list of 1 generators, got 2"),
    ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents: expected a tensor \[1, 4, 16, 12\], got a tensor \[1, 4, 8, 8\]"),
    ({"latents": torch.full((1, 4, 16, 12), torch.nan)}, "latents: expected finite values, got NaN or infinity"),
    (
        {"latents": torch.zeros(1, 4, 16, 12).half()},
        "latents: expected the dtype of the unet, torch.float32, got torch.f",
    ),
    ({"cross_attention_kwargs": {"ip_adapter_masks": 1}}, "cross_attention_kwargs: expected no key but 'scale', got"),
    ({"prompt_embeds": EMBEDS}, "prompt_embeds: expected None together with prompt, got a tensor"),
    ({"negative_prompt": "a", "negative_prompt_embeds": EMBEDS}, "negative_prompt_embeds: expected None together with"),
    ({"prompt": None, "prompt_embeds": EMBEDS}, "pooled_prompt_embeds: expected exactly when prompt_embeds is given"),
    (
        {"negative_pooled_prompt_embeds": POOLED},
        "negative_pooled_prompt_embeds: expected exactly when negative_prompt_em",
    ),
]


def embeds(**changes: Any) -> dict[str, Any]:
    given = {"prompt": None, "prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOLED}
    return {**given, **changes}


BAD_EMBEDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt_embeds": EMBEDS[0]}, r"prompt_embeds: expected a tensor \[batch, tokens, features\], got"),
    (
        {"pooled_prompt_embeds": POOLED[0]},
        r"pooled_prompt_embeds: expected a tensor \[1, features\] like prompt_embeds",
    ),
    ({"pooled_prompt_embeds": torch.zeros(1, 9)}, "pooled_prompt_embeds: expected 32 features, got 9"),
    (
        {"prompt_embeds": EMBEDS.half()},
        "prompt_embeds: expected the dtype of the unet, torch.float32, got torch.float16",
    ),
    ({"pooled_prompt_embeds": POOLED.half()}, "pooled_prompt_embeds: expected the dtype of the unet"),
    (
        {"prompt_embeds": EMBEDS[:, :99]},
        r"prompt_embeds: expected \[256, 32\] tokens and features per prompt, got \[99",
    ),
    (
        {"negative_prompt_embeds": EMBEDS[:, :99], "negative_pooled_prompt_embeds": POOLED},
        r"negative_prompt_embeds: expected the shape of prompt_embeds, a tensor \[1, 256, 32\], got a tensor \[1, 99",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_arguments(ours: KolorsPipeline, arguments: dict[str, Any], message: str) -> None:
    call = {"prompt": "a cat", "height": 64, "width": 48, "num_inference_steps": 2, **arguments}
    with pytest.raises(ValueError, match="^" + message):
        ours(**call)


@pytest.mark.parametrize(("changes", "message"), BAD_EMBEDS, ids=[message[:40] for _, message in BAD_EMBEDS])
def test_bad_features(ours: KolorsPipeline, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        ours(**embeds(**changes), height=64, width=48, num_inference_steps=2)


def test_negative_features_for_another_number_of_prompts(ours: KolorsPipeline) -> None:
    given = {"negative_prompt_embeds": EMBEDS, "negative_pooled_prompt_embeds": POOLED}
    with pytest.raises(ValueError, match="negative_prompt_embeds: expected one for each of 2 prompts, got 1"):
        ours(["a", "b"], **given, num_inference_steps=2)


def test_sizes_fit_the_autoencoder_too(ours: KolorsPipeline) -> None:
    ours.vae_scale_factor = 16
    with pytest.raises(ValueError, match="height: expected a positive multiple of 16, got 72"):
        ours("a cat", height=72, width=64)


def test_mixed_components(ours: KolorsPipeline) -> None:
    ours.text_encoder.to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"text_encoder: expected the dtype of the unet, torch\.float32, got torch\.bf"
    ):
        ours("a cat")
    ours.text_encoder.to(torch.float32)
    ours.vae.to("meta")
    with pytest.raises(ValueError, match="vae: expected the device of the unet, cpu, got meta"):
        ours("a cat")


def test_foreign_scheduler(ours: KolorsPipeline) -> None:
    ours.scheduler = diffusers.EulerDiscreteScheduler.from_config(ours.scheduler.config)
    with pytest.raises(ValueError, match=r"scheduler: expected one of kolors_fast\.schedulers, .* got diffusers"):
        ours("a cat")


def test_schedules_that_a_scheduler_does_not_take(ours: KolorsPipeline) -> None:
    from kolors_fast.schedulers import DDIMScheduler

    ours.scheduler = DDIMScheduler.from_config(ours.scheduler.config)
    with pytest.raises(ValueError, match="timesteps: expected None with DDIMScheduler, which chooses its own"):
        ours("a cat", timesteps=[500, 100])
    with pytest.raises(ValueError, match=r"eta: expected 0 \(DDIM\) to 1 \(DDPM\), got 2"):
        ours("a cat", eta=2)


def test_overflow_is_told_and_not_drawn(ours: KolorsPipeline) -> None:
    with torch.no_grad():
        ours.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"the denoised latents hold NaN or infinity in torch\.float32"):
        ours("a cat", num_inference_steps=2)
