"""What the UNet is conditioned on during one call, and the callback that may change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from .. import savings
from ..models.conditioning import Steps
from ..models.unet import lora_scaled
from ..models.unet_conditioning import Prompt
from ..sampling.denoise import Step
from ..sampling.graphs import StepGraphs
from ..schedulers import StepTable
from .text import TextFeatures

if TYPE_CHECKING:
    from .kolors import KolorsPipeline

# prompts of up to 16 tokens more or less share a captured graph; keys that do not count fill up
KEYS_IN_GRAPH = 16


class Run:
    """The three functions that `denoise` calls.

    Args:
        timesteps: of all rows of the step table.
        lora_scale: strength of injected LoRA layers.
        callback: called after every step with the tensors `names`.
    """

    progress: tqdm[Any]

    def __init__(
        self,
        pipeline: KolorsPipeline,
        timesteps: Tensor,
        lora_scale: float,
        callback: Callable[..., dict[str, Any] | None] | None,
        names: tuple[str, ...],
    ) -> None:
        self.pipeline = pipeline
        self.timesteps = timesteps.to(pipeline.device)
        self.lora_scale = lora_scale
        self.callback = callback
        self.names = names
        self.tensors: dict[str, Tensor | None] = {}  # by diffusers' names, negative rows first
        self.key_bias: Tensor | None = None
        self.steps: Steps | None = None
        self._weights: dict[float | tuple[float, ...], Tensor] = {}
        self._pictures = 0

    def condition(
        self, positive: TextFeatures, negative: TextFeatures | None, time_ids: Tensor, negative_time_ids: Tensor
    ) -> None:
        """Stack what belongs to the negative and the positive predictions, in this order."""
        both = [positive] if negative is None else [negative, positive]
        ids = [time_ids] if negative is None else [negative_time_ids, time_ids]
        self.tensors = {
            "prompt_embeds": torch.cat([one.embeds for one in both]),
            "negative_prompt_embeds": None if negative is None else negative.embeds,
            "add_text_embeds": torch.cat([one.pooled for one in both]),
            "negative_pooled_prompt_embeds": None if negative is None else negative.pooled,
            "add_time_ids": torch.cat(ids),
            "negative_add_time_ids": negative_time_ids,
        }
        biases = [one.key_bias for one in both if one.key_bias is not None]
        self.key_bias = torch.cat(biases) if biases else None
        self._pictures = len(positive)

    def predict(self, inputs: Tensor, row: int) -> Tensor:
        """The UNet's predictions at a row of the step table."""
        unet = self.pipeline.unet
        with lora_scaled(unet, self.lora_scale):
            if savings.on("step_table"):
                return unet.denoise(inputs, self.plan(inputs.dtype).at(row))
            steps = unet.plan_steps(self.timesteps[row : row + 1], self._prompt(inputs.dtype))
            return unet.denoise(inputs, steps.at(0))

    def step_by(self, graphs: StepGraphs, table: StepTable) -> Step:
        """The same, and the sampler's step, as a captured graph."""
        unet = self.pipeline.unet

        def step(
            row: int, sample: Tensor, weights: Tensor, previous: Tensor | None, noise: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            with lora_scaled(unet, self.lora_scale):
                plan = self.plan(sample.dtype, KEYS_IN_GRAPH)
                return graphs.step(unet.denoise, plan, table, row, sample, weights, previous, noise)

        return step

    def plan(self, dtype: torch.dtype, keys_multiple: int = 1) -> Steps:
        """What prompts and timesteps come to: computed once, and again where a callback has changed something."""
        if self.steps is not None and self.callback is None and savings.on("prompt_cache"):
            return self.steps  # there is nobody to change anything between two steps
        unet, prompt = self.pipeline.unet, self._prompt(dtype, keys_multiple)
        if self.steps is None or not unet.follows(self.steps, prompt):
            self.steps = unet.plan_steps(self.timesteps, prompt)
        return self.steps

    def _prompt(self, dtype: torch.dtype, keys_multiple: int = 1) -> Prompt:
        tensors = cast(dict[str, Tensor], self.tensors)
        return self.pipeline.unet.read_prompt(
            tensors["prompt_embeds"],
            {"text_embeds": tensors["add_text_embeds"], "time_ids": tensors["add_time_ids"]},
            dtype,
            key_bias=self.key_bias,
            keys_multiple=keys_multiple,
        )

    def weights(self, row: int) -> Tensor:
        """(1 - g, g), or (1) without guidance; asked at every step, for a callback may change g.

        Where g differs among the prompts, one column per picture: (0, 1) for those without guidance.
        """
        scale = self.pipeline.guidance_scale
        if isinstance(scale, Sequence):
            scale = tuple(scale)
        if scale not in self._weights:
            mix: list[Any] = [1.0]
            if self.pipeline.do_classifier_free_guidance:
                mix = [1 - scale, scale] if not isinstance(scale, tuple) else self._columns(scale)
            self._weights[scale] = torch.tensor(mix, device=self.pipeline.device)
        return self._weights[scale]

    def _columns(self, scales: tuple[float, ...]) -> list[list[float]]:
        """[2, pictures], the pictures of a prompt side by side."""
        repeats = self._pictures // len(scales)
        mixes = [(1 - scale, scale) if scale > 1 else (0.0, 1.0) for scale in scales for _ in range(repeats)]
        return [[negative for negative, _ in mixes], [positive for _, positive in mixes]]

    def after_step(self, row: int, timestep: Tensor, sample: Tensor) -> Tensor:
        self.progress.update()
        if self.callback is None:
            return sample
        self.tensors["latents"] = sample
        changed = self.callback(self.pipeline, row, timestep, {name: self.tensors[name] for name in self.names})
        self.tensors |= changed or {}
        latents = self.tensors.pop("latents")
        assert latents is not None
        return latents
