"""What the UNet is conditioned on during one call, and the callback that may change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from .text import TextFeatures

if TYPE_CHECKING:
    from .kolors import KolorsPipeline


class Run:
    """The three functions that `denoise` calls."""

    progress: tqdm[Any]

    def __init__(
        self,
        pipeline: KolorsPipeline,
        attention_kwargs: dict[str, Any] | None,
        callback: Callable[..., dict[str, Any] | None] | None,
        names: tuple[str, ...],
    ) -> None:
        self.pipeline = pipeline
        self.attention_kwargs = attention_kwargs
        self.callback = callback
        self.names = names
        self.tensors: dict[str, Tensor | None] = {}  # by diffusers' names, negative rows first
        self.key_bias: dict[str, Tensor] = {}
        self._weights: dict[float, Tensor] = {}

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
        if biases:
            self.key_bias = {"encoder_key_bias": torch.cat(biases)}

    def predict(self, inputs: Tensor, timestep: Tensor) -> Tensor:
        tensors = self.tensors
        noise: Tensor = self.pipeline.unet(
            inputs,
            timestep,
            encoder_hidden_states=tensors["prompt_embeds"],
            cross_attention_kwargs=self.attention_kwargs,
            added_cond_kwargs={"text_embeds": tensors["add_text_embeds"], "time_ids": tensors["add_time_ids"]},
            return_dict=False,
            **self.key_bias,
        )[0]
        return noise

    def weights(self, row: int) -> Tensor:
        """(1 - g, g), or (1) without guidance; asked at every step, for a callback may change g."""
        scale = self.pipeline.guidance_scale
        if scale not in self._weights:
            mix = [1 - scale, scale] if self.pipeline.do_classifier_free_guidance else [1.0]
            self._weights[scale] = torch.tensor(mix, device=self.pipeline.device)
        return self._weights[scale]

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
