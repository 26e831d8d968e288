"""What the denoiser is conditioned on during one call, and the callback that may change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import savings
from ..models.conditioning import Conditioning, Prompt, Steps
from ..models.lora import lora_scaled
from ..sampling.denoise import Step
from ..sampling.graphs import StepGraphs
from ..schedulers import StepTable

if TYPE_CHECKING:
    from .pipeline import Pipeline

# prompts of up to 16 tokens more or less share a captured graph; keys that do not count fill up
KEYS_IN_GRAPH = 16
# (tensors by diffusers' names, dtype of the sample, multiple that keys are filled up to) -> what the denoiser reads
Read = Callable[[dict[str, Any], torch.dtype, int], Prompt]


class Run:
    """The three functions that `denoise` calls.

    Args:
        timesteps: of all rows of the step table.
        tensors: the conditioning by the names that diffusers' callbacks know, negative rows first; a callback may
            replace any.
        read: makes of them what the denoiser reads.
        pictures: drawn in this call.
        lora_scale: strength of injected LoRA layers.
        callback: called after every step with the tensors `names`.
    """

    progress: tqdm[Any]

    def __init__(
        self,
        pipeline: Pipeline,
        timesteps: Tensor,
        tensors: dict[str, Any],
        read: Read,
        *,
        pictures: int,
        lora_scale: float = 1.0,
        callback: Callable[..., dict[str, Any] | None] | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        self.pipeline = pipeline
        self.timesteps = timesteps.to(pipeline.device)
        self.tensors = tensors
        self.read = read
        self.lora_scale = lora_scale
        self.callback = callback
        self.names = names
        self.steps: Steps | None = None
        self._weights: dict[Any, Tensor] = {}
        self._pictures = pictures

    def predict(self, inputs: Tensor, row: int) -> Tensor:
        """The denoiser's predictions at a row of the step table."""
        denoiser = self.pipeline.denoiser
        with lora_scaled(denoiser, self.lora_scale):
            if savings.on("step_table"):
                return self.model(inputs, self.plan(inputs.dtype).at(row), row)
            steps = denoiser.plan_steps(self.timesteps[row : row + 1], self.read(self.tensors, inputs.dtype, 1))
            return self.model(inputs, steps.at(0), row)

    def model(self, inputs: Tensor, cond: Conditioning, row: int) -> Tensor:
        """Predictions [P * B, ...] for as many copies of the sample; of all rows alike that weigh equally many."""
        prediction: Tensor = self.pipeline.denoiser.denoise(inputs, cond)
        return prediction

    def step_by(self, graphs: StepGraphs, table: StepTable) -> Step:
        """The same, and the sampler's step, as a captured graph."""

        def step(
            row: int, sample: Tensor, weights: Tensor, previous: Tensor | None, noise: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            with lora_scaled(self.pipeline.denoiser, self.lora_scale):
                plan = self.plan(sample.dtype, KEYS_IN_GRAPH)
                model = partial(self.model, row=row)
                return graphs.step(model, plan, table, row, sample, weights, previous, noise, self.kind(row))

        return step

    def kind(self, row: int) -> Any:
        """What decides, beside shapes, whether rows run the same program."""
        return None

    def plan(self, dtype: torch.dtype, keys_multiple: int = 1) -> Steps:
        """What prompts and timesteps come to: computed once, and again where a callback has changed something."""
        if self.steps is not None and self.callback is None and savings.on("prompt_cache"):
            return self.steps  # there is nobody to change anything between two steps
        denoiser, prompt = self.pipeline.denoiser, self.read(self.tensors, dtype, keys_multiple)
        if self.steps is None or not denoiser.follows(self.steps, prompt):
            self.steps = denoiser.plan_steps(self.timesteps, prompt)
        return self.steps

    def weights(self, row: int) -> Tensor:
        """(1 - g, g), or (1) without guidance; asked at every step, for a callback may change g.

        Where g differs among the prompts, one column per picture: (0, 1) for those without guidance.
        """
        scale = self.pipeline.guidance_scale
        scale = tuple(scale) if isinstance(scale, Sequence) else scale
        key = scale, self.kind(row)
        if key not in self._weights:
            several = isinstance(scale, tuple)
            mixes = [self.mix(one, row) for one in (scale if isinstance(scale, tuple) else (scale,))]
            rows = torch.tensor(mixes).T  # [P, prompts]
            repeated = rows.repeat_interleave(self._pictures // len(mixes), dim=1) if several else rows[:, 0]
            self._weights[key] = repeated.contiguous().to(self.pipeline.device)
        return self._weights[key]

    def mix(self, scale: float, row: int) -> tuple[float, ...]:
        """Weights of the predictions of one prompt."""
        if not self.pipeline.do_classifier_free_guidance:
            return (1.0,)
        return (1 - scale, scale) if scale > 1 else (0.0, 1.0)

    def after_step(self, row: int, timestep: Tensor, sample: Tensor) -> Tensor:
        self.progress.update()
        if self.callback is None:
            return sample
        self.tensors["latents"] = sample
        changed = self.callback(self.pipeline, row, timestep, {name: self.tensors[name] for name in self.names})
        self.tensors |= changed or {}
        latents: Tensor = self.tensors.pop("latents")
        return latents
