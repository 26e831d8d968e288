"""Refusals of bad pipeline arguments: one sentence naming the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..schedulers import Scheduler
from .images import OUTPUT_TYPES

MAX_TEXT = 256  # tokens that Kolors' UNet was trained with


def expect(condition: bool, name: str, expected: str, got: Any) -> None:
    """Raise ValueError unless `condition`."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_size(height: Any, width: Any, factor: int) -> None:
    """Sides must be multiples of 8, as in diffusers, and of `factor`, a power of two: pixels that cannot be parted."""
    unit = max(8, factor)
    for name, value in (("height", height), ("width", width)):
        expect(whole(value) and value > 0 and value % unit == 0, name, f"a positive multiple of {unit}", repr(value))


def check_prompts(prompt: Any, negative_prompt: Any) -> None:
    for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        several = isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
        expect(
            value is None or isinstance(value, str) or several,
            name,
            "a string or a non-empty list of strings",
            f"{value!r:.80}",
        )


def check_guidance(scale: Any, prompts: int) -> float | tuple[float, ...]:
    """One number where all prompts share it, else one for each."""
    several = isinstance(scale, Sequence) and not isinstance(scale, str)
    scales = tuple(scale) if several else (scale,)
    finite = all(isinstance(one, Real) and not isinstance(one, bool) and math.isfinite(one) for one in scales)
    fits = finite and (not several or len(scales) == prompts)
    expect(fits, "guidance_scale", f"a finite number, or {prompts} for as many prompts", f"{scale!r:.80}")
    return scales[0] if len(set(scales)) == 1 else scales


def check_embeds(
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: Tensor | None,
    pooled_prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    negative_pooled_prompt_embeds: Tensor | None,
) -> None:
    """Either text or its features, and of the features both tensors, in matching shapes."""
    for prefix, text, embeds, pooled in (
        ("", prompt, prompt_embeds, pooled_prompt_embeds),
        ("negative_", negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds),
    ):
        name = f"{prefix}prompt_embeds"
        expect(text is None or embeds is None, name, f"None together with {prefix}prompt", "a tensor")
        pooled_name = f"{prefix}pooled_prompt_embeds"
        expect((embeds is None) == (pooled is None), pooled_name, f"exactly when {name} is given", _shape(pooled))
        if embeds is not None and pooled is not None:
            expect(embeds.dim() == 3, name, "a tensor [batch, tokens, features]", _shape(embeds))
            rows = f"a tensor [{embeds.shape[0]}, features] like {name}"
            expect(pooled.dim() == 2 and pooled.shape[0] == embeds.shape[0], pooled_name, rows, _shape(pooled))
    expect(prompt is not None or prompt_embeds is not None, "prompt", "a prompt or prompt_embeds", "None")
    if prompt_embeds is not None and negative_prompt_embeds is not None:
        shape = f"the shape of prompt_embeds, {_shape(prompt_embeds)}"
        same = negative_prompt_embeds.shape == prompt_embeds.shape
        expect(same, "negative_prompt_embeds", shape, _shape(negative_prompt_embeds))


def check_dtype(name: str, value: Tensor, denoiser_name: str, denoiser: nn.Module) -> None:
    expect(value.dtype == denoiser.dtype, name, f"the dtype of the {denoiser_name}, {denoiser.dtype}", value.dtype)


def check_choices(
    steps: Any, repeats: Any, output_type: Any, callback_names: Sequence[str], known: Sequence[str]
) -> None:
    """`known`: what a callback may read and replace, by diffusers' names."""
    expect(whole(steps) and steps >= 1, "num_inference_steps", "a whole number from 1", repr(steps))
    expect(whole(repeats) and repeats >= 1, "num_images_per_prompt", "a whole number from 1", repr(repeats))
    expect(output_type in OUTPUT_TYPES, "output_type", f"one of {', '.join(OUTPUT_TYPES)}", repr(output_type))
    unknown = [name for name in callback_names if name not in known]
    expect(not unknown, "callback_on_step_end_tensor_inputs", f"some of {', '.join(known)}", unknown)


def check_tokens(max_sequence_length: Any, shortest: int, longest: int) -> None:
    fits = whole(max_sequence_length) and shortest <= max_sequence_length <= longest
    expect(fits, "max_sequence_length", f"{shortest} to {longest}", repr(max_sequence_length))


def check_unsupported(**arguments: Any) -> None:
    for name, value in arguments.items():
        expect(value is None, name, "None, for image prompts are not supported", type(value).__name__)


def check_latents(latents: Tensor, shape: Sequence[int]) -> None:
    expect(tuple(latents.shape) == tuple(shape), "latents", f"a tensor {list(shape)}", _shape(latents))
    expect(bool(torch.isfinite(latents).all()), "latents", "finite values", "NaN or infinity")


def check_scheduler(scheduler: Any) -> None:
    own = "one of kolors_fast.schedulers, made by from_config(scheduler.config)"
    expect(isinstance(scheduler, Scheduler), "scheduler", own, type(scheduler).__module__)


def _shape(value: Tensor | None) -> str:
    return "None" if value is None else f"a tensor {list(value.shape)}"
