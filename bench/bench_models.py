"""One UNet step and one whole picture: ours beside diffusers eager and diffusers under torch.compile.

    pytest bench/bench_models.py --benchmark-only

The providers of a group share weights and inputs, and must agree before any of them is timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
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
def test_unet_step(benchmark: Any, provider: str, device: str) -> None:
    torch.manual_seed(0)
    rival = diffusers.UNet2DConditionModel(**SMALL_UNET).eval().to(device)
    inputs = _unet_inputs(device)
    run: Callable[..., Any] = rival
    if provider == "diffusers_compile":
        torch.compiler.reset()
        run = torch.compile(rival)
    elif provider in ("reference", "kolors_fast"):
        run = KolorsUNet(**SMALL_UNET).eval().to(device, memory_format=torch.channels_last)
        run.load_state_dict(rival.state_dict())
    with torch.no_grad(), use_backend("reference" if provider == "reference" else None):
        torch.testing.assert_close(run(**inputs)[0], rival(**inputs)[0], rtol=1e-3, atol=1e-4)
        benchmark.group, benchmark.name = "UNet step, 33M, latent 32x32, CFG batch 2, 256 text tokens", provider
        benchmark.pedantic(lambda: run(**inputs), rounds=15, warmup_rounds=3)


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


def _picture(pipeline: Any, steps: int) -> np.ndarray[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = pipeline(
            "红色圆形在蓝色方块左边",
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
    return np.asarray(images)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_whole_picture(benchmark: Any, provider: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("the bundled model is compared on the CPU")
    if provider.startswith("diffusers"):
        torch.compiler.reset()
        pipeline = _diffusers_pipeline(provider.endswith("compile"))
    else:
        pipeline = KolorsPipeline.from_pretrained(bundled("kolors-tiny"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with use_backend("reference" if provider == "reference" else None):
        truth = _picture(_diffusers_pipeline(compiled=False), steps=4)
        assert np.abs(_picture(pipeline, steps=4) - truth).max() < 1e-2
        side = _picture(pipeline, steps=1).shape[1]
        benchmark.group, benchmark.name = f"one {side}x{side} picture, bundled model, 25 steps, CFG", provider
        benchmark.pedantic(lambda: _picture(pipeline, steps=25), rounds=5, warmup_rounds=1)


def test_autoencoder_decode(benchmark: Any, device: str) -> None:
    """The bundled autoencoder alone: what share of a picture it is."""
    vae = AutoencoderKL.from_pretrained(bundled("kolors-tiny"), subfolder="vae", torch_dtype=torch.float32).to(device)
    side = KolorsUNet.load_config(bundled("kolors-tiny"), subfolder="unet")["sample_size"]
    latent = torch.randn(1, vae.config.latent_channels, side, side, device=device)
    with torch.no_grad():
        pixels = vae.decode(latent)[0].shape[-1]
        benchmark.group, benchmark.name = f"decode one {pixels}x{pixels} picture", "kolors_fast"
        benchmark.pedantic(lambda: vae.decode(latent), rounds=10, warmup_rounds=2)
