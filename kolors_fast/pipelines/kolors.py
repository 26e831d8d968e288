"""Kolors' text-to-image pipeline, with the arguments and results of diffusers' KolorsPipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import savings
from ..models.autoencoder_kl import AutoencoderKL
from ..models.chatglm import ChatGLM
from ..models.chatglm_tokenizer import ChatGLMTokenizer
from ..models.lora import lora_scale
from ..models.unet import KolorsUNet
from ..models.unet_conditioning import Prompt
from ..schedulers import Scheduler, StepTable
from .checks import (
    MAX_TEXT,
    check_choices,
    check_dtype,
    check_embeds,
    check_guidance,
    check_prompts,
    check_size,
    check_tokens,
    check_unsupported,
    expect,
)
from .folder import Part, load_components, load_configs, weights_loader
from .memory import Plan, Turns, plan_memory
from .pipeline import Generator, Pipeline, Size
from .run import Run
from .text import Text, TextFeatures, read_guided

Self = TypeVar("Self", bound="KolorsPipeline")
MIN_TEXT = 2  # [gMASK] and sop


class KolorsPipelineOutput(NamedTuple):
    """What the pipeline returns."""

    images: list[Image.Image] | np.ndarray | Tensor  # by output_type, see `to_pictures`; "latent": [B, C, h, w]


class KolorsPipeline(Pipeline):
    """Prompt to picture: ChatGLM3 reads, the UNet denoises, the autoencoder decodes.

    Arguments, their order and their defaults are those of diffusers' KolorsPipeline; image prompts are not supported.
    Where it differs on purpose, because the reference is at fault: `max_sequence_length` is honoured; given
    `prompt_embeds` are repeated for `num_images_per_prompt`; time ids keep their row when the batch has several
    prompts, and stay float32; `force_zeros_for_empty_prompt` zeroes the pooled negative features too; one
    negative prompt may stand for a list of prompts.

    Source: Kwai-Kolors/Kolors; Podell et al., "SDXL", 2023 (micro-conditioning).
    """

    parts: ClassVar = {
        "vae": Part("diffusers", ("AutoencoderKL",), AutoencoderKL),
        "text_encoder": Part("kolors", ("ChatGLMModel",), ChatGLM),
        "tokenizer": Part("kolors", ("ChatGLMTokenizer",), ChatGLMTokenizer),
        "unet": Part("diffusers", ("UNet2DConditionModel",), KolorsUNet),
    }
    index_name = "KolorsPipeline"
    denoiser_name = "unet"
    _callback_tensor_inputs: ClassVar = [
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "add_text_embeds",
        "add_time_ids",
        "negative_pooled_prompt_embeds",
        "negative_add_time_ids",
    ]

    text_encoder: ChatGLM
    tokenizer: ChatGLMTokenizer
    unet: KolorsUNet

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: ChatGLM,
        tokenizer: ChatGLMTokenizer,
        unet: KolorsUNet,
        scheduler: Scheduler,
        force_zeros_for_empty_prompt: bool = False,
    ) -> None:
        components = {
            "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler,
        }  # fmt: skip
        super().__init__(components, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        path_or_id: str | os.PathLike[str],
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        *,
        device: torch.device | str | None = None,
        text_encoder_quantization: str | None = None,
        memory_limit: int | str | Plan | None = None,
        **components: Any,
    ) -> Self:
        """Load a folder in diffusers' layout, a Hub id, or a bundled model by its name ("kolors-tiny").

        Args:
            path_or_id: as said above.
            torch_dtype: of all models; None is float32.
            variant: middle part of the weight files' names, such as "fp16".
            device: where the weights go, one tensor at a time; None is the CPU.
            text_encoder_quantization: "int8" or "int4", see `ChatGLM.quantize_`.
            memory_limit: bytes or text such as "8GiB" for all that the process holds on the device, for one picture
                of the UNet's own size; or a Plan by `plan_memory` for another size or number. `memory_plan` tells the
                choice. Where it is one model after the other, each is read from its files when its turn comes.
            components: taken as they are in the place of the folder's; none under a memory limit.

        Raises:
            CheckpointError (an OSError): a file is missing, broken or unsuitable.
            ValueError: the memory limit is malformed or too small.
        """
        plan = memory_limit
        expect(plan is None or not components, "memory_limit", "None with components of one's own", repr(plan))
        if plan is not None and not isinstance(plan, Plan):
            plan = plan_memory(
                plan,
                load_configs(path_or_id, cls.parts),
                dtype=torch_dtype or torch.float32,
                device=device or "cpu",
                quantization=text_encoder_quantization,
            )
        bits = text_encoder_quantization if plan is None else plan.quantization
        at_once = plan is None or not plan.one_by_one
        prepare = {} if bits is None else {"text_encoder": lambda encoder: encoder.quantize_(bits)}
        loaded = load_components(
            path_or_id, cls.parts, torch_dtype, variant, device,
            given=components, prepare=prepare, with_weights=at_once,
        )  # fmt: skip
        parts = loaded.components
        pipeline = cls(**parts, **cls._options(loaded.options))
        pipeline.memory_plan = plan
        if not at_once:
            models = {name: parts[name] for name in ("text_encoder", "unet", "vae")}
            pipeline._turns = Turns(models, weights_loader(path_or_id, variant, device), torch.device(device or "cpu"))
        if plan is not None and plan.tiled:
            parts["vae"].enable_tiling()
        return pipeline

    @classmethod
    def _options(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": bool(index.get("force_zeros_for_empty_prompt", False))}

    def _check_components(self) -> None:
        """Text encoder and UNet exchange tensors; the autoencoder's dtype is its own."""
        super()._check_components()
        expected = f"the dtype of the unet, {self.unet.dtype}"
        expect(self.text_encoder.dtype == self.unet.dtype, "text_encoder", expected, self.text_encoder.dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float | Sequence[float] = 5.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = MAX_TEXT,
    ) -> KolorsPipelineOutput | tuple[Any]:
        """Draw pictures of the prompts.

        Args:
            prompt: one text or several, in English or Chinese.
            height, width: pixels, multiples of 8 and of the autoencoder's factor; default: the UNet's own size.
            num_inference_steps: steps of the scheduler; ignored where `timesteps` or `sigmas` are given.
            timesteps, sigmas: an own schedule, where the scheduler takes one.
            denoising_end: share of the noise range after which to stop, for a second model to go on.
            guidance_scale: g of negative + g * (positive - negative); at most 1 runs without guidance. One for all
                prompts or one for each: a prompt of at most 1 among guided ones is still its positive prediction alone.
            negative_prompt: what to steer away from; one for all prompts or one for each.
            num_images_per_prompt: pictures per prompt, side by side in the result.
            eta: noise of DDIM, 0 to 1; other schedulers ignore it.
            generator: of all noise; a list has one per picture.
            latents: noise of standard deviation 1, [pictures, C, height / factor, width / factor].
            prompt_embeds, pooled_prompt_embeds: what `encode_prompt` returns, in the place of `prompt`.
            negative_prompt_embeds, negative_pooled_prompt_embeds: the same for `negative_prompt`.
            ip_adapter_image, ip_adapter_image_embeds: must be None.
            output_type: "pil", "np" (float32 [B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W]) or "latent".
            return_dict: False returns (images,).
            cross_attention_kwargs: passed to the UNet; `scale` multiplies LoRA layers.
            original_size, crops_coords_top_left, target_size: micro-conditioning (height, width), (top, left);
                sizes default to the picture's.
            negative_original_size, negative_crops_coords_top_left, negative_target_size: the same for the negative
                prompt, all taken from the above unless both sizes are given.
            callback_on_step_end: called as callback(pipeline, row, timestep, tensors) after every step; tensors
                that it returns by name replace the running ones.
            callback_on_step_end_tensor_inputs: names of the tensors it is called with.
            max_sequence_length: tokens of text, at most 256; longer prompts are cut with a warning.

        Raises:
            ValueError: an argument that does not fit, named with what was expected and what came.
            RuntimeError: the denoised latents hold NaN or infinity.
        """
        names = tuple(getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs))
        height, width = self._sides(height, width)
        repeats = 1 if num_images_per_prompt is None else num_images_per_prompt
        self._turn(None)  # a call that failed left one there
        self._check_components()
        check_size(height, width, self.vae_scale_factor)
        check_prompts(prompt, negative_prompt)
        check_embeds(
            prompt,
            negative_prompt,
            prompt_embeds,
            pooled_prompt_embeds,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
        )
        check_choices(num_inference_steps, repeats, output_type, names, self._callback_tensor_inputs)
        check_tokens(max_sequence_length, MIN_TEXT, MAX_TEXT)
        check_unsupported(ip_adapter_image=ip_adapter_image, ip_adapter_image_embeds=ip_adapter_image_embeds)
        own_sizes = _negative_sizes(negative_original_size, negative_crops_coords_top_left, negative_target_size)

        prompts = 1 if isinstance(prompt, str) else len(cast(Sized, prompt_embeds if prompt is None else prompt))
        self._guidance_scale, self._interrupt = check_guidance(guidance_scale, prompts), False
        guided = self.do_classifier_free_guidance
        positive, negative = self._read(
            _either(prompt, prompt_embeds, pooled_prompt_embeds),
            _either(negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds),
            guided,
            max_sequence_length,
            repeats,
        )
        if set(names) - {"latents"} or not savings.on("pad_collapse"):
            # callbacks expect the full form
            positive = positive.expanded(max_sequence_length)
            negative = None if negative is None else negative.expanded(max_sequence_length)
        sizes = (original_size or (height, width), crops_coords_top_left, target_size or (height, width))
        table = self._schedule(num_inference_steps, timesteps, sigmas, eta=eta)
        sample = self.prepare_latents(
            len(positive), self.unet.config.in_channels, height, width, self.dtype, self.device, generator, latents
        )
        run = Run(
            self,
            table.timesteps,
            self._tensors(positive, negative, sizes, own_sizes or sizes),
            self._reader(positive, negative),
            pictures=len(positive),
            lora_scale=lora_scale(cross_attention_kwargs),
            callback=callback_on_step_end,
            names=names,
        )
        sample = self._denoise(run, table, sample, generator, self._stop(table, denoising_end))
        images = self._pictures(sample, output_type)
        return KolorsPipelineOutput(images) if return_dict else (images,)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = MAX_TEXT,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Text features of the prompts and of the negative prompts, each prompt's `num_images_per_prompt` times.

        Returns:
            prompt_embeds [B, S, D] with S = max_sequence_length, negative_prompt_embeds, pooled [B, D], negative
            pooled; the negative ones are None without guidance.
        """
        check_prompts(prompt, negative_prompt)
        check_embeds(
            prompt,
            negative_prompt,
            prompt_embeds,
            pooled_prompt_embeds,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
        )
        positive, negative = self._read(
            _either(prompt, prompt_embeds, pooled_prompt_embeds),
            _either(negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds),
            do_classifier_free_guidance,
            max_sequence_length,
            num_images_per_prompt,
        )
        device = self.device if device is None else device
        positive = positive.expanded(max_sequence_length).to(device)
        if negative is None:
            return positive.embeds, None, positive.pooled, None
        negative = negative.expanded(max_sequence_length).to(device)
        return positive.embeds, negative.embeds, positive.pooled, negative.pooled

    def _read(
        self, prompt: Text, negative: Text | None, guided: bool, max_length: int, repeats: int
    ) -> tuple[TextFeatures, TextFeatures | None]:
        """Features of every picture's prompt and negative prompt, on the UNet's device, both in the same form."""
        zeros = guided and negative is None and self.config.force_zeros_for_empty_prompt
        negative = ("" if negative is None else negative) if guided and not zeros else None
        for name, given in (("prompt_embeds", prompt), ("negative_prompt_embeds", negative)):
            if isinstance(given, TextFeatures):
                check_dtype(name, given.embeds, "unet", self.unet)
                check_dtype(name.replace("prompt", "pooled_prompt"), given.pooled, "unet", self.unet)
        if any(given is not None and not isinstance(given, TextFeatures) for given in (prompt, negative)):
            self._turn("text_encoder")
        positive, beside = read_guided(self.tokenizer, self.text_encoder, prompt, negative, max_length, zeros=zeros)
        rows = torch.arange(len(positive)).repeat_interleave(repeats)
        positive = positive.to(self.device).select(rows.to(self.device))
        return positive, None if beside is None else beside.to(self.device).select(rows.to(self.device))

    def _time_ids(self, sizes: tuple[Size, Size, Size], pooled: Tensor) -> Tensor:
        """[B, 6]; float32, for bfloat16 holds whole numbers only to 256."""
        per_id = self.unet.config.addition_time_embed_dim
        expected = self.unet.add_embedding.linear_1.in_features - 6 * per_id
        expect(pooled.shape[-1] == expected, "pooled_prompt_embeds", f"{expected} features", pooled.shape[-1])
        ids = torch.tensor([value for size in sizes for value in size], dtype=torch.float32, device=pooled.device)
        return ids.expand(len(pooled), 6)

    def _tensors(
        self,
        positive: TextFeatures,
        negative: TextFeatures | None,
        sizes: tuple[Size, Size, Size],
        negative_sizes: tuple[Size, Size, Size],
    ) -> dict[str, Tensor | None]:
        """What belongs to the negative and the positive predictions, in this order, by diffusers' names."""
        both = [positive] if negative is None else [negative, positive]
        ids, negative_ids = (self._time_ids(one, positive.pooled) for one in (sizes, negative_sizes))
        return {
            "prompt_embeds": torch.cat([one.embeds for one in both]),
            "negative_prompt_embeds": None if negative is None else negative.embeds,
            "add_text_embeds": torch.cat([one.pooled for one in both]),
            "negative_pooled_prompt_embeds": None if negative is None else negative.pooled,
            "add_time_ids": torch.cat([ids] if negative is None else [negative_ids, ids]),
            "negative_add_time_ids": negative_ids,
        }

    def _reader(self, positive: TextFeatures, negative: TextFeatures | None) -> Callable[..., Prompt]:
        """What makes of those tensors what the UNet reads."""
        both = [positive] if negative is None else [negative, positive]
        biases = [one.key_bias for one in both if one.key_bias is not None]
        key_bias = torch.cat(biases) if biases else None

        def read(tensors: dict[str, Tensor], dtype: torch.dtype, keys_multiple: int) -> Prompt:
            added = {"text_embeds": tensors["add_text_embeds"], "time_ids": tensors["add_time_ids"]}
            return self.unet.read_prompt(
                tensors["prompt_embeds"], added, dtype, key_bias=key_bias, keys_multiple=keys_multiple
            )

        return read

    def _stop(self, table: StepTable, denoising_end: float | None) -> int:
        """The row at which the run stops."""
        if denoising_end is None:
            return len(table)
        expect(0 < denoising_end <= 1, "denoising_end", "a share of the run above 0 and up to 1", denoising_end)
        cutoff = round(len(self.scheduler) * (1 - denoising_end))  # in timesteps: the scheduler's length is T
        return int((table.timesteps >= cutoff).sum())


def _either(text: str | list[str] | None, embeds: Tensor | None, pooled: Tensor | None) -> Any:
    """The text, or the features given in its place; None where neither is."""
    return text if embeds is None or pooled is None else TextFeatures(embeds, pooled)


def _negative_sizes(original: Size | None, crop: Size, target: Size | None) -> tuple[Size, Size, Size] | None:
    got = f"{original} and {target}"
    expect((original is None) == (target is None), "negative_original_size", "negative_target_size beside it", got)
    return None if original is None or target is None else (original, crop, target)
