"""Models and their parts: ours beside diffusers eager and diffusers under torch.compile, and each saving left out.

    pytest bench/bench_models.py --benchmark-only

The providers of a group share weights and inputs, and must agree before any of them is timed, in turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from providers import PROVIDERS, STEP_PROVIDERS, TOLERANCE, agreeing, steps, without_savings
from torch import Tensor

from kolors_fast import AutoencoderKL, ChatGLM, ChatGLMTokenizer, KolorsPipeline, KolorsUNet
from kolors_fast.assets import bundled
from kolors_fast.benchmark_models import KOLORS_VAE
from kolors_fast.models.conditioning import Conditioning
from kolors_fast.models.unet_blocks import TransformerBlock
from kolors_fast.models.unet_conditioning import Prompt, balanced, collapse_pads
from kolors_fast.savings import SAVINGS

diffusers = pytest.importorskip("diffusers", reason="the rival is diffusers, which is not installed")

PROMPT = "红色圆形在蓝色方块左边"

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
KOLORS_UNET = {
    **SMALL_UNET,
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 5632,
    "encoder_hid_dim": 4096,
}
# a step alone has no table of steps, and the others are of other models
EACH_OFF = [name for name in SAVINGS if name not in ("step_table", "gelu", "joint_qkv")]
WITHOUT = [f"without {name}" for name in EACH_OFF]
REAL_TOKENS = 20  # of 256, the others are pads: equal states


def _unet_inputs(config: dict[str, Any], side: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    width = config["encoder_hid_dim"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    text = normal(2, 256, width)
    text[:, : 256 - REAL_TOKENS] = text[:, :1]
    return {
        "sample": normal(2, 4, side, side),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": text,
        "added_cond_kwargs": {
            "text_embeds": normal(2, width),
            "time_ids": torch.tensor([[8.0 * side, 8 * side, 0, 0, 8 * side, 8 * side]] * 2, device=device),
        },
        "return_dict": False,
    }


def _step_of(config: dict[str, Any], side: int, device: str, dtype: torch.dtype, selected: set[str]) -> dict[str, Any]:
    """One UNet step by every provider."""
    torch.manual_seed(0)
    inputs = _unet_inputs(config, side, device, dtype)
    with torch.device(device):
        rival = diffusers.UNet2DConditionModel(**config).eval().to(dtype)

    def ours() -> Callable[[], Any]:
        with torch.device("meta"):
            model = KolorsUNet(**config).eval()
        model.load_state_dict({name: value.clone() for name, value in rival.state_dict().items()}, assign=True)
        return partial(model, **inputs)

    return steps(rival, inputs, ours, EACH_OFF, device, dtype, selected)


def _race_steps(race: Any, provider: str, device: str, selected: set[str], what: str) -> None:
    """Several steps in a row, as in a run: the one after another model's finds the caches full of its weights."""
    if device == "cpu":
        group = f"{what}, 33M, latent 32x32, CFG batch 2, 20 of 256 text tokens, float32"
        line_up = partial(_step_of, SMALL_UNET, 32, device, torch.float32, selected)
        race(group, provider, line_up, rounds=11, iterations=5)
    else:
        group = f"{what}, Kolors 2.58B, 1024x1024, CFG batch 2, 20 of 256 text tokens, bfloat16"
        line_up = partial(_step_of, KOLORS_UNET, 128, device, torch.bfloat16, selected)
        race(group, provider, line_up, rounds=11, iterations=5, memory=True)


@pytest.mark.parametrize("provider", STEP_PROVIDERS)
def test_unet_step(race: Any, provider: str, device: str, selected: set[str]) -> None:
    if device == "cpu" and provider == "kolors_fast_graph":
        pytest.skip("a CPU has no CUDA graphs")
    _race_steps(race, provider, device, selected - set(WITHOUT), "UNet step")


