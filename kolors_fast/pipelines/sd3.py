"""SD3's text-to-image pipeline, with the arguments and results of diffusers' StableDiffusion3Pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.autoencoder_kl import AutoencoderKL
from ..models.conditioning import Conditioning, Prompt
from ..models.lora import lora_scale
from ..models.mmdit import MMDiT
from ..schedulers import Scheduler
from .checks import (
    check_choices,
    check_dtype,
    check_embeds,
    check_guidance,
    check_prompts,
    check_size,
    check_unsupported,
    expect,
)
from .folder import Part
from .pipeline import Generator, Pipeline
from .run import Run
from .sd3_text import SD3TextEncoders, SD3TextFeatures, per_encoder, read_sd3_prompts

Text = str | list[str]
T5_TOKENS = 256  # by default, as in diffusers


class SD3PipelineOutput(NamedTuple):
    """What the pipeline returns."""

    images: list[Image.Image] | np.ndarray | Tensor  # by output_type, see `to_pictures`; "latent": [B, C, h, w]


class SkippedLayers(NamedTuple):
    """Skip-layer guidance: from the prediction, what the model predicts with some blocks bypassed is taken away."""

    layers: tuple[int, ...]
    scale: float
    first: float  # rows beyond this one, exclusive
    last: float  # and before this one


class SD3Pipeline(Pipeline):
    """Prompt to picture: CLIP-L, CLIP-bigG and T5 read, the MM-DiT denoises, the autoencoder decodes.

    Arguments, their order and their defaults are those of diffusers' StableDiffusion3Pipeline; image prompts are not
    supported. Any of the three text encoders may be None: zeros stand for what it would say (`SD3TextEncoders`).
    `guidance_scale` may be one for each prompt. Given `prompt_embeds` are repeated for `num_images_per_prompt`, where
    diffusers leaves them as they are.

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206.
    """

    parts: ClassVar = {
        "transformer": Part("diffusers", ("SD3Transformer2DModel",), MMDiT),
        "vae": Part("diffusers", ("AutoencoderKL",), AutoencoderKL),
        "text_encoder": Part("transformers", ("CLIPTextModelWithProjection",), optional=True),
        "tokenizer": Part("transformers", ("CLIPTokenizer", "CLIPTokenizerFast"), optional=True),
        "text_encoder_2": Part("transformers", ("CLIPTextModelWithProjection",), optional=True),
        "tokenizer_2": Part("transformers", ("CLIPTokenizer", "CLIPTokenizerFast"), optional=True),
        "text_encoder_3": Part("transformers", ("T5EncoderModel",), optional=True),
        "tokenizer_3": Part("transformers", ("T5TokenizerFast", "T5Tokenizer"), optional=True),
    }
    index_name = "StableDiffusion3Pipeline"
    denoiser_name = "transformer"
    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds", "pooled_prompt_embeds"]

    transformer: MMDiT
    tokenizer_3: Any

    def __init__(
        self,
        transformer: MMDiT,
        scheduler: Scheduler,
        vae: AutoencoderKL,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
    ) -> None:
        components = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(components)
        self.encoders  # noqa: B018  (refuses encoders that do not fit)

    @property
    def encoders(self) -> SD3TextEncoders:
        """The text encoders with their tokenizers, and the widths that the denoiser expects of them."""
        config, suffixes = self.transformer.config, ("", "_2", "_3")
        names = [f"{kind}{suffix}" for kind in ("tokenizer", "text_encoder") for suffix in suffixes]
        own = {name: getattr(self, name) for name in names}
        return SD3TextEncoders(config.joint_attention_dim, config.pooled_projection_dim, **own)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Text | None = None,
        prompt_2: Text | None = None,
        prompt_3: Text | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | Sequence[float] = 7.0,
        negative_prompt: Text | None = None,
        negative_prompt_2: Text | None = None,
        negative_prompt_3: Text | None = None,
        num_images_per_prompt: int | None = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        skip_guidance_layers: Sequence[int] | None = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_stop: float = 0.2,
        skip_layer_guidance_start: float = 0.01,
        mu: float | None = None,
    ) -> SD3PipelineOutput | tuple[Any]:
        """Draw pictures of the prompts.

        Args:
            prompt: one text or several.
            prompt_2, prompt_3: other texts for the second CLIP and for T5.
            height, width: pixels, multiples of a patch of latents; default: the transformer's own size.
            num_inference_steps: steps of the scheduler; ignored where `sigmas` are given.
            sigmas: an own schedule.
            guidance_scale: g of negative + g * (positive - negative); at most 1 runs without guidance. One for all
                prompts or one for each: a prompt of at most 1 among guided ones is still its positive prediction alone.
            negative_prompt, negative_prompt_2, negative_prompt_3: what to steer away from; one for all prompts or one
                for each. None is the empty text.
            num_images_per_prompt: pictures per prompt, side by side in the result.
            generator: of all noise; a list has one per picture.
            latents: noise of standard deviation 1, [pictures, C, height / factor, width / factor].
            prompt_embeds, pooled_prompt_embeds: what `encode_prompt` returns, in the place of `prompt`.
            negative_prompt_embeds, negative_pooled_prompt_embeds: the same for `negative_prompt`.
            ip_adapter_image, ip_adapter_image_embeds: must be None.
            output_type: "pil", "np" (float32 [B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W]) or "latent".
            return_dict: False returns (images,).
            joint_attention_kwargs: passed to the transformer; `scale` multiplies LoRA layers.
            clip_skip: layers of the CLIPs to skip before the last but one; of prompts, not of negative ones.
            callback_on_step_end: called as callback(pipeline, row, timestep, tensors) after every step; tensors
                that it returns by name replace the running ones.
            callback_on_step_end_tensor_inputs: names of the tensors it is called with.
            max_sequence_length: T5's tokens, 256 by default, or fewer where its tokenizer says so.
            skip_guidance_layers: blocks bypassed in a third prediction; what that lacks of the positive one is added,
                `skip_layer_guidance_scale` times, in the steps between the shares `skip_layer_guidance_start` and
                `skip_layer_guidance_stop` of the run, both exclusive. 7, 8 and 9 for SD3.5-medium. Needs guidance.
            mu: logarithm of the resolution shift, where the scheduler has a dynamic one; default: by the size.

        Raises:
            ValueError: an argument that does not fit, named with what was expected and what came.
            RuntimeError: the denoised latents hold NaN or infinity.
        """
        names = tuple(getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs))
        height, width = self._sides(height, width)
        repeats = 1 if num_images_per_prompt is None else num_images_per_prompt
        self._check_components()
        check_size(height, width, self.vae_scale_factor * self.transformer.config.patch_size)
        for texts in ((prompt, negative_prompt), (prompt_2, negative_prompt_2), (prompt_3, negative_prompt_3)):
            check_prompts(*texts)
        check_embeds(
            prompt,
            negative_prompt,
            prompt_embeds,
            pooled_prompt_embeds,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
        )
        check_choices(num_inference_steps, repeats, output_type, names, self._callback_tensor_inputs)
        check_unsupported(ip_adapter_image=ip_adapter_image, ip_adapter_image_embeds=ip_adapter_image_embeds)

        prompts = 1 if isinstance(prompt, str) else len(cast(Sized, prompt_embeds if prompt is None else prompt))
        self._guidance_scale, self._interrupt = check_guidance(guidance_scale, prompts), False
        positive, negative = self._read(
            (prompt, prompt_2, prompt_3),
            (negative_prompt, negative_prompt_2, negative_prompt_3),
            _features(prompt_embeds, pooled_prompt_embeds),
            _features(negative_prompt_embeds, negative_pooled_prompt_embeds),
            guided=self.do_classifier_free_guidance,
            repeats=repeats,
            max_sequence_length=max_sequence_length,
            clip_skip=clip_skip,
        )
        both = [positive] if negative is None else [negative, positive]
        tensors = {
            "prompt_embeds": torch.cat([one.prompt_embeds for one in both]),
            "pooled_prompt_embeds": torch.cat([one.pooled_prompt_embeds for one in both]),
        }
        table = self._schedule(num_inference_steps, sigmas=sigmas, **self._shift(height, width, mu))
        pictures = prompts * repeats
        sample = self.prepare_latents(
            pictures, self.transformer.config.in_channels, height, width, self.dtype, self.device, generator, latents
        )
        skipped = None
        if skip_guidance_layers is not None and self.do_classifier_free_guidance:
            window = (share * len(table) for share in (skip_layer_guidance_start, skip_layer_guidance_stop))
            skipped = SkippedLayers(tuple(skip_guidance_layers), skip_layer_guidance_scale, *window)
        run = SD3Run(
            self,
            table.timesteps,
            tensors,
            self._prompt,
            pictures=pictures,
            lora_scale=lora_scale(joint_attention_kwargs, "joint_attention_kwargs"),
            callback=callback_on_step_end,
            names=names,
            skipped=skipped,
        )
        images = self._pictures(self._denoise(run, table, sample, generator, len(table)), output_type)
        return SD3PipelineOutput(images) if return_dict else (images,)

    def encode_prompt(
        self,
        prompt: Text,
        prompt_2: Text | None = None,
        prompt_3: Text | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Text | None = None,
        negative_prompt_2: Text | None = None,
        negative_prompt_3: Text | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Text features of the prompts and of the negative prompts, each prompt's `num_images_per_prompt` times.

        Returns:
            prompt_embeds [B, 77 + L, D], negative_prompt_embeds, pooled [B, P], negative pooled; the negative ones are
            None without guidance.
        """
        for texts in ((prompt, negative_prompt), (prompt_2, negative_prompt_2), (prompt_3, negative_prompt_3)):
            check_prompts(*texts)
        positive, negative = self._read(
            (prompt, prompt_2, prompt_3),
            (negative_prompt, negative_prompt_2, negative_prompt_3),
            guided=do_classifier_free_guidance,
            repeats=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            clip_skip=clip_skip,
        )
        device = self.device if device is None else device
        positive = positive.to(device)
        if negative is None:
            return positive.prompt_embeds, None, positive.pooled_prompt_embeds, None
        negative = negative.to(device)
        embeds, pooled = zip(
            *((one.prompt_embeds, one.pooled_prompt_embeds) for one in (positive, negative)), strict=True
        )
        return *embeds, *pooled

    def _read(
        self,
        prompts: tuple[Text | None, Text | None, Text | None],
        negatives: tuple[Text | None, Text | None, Text | None],
        given: SD3TextFeatures | None = None,
        given_negative: SD3TextFeatures | None = None,
        *,
        guided: bool,
        repeats: int,
        max_sequence_length: int | None,
        clip_skip: int | None,
    ) -> tuple[SD3TextFeatures, SD3TextFeatures | None]:
        """Features of every picture's prompt and negative prompt, where and as the transformer reads them."""
        for name, one in (("prompt_embeds", given), ("negative_prompt_embeds", given_negative)):
            if one is not None:
                check_dtype(name, one.prompt_embeds, "transformer", self.transformer)
        length = self._tokens(max_sequence_length, given if given is not None else given_negative)
        if given is None:
            given = read_sd3_prompts(self.encoders, per_encoder(prompts[0] or "", *prompts[1:]), length, clip_skip)
        positive = given.to(self.device, self.dtype).repeated(repeats)
        if not guided:
            return positive, None
        if given_negative is None:
            texts = per_encoder(negatives[0] or "", *negatives[1:], count=len(given), prefix="negative_")
            given_negative = read_sd3_prompts(self.encoders, texts, length)
        expected, got = list(given.prompt_embeds.shape), list(given_negative.prompt_embeds.shape)
        expect(expected == got, "negative_prompt_embeds", f"the shape of prompt_embeds, {expected}", got)
        return positive, given_negative.to(self.device, self.dtype).repeated(repeats)

    def _tokens(self, asked: int | None, given: SD3TextFeatures | None) -> int:
        """T5's rows: as asked, or as in given features, or T5_TOKENS where the tokenizer does not say fewer."""
        if asked is not None:
            return asked
        if given is not None:
            return given.prompt_embeds.shape[1] - self.encoders.clip_tokens
        return T5_TOKENS if self.tokenizer_3 is None else min(T5_TOKENS, self.tokenizer_3.model_max_length)

    def _prompt(self, tensors: dict[str, Tensor], dtype: torch.dtype, _keys_multiple: int) -> Prompt:
        return self.transformer.read_prompt(tensors["prompt_embeds"], tensors["pooled_prompt_embeds"], dtype)

    def _shift(self, height: int, width: int, mu: float | None) -> dict[str, Any]:
        """mu for `set_timesteps`: as asked, or that of so many patches where the scheduler shifts by them."""
        config = self.scheduler.config
        if mu is None and config.get("use_dynamic_shifting"):
            side = self.vae_scale_factor * self.transformer.config.patch_size
            patches = (height // side) * (width // side)
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
            mu = least + (patches - few) * (most - least) / (many - few)
        return {} if mu is None else {"mu": mu}


class SD3Run(Run):
    """A run that may guide by what bypassed layers add: (1 - g) negative + (g + s) positive - s bypassed."""

    def __init__(self, *args: Any, skipped: SkippedLayers | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.skipped = skipped

    def kind(self, row: int) -> tuple[int, ...] | None:
        """The layers that a third prediction of this row bypasses."""
        skipped = self.skipped
        return skipped.layers if skipped is not None and skipped.first < row < skipped.last else None

    def mix(self, scale: float, row: int) -> tuple[float, ...]:
        mix = super().mix(scale, row)
        if self.skipped is None or self.kind(row) is None:
            return mix
        return mix[0], mix[1] + self.skipped.scale, -self.skipped.scale

    def model(self, inputs: Tensor, cond: Conditioning, row: int) -> Tensor:
        layers = self.kind(row)
        if layers is None:
            return super().model(inputs, cond, row)
        prediction: Tensor = self.pipeline.denoiser.denoise(inputs, cond, skip_layers=layers, skipped=self._pictures)
        return prediction


def _features(embeds: Tensor | None, pooled: Tensor | None) -> SD3TextFeatures | None:
    return None if embeds is None or pooled is None else SD3TextFeatures(embeds, pooled)
