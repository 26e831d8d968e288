"""What a training looks at now and then: pictures, and how many the oracle reads right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kolors_fast.data.shapes import HeldOutPrompt, facts, held_out_prompts, judge, render, sample_training
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm_tokenizer import ChatGLMTokenizer
from kolors_fast.models.unet import KolorsUNet
from kolors_fast.schedulers import EulerDiscreteScheduler

from .devices import sent_to

VALIDATION_SEED = 20240706  # the evaluation draws its prompts from seed 0
SAMPLES = 40
STEPS = 20
GUIDANCE = 5.0

Draw = Callable[[list[str], torch.Generator], Tensor]  # prompts -> scaled latents [B, C, h, w]


def validation_prompts(count: int = SAMPLES) -> list[HeldOutPrompt]:
    """Prompts of combinations that are held out from training, none of them among the evaluation's."""
    tested = {one.prompt for one in held_out_prompts()}
    fresh = [one for one in held_out_prompts(2 * count, VALIDATION_SEED) if one.prompt not in tested]
    return [one for k, one in enumerate(fresh) if k % 4 < 2]  # the languages alternate, the categories follow in order


@torch.no_grad()
def judge_reconstructions(vae: AutoencoderKL, path: Path, size: tuple[int, int], count: int = 96) -> dict[str, float]:
    """How well new scenes, rendered as (height, width), survive encoding and decoding; some go to `path`, the originals
    in its first row."""
    rng = np.random.default_rng(VALIDATION_SEED)
    scenes = [sample_training(rng)[0] for _ in range(count)]
    pictures = np.stack([render(scene, *size) for scene in scenes])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    means = torch.cat([vae.encode(part.to(vae.device))[0].mode() for part in pixels.split(16)])
    decoded = np.concatenate([to_pictures(vae.decode(part)[0]) for part in means.split(16)])
    right = [judge(picture, facts(scene)).correct for picture, scene in zip(decoded, scenes, strict=True)]
    write_grid(np.concatenate([pictures[:8], decoded[:8]]), path)
    return {
        "error": float(np.abs(decoded.astype(float) - pictures).mean() / 255),
        "read right": float(np.mean(right)),
        "latent std": float(means.std()),
    }


@torch.no_grad()
def judge_prompts(
    draw: Draw, vae: AutoencoderKL, path: Path, prompts: list[HeldOutPrompt] | None = None
) -> dict[str, float]:
    """Draw prompts (None: those of validation) and let the oracle judge; the pictures go to `path`."""
    prompts = prompts or validation_prompts()
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    drawn = []
    for start in range(0, len(prompts), 20):
        latents = draw([one.prompt for one in prompts[start : start + 20]], generator)
        drawn.append(decode(vae, latents))
    pictures = np.concatenate(drawn)
    verdicts = [judge(picture, one.request) for picture, one in zip(pictures, prompts, strict=True)]
    write_grid(pictures, path)
    figures = {"right": float(np.mean([verdict.correct for verdict in verdicts]))}
    for part in ("objects_ok", "colours_ok", "relation_ok"):
        figures[part.removesuffix("_ok")] = float(np.mean([getattr(verdict, part) for verdict in verdicts]))
    for category in dict.fromkeys(one.category for one in prompts):
        chosen = [v.correct for v, one in zip(verdicts, prompts, strict=True) if one.category == category]
        figures[category] = float(np.mean(chosen))
    return figures


@torch.no_grad()
def sample(
    unet: KolorsUNet,
    texts: tuple[Tensor, Tensor, Tensor],
    noise: Tensor,
    *,
    train_steps: int,
    beta_end: float,
    prediction: str = "epsilon",
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Scaled latents [B, C, h, w] from noise of that shape, guided: `texts` are states, key bias and pooled state of 2B
    captions, the empty ones first. `prediction` is the scheduler's."""
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=train_steps,
        beta_start=0.00085,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing="leading",
        steps_offset=1,
    )
    height, width = 8 * noise.shape[2], 8 * noise.shape[3]
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(2 * len(noise), -1)
    noise, sizes, (embeds, key_bias, pooled) = sent_to(unet, noise, sizes, texts)
    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, timestep)
        output = unet(
            torch.cat([noisy, noisy]),
            timestep,
            embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
            encoder_key_bias=key_bias,
            return_dict=False,
        )
        negative, positive = output[0].float().chunk(2)
        latents = scheduler.step(negative + guidance * (positive - negative), timestep, latents)[0]
    return latents


def encode(tokenizer: ChatGLMTokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, 256], padded on the left as at inference."""
    batch = tokenizer(texts, padding="max_length", max_length=256)
    return batch["input_ids"], batch["attention_mask"]


def noise_shape(vae: AutoencoderKL, side: int) -> tuple[int, int, int]:
    """C, h, w of the latents of a square picture."""
    cells = side // 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, cells, cells


def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Pictures uint8 [B, H, W, 3] of scaled latents [B, C, h, w]."""
    return to_pictures(vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0))[0])


def to_pictures(pixels: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]."""
    scaled = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def write_grid(pictures: np.ndarray, path: Path, columns: int = 8) -> None:
    """Pictures [B, H, W, 3] in rows, as one PNG."""
    columns = min(columns, len(pictures))
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    sheet = np.full((len(rows) * pictures.shape[1], columns * pictures.shape[2], 3), 255, np.uint8)
    for i, row in enumerate(rows):
        line = np.concatenate(list(row), axis=1)
        sheet[i * pictures.shape[1] : (i + 1) * pictures.shape[1], : line.shape[1]] = line
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
