"""What `kolors-fast bench` draws with: pipelines of random weights in released and in small sizes, and what is asked of
each kind of pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .assets import bundled
from .models.chatglm import ChatGLM
from .models.chatglm_tokenizer import ChatGLMTokenizer
from .models.checkpoint import Config
from .pipelines.kolors import KolorsPipeline
from .pipelines.pipeline import Pipeline
from .pipelines.pixart import PixArtPipeline
from .pipelines.sd3 import SD3Pipeline
from .schedulers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Scheduler,
)

REAL_TOKENS = 20  # of a random prompt of Kolors or PixArt; what follows or precedes them are pads
KOLORS_TOKENS, SD3_TOKENS, PIXART_TOKENS = 256, 77 + 256, 120

KOLORS_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
}
PIXART_VAE = {**KOLORS_VAE, "scaling_factor": 0.18215}
SD3_VAE = {
    **KOLORS_VAE,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SMALL = {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1}  # of an autoencoder

SD3_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM = {
    **SD3_MEDIUM,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
SD3_SMALL = {
    "sample_size": 32,
    "num_layers": 4,
    "num_attention_heads": 6,
    "joint_attention_dim": 512,
    "caption_projection_dim": 384,
    "pooled_projection_dim": 256,
}
PIXART_XL2_1024 = {"caption_channels": 4096}
PIXART_SMALL = {
    "sample_size": 32,
    "num_layers": 6,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "cross_attention_dim": 384,
    "caption_channels": 512,
}


class System(NamedTuple):
    """A kind of pipeline."""

    pipeline: type[Pipeline]
    prompt: str
    text: Callable[[Config, int], dict[str, Tensor | None]]  # arguments in its place, of the denoiser's config, random
    scheduler: Callable[[], Scheduler]  # as released models have it
    encoders: Callable[[], dict[str, Any]] = dict  # components that a pipeline needs where there is no text to read
    asked: Mapping[str, Any] = {}  # arguments of every call


def _kolors_text(config: Config, batch: int) -> dict[str, Tensor | None]:
    asked: dict[str, Tensor | None] = {}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    for prefix in ("", "negative_"):
        states = torch.randn(batch, KOLORS_TOKENS, config.encoder_hid_dim)
        states[:, : KOLORS_TOKENS - REAL_TOKENS] = states[:, :1]  # pads, which are equal
        asked[f"{prefix}prompt_embeds"] = states
        asked[f"{prefix}pooled_prompt_embeds"] = torch.randn(batch, pooled)
    return asked


def _sd3_text(config: Config, batch: int) -> dict[str, Tensor | None]:
    asked: dict[str, Tensor | None] = {}
    for prefix in ("", "negative_"):
        asked[f"{prefix}prompt_embeds"] = torch.randn(batch, SD3_TOKENS, config.joint_attention_dim)
        asked[f"{prefix}pooled_prompt_embeds"] = torch.randn(batch, config.pooled_projection_dim)
    return asked


def _pixart_text(config: Config, batch: int) -> dict[str, Tensor | None]:
    """The negative prompt is the empty one, of which one token is left."""
    asked: dict[str, Tensor | None] = {
        "negative_prompt": None
    }  # else diffusers takes it for given, beside its features
    for prefix, real in (("", REAL_TOKENS), ("negative_", 1)):
        asked[f"{prefix}prompt_embeds"] = torch.randn(batch, PIXART_TOKENS, config.caption_channels)
        asked[f"{prefix}prompt_attention_mask"] = (torch.arange(PIXART_TOKENS) < real).long().repeat(batch, 1)
    return asked


def _kolors_encoder() -> dict[str, Any]:
    return {
        "text_encoder": ChatGLM(num_layers=1, padded_vocab_size=8, hidden_size=8, ffn_hidden_size=8),
        "tokenizer": ChatGLMTokenizer.from_pretrained(bundled("kolors-tiny"), subfolder="tokenizer"),
    }


KOLORS = System(
    KolorsPipeline,
    "红色圆形在蓝色方块左边",
    _kolors_text,
    lambda: EulerDiscreteScheduler.from_pretrained(bundled("kolors-tiny"), subfolder="scheduler"),
    _kolors_encoder,
)
ENGLISH = "a red circle to the left of a blue square"
SD3 = System(SD3Pipeline, ENGLISH, _sd3_text, lambda: FlowMatchEulerDiscreteScheduler(shift=3.0))
PIXART = System(
    PixArtPipeline,
    ENGLISH,
    _pixart_text,
    DPMSolverMultistepScheduler,
    asked={"use_resolution_binning": False},  # which diffusers has for three sizes of models only
)

# what random weights there are: system, and configs of denoiser and autoencoder
CONFIGS: Mapping[str, tuple[System, Mapping[str, Any], Mapping[str, Any]]] = {
    "kolors": (KOLORS, {}, KOLORS_VAE),
    "sd3-medium": (SD3, SD3_MEDIUM, SD3_VAE),
    "sd3.5-medium": (SD3, SD35_MEDIUM, SD3_VAE),
    "pixart-xl2-1024": (PIXART, PIXART_XL2_1024, PIXART_VAE),
    "sd3-small": (SD3, SD3_SMALL, SD3_VAE | SMALL),
    "pixart-small": (PIXART, PIXART_SMALL, PIXART_VAE | SMALL),
}


def system_of(pipeline: Pipeline) -> System:
    return next(system for system in (KOLORS, SD3, PIXART) if isinstance(pipeline, system.pipeline))


def random_pipeline(
    system: System, denoiser: Mapping[str, Any], vae: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> Pipeline:
    """Denoiser and autoencoder with random weights, and text encoders that nobody asks, or none."""
    torch.manual_seed(0)
    parts = system.pipeline.parts
    components: dict[str, Any] = dict.fromkeys(parts)
    with device:
        for name, config in ((system.pipeline.denoiser_name, denoiser), ("vae", vae)):
            components[name] = parts[name].ours(**config)
        components |= system.encoders()
    for model in components.values():
        if isinstance(model, torch.nn.Module):
            model.to(dtype).eval()
    return system.pipeline(**components, scheduler=system.scheduler())


def random_text(pipeline: Pipeline, batch: int) -> dict[str, Any]:
    """Features of prompts and of their negatives, as the pipeline takes them."""
    found = system_of(pipeline).text(pipeline.denoiser.config, batch)
    return {
        name: None
        if value is None
        else value.to(pipeline.device, pipeline.dtype if value.is_floating_point() else None)
        for name, value in found.items()
    }