@pytest.mark.parametrize("provider", ["kolors_fast", *WITHOUT])
def test_savings(race: Any, provider: str, device: str, selected: set[str]) -> None:
    _race_steps(race, provider, device, selected & {"kolors_fast", *WITHOUT}, "UNet step without one saving")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_host_overhead_of_a_step(race: Any, provider: str, device: str, selected: set[str]) -> None:
    """A latent of 4x4, whose kernels take next to nothing: what is left is the host."""
    race(
        "UNet step, 33M, latent 4x4: host",
        provider,
        lambda: _step_of(SMALL_UNET, 4, device, torch.float32, selected),
        rounds=15,
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_transformer_block(race: Any, provider: str, device: str) -> None:
    """Kolors' own sizes on a GPU, those of the 33M UNet on a CPU; the prompt is read beforehand, as in a run."""
    tokens, dim, heads, text, dtype = (
        (64, 256, 4, 256, torch.float32) if device == "cpu" else (1024, 1280, 20, 2048, torch.bfloat16)
    )

    def line_up() -> dict[str, Any]:
        torch.manual_seed(0)
        from diffusers.models.attention import BasicTransformerBlock

        rival = BasicTransformerBlock(dim, heads, dim // heads, cross_attention_dim=text, activation_fn="geglu")
        rival = rival.eval().to(device, dtype)
        ours = TransformerBlock(dim, heads, text).eval().to(device, dtype)
        ours.load_state_dict(rival.state_dict())
        x = torch.randn(2, tokens, dim, device=device, dtype=dtype)
        states = torch.randn(2, 256, text, device=device, dtype=dtype)
        states[:, : 256 - REAL_TOKENS] = states[:, :1]
        with torch.no_grad():
            found = collapse_pads(states)
            assert found is not None
            short, bias = found
            prompt = Prompt(short, balanced(bias, dtype), x, [ours.attn2])
        cond = Conditioning(prompt, {})

        def block() -> list[Tensor]:
            return [torch.add(*ours(x, None, cond))]

        torch.compiler.reset()
        compiled = torch.compile(rival)
        calls = {
            "diffusers": lambda: [rival(x, encoder_hidden_states=states)],
            "diffusers_compile": lambda: [compiled(x, encoder_hidden_states=states)],
            "reference": block,
            "kolors_fast": block,
        }
        return agreeing(calls, **TOLERANCE[dtype])

    group = f"transformer block 2x{tokens}x{dim}, 20 of 256 text tokens, {dtype}".replace("torch.", "")
    race(group, provider, line_up, rounds=20, iterations=5, graph=True)


@pytest.mark.parametrize("provider", ["diffusers", "kolors_fast_full", "kolors_fast"])
def test_text_encoding(race: Any, provider: str, device: str) -> None:
    """The bundled encoder on a prompt and an empty one: 256 tokens each, or as many as there are and one pad."""

    def line_up() -> dict[str, Any]:
        from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

        folder = bundled("kolors-tiny")
        ours = ChatGLM.from_pretrained(folder, subfolder="text_encoder", torch_dtype=torch.float32).to(device)
        tokenizer = ChatGLMTokenizer.from_pretrained(folder, subfolder="tokenizer")
        rival = ChatGLMModel(ChatGLMConfig(**{**ours.config, "use_cache": False}), empty_init=False)
        rival = rival.float().eval().to(device)
        rival.load_state_dict(ours.state_dict(), strict=False)
        tokens = tokenizer([PROMPT, ""], padding="max_length", max_length=256, truncation=True).to(device)

        def theirs() -> list[Tensor]:
            states = rival(**tokens, output_hidden_states=True).hidden_states
            return [states[-1][-1]]  # the pooled text

        calls = {
            "diffusers": theirs,
            "kolors_fast_full": lambda: [ours.text_features(**tokens)[1]],
            "kolors_fast": lambda: [ours.text_features_collapsed(**tokens)[2]],
        }
        return agreeing(calls, rtol=1e-3, atol=1e-3)

    race("text encoding, bundled model, one prompt and the empty one", provider, line_up, rounds=15)


@pytest.mark.parametrize("provider", ["diffusers", "diffusers_compile", "kolors_fast"])
def test_first_picture_of_a_process(race: Any, provider: str, device: str) -> None:
    """From starting Python to the picture: imports, loading, compiling, one picture of the bundled model."""
    theirs = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench_models as b; "
    scripts = {
        "diffusers": theirs + "b._picture(b._diffusers_pipeline(False))",
        "diffusers_compile": theirs + "b._picture(b._diffusers_pipeline(True))",
        "kolors_fast": "from kolors_fast import KolorsPipeline as P; "
        f"P.from_pretrained('kolors-tiny')({PROMPT!r}, num_inference_steps=25)",
    }

    def start(code: str) -> None:
        environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)

    def line_up() -> dict[str, Any]:
        return {name: (partial(start, script), None) for name, script in scripts.items()}

    race("first picture of a process, bundled model, 25 steps", provider, line_up, rounds=3, warmup=0)


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


def _picture(pipeline: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = pipeline(
            PROMPT,
            num_inference_steps=25,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
    return torch.from_numpy(np.asarray(images))


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
            "reference": KolorsPipeline.from_pretrained(bundled("kolors-tiny"), torch_dtype=torch.float32),
            "kolors_fast": ours,
        }
        for pipeline in pipelines.values():
            pipeline.set_progress_bar_config(disable=True)
        calls = {name: partial(_picture, pipeline) for name, pipeline in pipelines.items()}
        calls["reference"] = without_savings(SAVINGS, calls["reference"])
        return agreeing(calls, rtol=0, atol=1e-2)

    side = 8 * KolorsUNet.load_config(bundled("kolors-tiny"), subfolder="unet")["sample_size"]
    race(f"one {side}x{side} picture, bundled model, 25 steps, CFG", provider, line_up, rounds=5)


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
        return agreeing(
            {n: partial(decode, latent, return_dict=False) for n, decode in decoders.items()}, rtol=0, atol=atol
        )

    race(f"decode one {8 * side}x{8 * side} picture, {weights}", provider, line_up, rounds=10, memory=True)
