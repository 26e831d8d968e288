"""One UNet step and one whole picture: ours beside diffusers eager and diffusers under torch.compile.

    pytest bench/bench_models.py --benchmark-only

The providers of a group share weights and inputs, and must agree before any of them is timed, in turns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kolors_fast import AutoencoderKL, ChatGLM, ChatGLMTokenizer, KolorsPipeline, KolorsUNet
from kolors_fast.assets import bundled
from kolors_fast.ops import use_backend

diffusers = pytest.importorskip("diffusers", reason="the rival is diffusers, which is not installed")

# Kolors' architecture at 33M parameters, so that a CPU takes a step in a fraction of a second
SMALL_UNET = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 4),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 256,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 512 + 6 * 32,
    "encoder_hid_dim": 512,
    "encoder_hid_dim_type": "text_proj",
}
PROVIDERS = ("diffusers", "diffusers_compile", "reference", "kolors_fast")


def _unet_inputs(device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return {
        "sample": normal(2, 4, 32, 32),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": normal(2, 256, 512),
        "added_cond_kwargs": {
            "text_embeds": normal(2, 512),
            "time_ids": torch.tensor([[256.0, 256, 0, 0, 256, 256]] * 2, device=device),
        },
        "return_dict": False,
    }


@pytest.mark.parametrize("provider", PROVIDERS)
def test_unet_step(race: Any, provider: str, device: str) -> None:
    def line_up() -> dict[str, Any]:
        torch.manual_seed(0)
        inputs = _unet_inputs(device)
        rival = diffusers.UNet2DConditionModel(**SMALL_UNET).eval().to(device)
        ours = KolorsUNet(**SMALL_UNET).eval().to(device, memory_format=torch.channels_last)
        ours.load_state_dict(rival.state_dict())
        torch.compiler.reset()
        models = {"diffusers": rival, "diffusers_compile": torch.compile(rival), "reference": ours, "kolors_fast": ours}
        return _agreeing({name: partial(model, **inputs) for name, model in models.items()}, rtol=1e-3, atol=1e-4)

    race("UNet step, 33M, latent 32x32, CFG batch 2, 256 text tokens", provider, line_up, rounds=15)


def _agreeing(calls: dict[str, Callable[[], Any]], **tolerance: float) -> dict[str, Any]:
    """The providers of a race, if the first output of each is the first provider's."""
    providers = {name: (call, "reference" if name == "reference" else None) for name, call in calls.items()}
    outputs = []
    for call, backend in providers.values():
        with torch.no_grad(), use_backend(backend):
            outputs.append(call()[0])
        torch.testing.assert_close(outputs[-1], outputs[0], **tolerance)
    return providers


def _diffusers_pipeline(compiled: bool) -> Any:
    """diffusers' own pipeline, UNet, VAE and scheduler on the bundled weights; the text encoder is ours in both."""
    folder = bundled("kolors-tiny")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    return diffusers.KolorsPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32),
        text_encoder=ChatGLM.from_pretrained(folder, subfolder="text_encoder", torch_dtype=torch.float32),
        tokenizer=ChatGLMTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        unet=torch.compile(unet) if compiled else unet,
        scheduler=diffusers.EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"),
    )


def _picture(pipeline: Any) -> np.ndarray[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = pipeline(
            "红色圆形在蓝色方块左边",
            num_inference_steps=25,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
    return np.asarray(images)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_whole_picture(race: Any, provider: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("the bundled model is compared on the CPU")

    def line_up() -> dict[str, Any]:
        torch.compiler.reset()
        ours = KolorsPipeline.from_pretrained(bundled("kolors-tiny"), torch_dtype=torch.float32)
        pipelines = {
            "diffusers": _diffusers_pipeline(compiled=False),
            "diffusers_compile": _diffusers_pipeline(compiled=True),
            "reference": ours,
            "kolors_fast": ours,
        }
        for pipeline in pipelines.values():
            pipeline.set_progress_bar_config(disable=True)
        return _agreeing({n: partial(_picture, p) for n, p in pipelines.items()}, rtol=0, atol=1e-2)

    side = 8 * KolorsUNet.load_config(bundled("kolors-tiny"), subfolder="unet")["sample_size"]
    race(f"one {side}x{side} picture, bundled model, 25 steps, CFG", provider, line_up, rounds=5)


KOLORS_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
}


@pytest.mark.parametrize("provider", [*PROVIDERS, "kolors_fast_tiled"])
@pytest.mark.parametrize("weights", ["bundled float32", "Kolors bfloat16", "Kolors float16"])
def test_autoencoder_decode(race: Any, provider: str, weights: str, device: str) -> None:
    """Time and peak memory of the decoder alone; Kolors' has random weights, which do not leave float16's range."""
    model, _, dtype_name = weights.partition(" ")
    if model == "Kolors" and device == "cpu":
        pytest.skip("a CPU takes minutes for Kolors' decoder at 1024x1024")
    side = 128 if model == "Kolors" else KolorsUNet.load_config(bundled("kolors-tiny"), subfolder="unet")["sample_size"]

    def line_up() -> dict[str, Any]:
        torch.manual_seed(0)
        dtype = getattr(torch, dtype_name)
        config = (
            AutoencoderKL.load_config(bundled("kolors-tiny"), subfolder="vae") if model == "bundled" else KOLORS_VAE
        )
        ours, tiled = (AutoencoderKL.from_config(config).eval().to(device, dtype) for _ in range(2))
        rival = diffusers.AutoencoderKL.from_config(dict(config)).eval().to(device, dtype)
        for other in (rival, tiled):
            other.load_state_dict(ours.state_dict())
        tiled.enable_tiling()
        torch.compiler.reset()
        decoders = {
            "diffusers": rival.decode,
            "diffusers_compile": torch.compile(rival.decode),
            "reference": ours.decode,
            "kolors_fast": ours.decode,
            "kolors_fast_tiled": tiled.decode,
        }
        latent = torch.randn(1, ours.config.latent_channels, side, side, device=device, dtype=dtype)
        atol = 1e-3 if dtype == torch.float32 else 0.2  # 0.09 for 128x128 pixels, of values up to 2.4
        return _agreeing(
            {n: partial(decode, latent, return_dict=False) for n, decode in decoders.items()}, rtol=0, atol=atol
        )

    race(f"decode one {8 * side}x{8 * side} picture, {weights}", provider, line_up, rounds=10, memory=True)
