"""PixArt's text-to-image pipelines, with the arguments and results of diffusers' PixArtAlphaPipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.autoencoder_kl import AutoencoderKL
from ..models.conditioning import Conditioning
from ..models.pixart import PixArtTransformer
from ..models.pixart_conditioning import Prompt
from ..schedulers import Scheduler
from .checks import check_choices, check_dtype, check_guidance, check_prompts, check_size, expect
from .folder import Part
from .images import to_pictures
from .pipeline import Generator, Pipeline
from .pixart_text import ALPHA_TOKENS, SIGMA_TOKENS, PixArtTextFeatures, read_pixart_prompts
from .resolution_bins import nearest_bin, resized_and_cropped
from .run import Run

Text = str | list[str]


class PixArtPipelineOutput(NamedTuple):
    """What the pipeline returns."""

    images: list[Image.Image] | np.ndarray | Tensor  # by output_type, see `to_pictures`; "latent": [B, C, h, w]


class PixArtPipeline(Pipeline):
    """Prompt to picture: T5 reads, the transformer denoises, the autoencoder decodes.

    Arguments, their order and their defaults are those of diffusers' PixArtAlphaPipeline, and
    `callback_on_step_end` as other pipelines have it. `guidance_scale` may be one for each prompt. The sampler may
    use the variance that the transformer learned (DDPMScheduler with "learned_range"); others ignore it.

    Source: Chen et al., "PixArt-alpha", arXiv 2310.00426.
    """

    parts: ClassVar = {
        "tokenizer": Part("transformers", ("T5Tokenizer", "T5TokenizerFast"), optional=True),
        "text_encoder": Part("transformers", ("T5EncoderModel",), optional=True),
        "vae": Part("diffusers", ("AutoencoderKL",), AutoencoderKL),
        "transformer": Part("diffusers", ("PixArtTransformer2DModel", "Transformer2DModel"), PixArtTransformer),
    }
    index_name = "PixArtAlphaPipeline"
    denoiser_name = "transformer"
    tokens: ClassVar[int] = ALPHA_TOKENS  # of captions that the transformer was trained with
    typed: ClassVar = {"clean_caption": False}  # for they hold no markup, and cleaning takes Chinese out
    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds", "prompt_attention_mask"]

    transformer: PixArtTransformer
    tokenizer: Any
    text_encoder: Any

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: AutoencoderKL,
        transformer: PixArtTransformer,
        scheduler: Scheduler,
    ) -> None:
        components = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(components)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Text | None = None,
        negative_prompt: Text | None = "",
        num_inference_steps: int = 20,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | Sequence[float] = 4.5,
        num_images_per_prompt: int | None = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PixArtPipelineOutput | tuple[Any]:
        """Draw pictures of the prompts.

        Args:
            prompt: one text or several.
            negative_prompt: what to steer away from; one for all prompts or one for each. None is the empty text.
            num_inference_steps: steps of the scheduler; ignored where `timesteps` or `sigmas` are given.
            timesteps, sigmas: an own schedule, where the scheduler takes one.
            guidance_scale: g of negative + g * (positive - negative); at most 1 runs without guidance. One for all
                prompts or one for each: a prompt of at most 1 among guided ones is still its positive prediction alone.
            num_images_per_prompt: pictures per prompt, side by side in the result.
            height, width: pixels; default: the transformer's own size.
            eta: noise of DDIM, 0 to 1; other schedulers ignore it.
            generator: of all noise; a list has one per picture.
            latents: noise of standard deviation 1, [pictures, C, height / factor, width / factor] of the size drawn.
            prompt_embeds, prompt_attention_mask: what `encode_prompt` returns, in the place of `prompt`.
            negative_prompt_embeds, negative_prompt_attention_mask: the same for `negative_prompt`.
            output_type: "pil", "np" (float32 [B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W]) or "latent".
            return_dict: False returns (images,).
            callback: called as callback(row, timestep, latents) after every `callback_steps` steps.
            clean_caption: whether prompts are cleaned of links, markup and the like, see `clean_caption`.
            use_resolution_binning: draw in the nearest size that the transformer was trained with, then resize and
                crop; models of other than the released sizes (256 to 2048 pixels) draw what is asked.
            max_sequence_length: tokens of text, 120 by default, or fewer where the tokenizer says so.
            callback_on_step_end: called as callback(pipeline, row, timestep, tensors) after every step; tensors
                that it returns by name replace the running ones.
            callback_on_step_end_tensor_inputs: names of the tensors it is called with.

        Raises:
            ValueError: an argument that does not fit, named with what was expected and what came.
            RuntimeError: the denoised latents hold NaN or infinity.
        """
        names = tuple(getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs))
        asked = self._sides(height, width)
        repeats = 1 if num_images_per_prompt is None else num_images_per_prompt
        self._check_components()
        check_size(*asked, 8 if use_resolution_binning else self._unit)
        drawn = nearest_bin(*asked, self.transformer.config.sample_size) if use_resolution_binning else asked
        check_size(*drawn, self._unit)
        check_prompts(prompt, negative_prompt)
        given = _features("", prompt_embeds, prompt_attention_mask)
        given_negative = _features("negative_", negative_prompt_embeds, negative_prompt_attention_mask)
        expect(prompt is None or given is None, "prompt_embeds", "None together with prompt", "a tensor")
        expect(prompt is not None or given is not None, "prompt", "a prompt or prompt_embeds", "None")
        check_choices(num_inference_steps, repeats, output_type, names, self._callback_tensor_inputs)

        prompts = 1 if isinstance(prompt, str) else len(cast(Sized, given if prompt is None else prompt))
        self._guidance_scale, self._interrupt = check_guidance(guidance_scale, prompts), False
        both = self._read(
            given if prompt is None else prompt,
            negative_prompt if given_negative is None else given_negative,
            guided=self.do_classifier_free_guidance,
            repeats=repeats,
            max_sequence_length=max_sequence_length,
            clean_caption=clean_caption,
        )
        tensors = {
            "prompt_embeds": torch.cat([one.prompt_embeds for one in both]),
            "prompt_attention_mask": torch.cat([one.prompt_attention_mask for one in both]),
        }
        table = self._schedule(num_inference_steps, timesteps, sigmas, eta=eta)
        pictures, channels = prompts * repeats, self.transformer.config.in_channels
        sample = self.prepare_latents(
            pictures, channels, *drawn, self.dtype, self.device, generator, latents
        )  # fmt: skip
        run = PixArtRun(
            self,
            table.timesteps,
            tensors,
            self._reader(drawn, len(both) * pictures),
            pictures=pictures,
            callback=_both(callback, callback_steps, callback_on_step_end),
            names=names if callback is None else ("latents", *names),
            channels=2 * channels if table.learned_variance else channels,
        )
        sample = self._denoise(run, table, sample, generator, len(table))
        if output_type == "latent":
            images: Any = sample
        else:
            images = to_pictures(resized_and_cropped(self._decode(sample), *asked), output_type)
        return PixArtPipelineOutput(images) if return_dict else (images,)

    def encode_prompt(
        self,
        prompt: Text,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Text | None = "",
        num_images_per_prompt: int = 1,
        device: torch.device | str | None = None,
        clean_caption: bool = False,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Text features of the prompts and of the negative prompts, each prompt's `num_images_per_prompt` times.

        Returns:
            prompt_embeds [B, S, D], prompt_attention_mask [B, S], negative_prompt_embeds, negative mask; the negative
            ones are None without guidance.
        """
        check_prompts(prompt, negative_prompt)
        both = self._read(
            prompt,
            negative_prompt,
            guided=do_classifier_free_guidance,
            repeats=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            clean_caption=clean_caption,
        )
        found = [one.to(self.device if device is None else device) for one in reversed(both)]
        positive = found[0].prompt_embeds, found[0].prompt_attention_mask
        if len(found) == 1:
            return *positive, None, None
        return *positive, found[1].prompt_embeds, found[1].prompt_attention_mask

    @property
    def _unit(self) -> int:
        """Pixels of a patch's side."""
        return self.vae_scale_factor * int(self.transformer.config.patch_size)

    def _read(
        self,
        prompt: Text | PixArtTextFeatures | None,
        negative: Text | PixArtTextFeatures | None,
        *,
        guided: bool,
        repeats: int,
        max_sequence_length: int | None,
        clean_caption: bool,
    ) -> list[PixArtTextFeatures]:
        """Features of every picture's negative prompt, where there is guidance, and of its prompt, as the transformer
        reads them."""
        length = max_sequence_length
        if length is None:
            length = self.tokens if self.tokenizer is None else min(self.tokens, self.tokenizer.model_max_length)

        def features(name: str, text: Text | PixArtTextFeatures, count: int | None) -> PixArtTextFeatures:
            if isinstance(text, PixArtTextFeatures):
                check_dtype(f"{name}_embeds", text.prompt_embeds, "transformer", self.transformer)
                found = text
            else:
                expect(self.text_encoder is not None, "text_encoder", f"one, or {name}_embeds", "None")
                texts = [text] * (count or 1) if isinstance(text, str) else text
                found = read_pixart_prompts(self.tokenizer, self.text_encoder, texts, length, clean_caption)
            expect(count in (None, len(found)), name, f"one text or {count}", len(found))
            return found.to(self.device, self.dtype)

        assert prompt is not None
        positive = features("prompt", prompt, None)
        if not guided:
            return [positive.repeated(repeats)]
        beside = features("negative_prompt", "" if negative is None else negative, len(positive))
        expected, got = list(positive.prompt_embeds.shape), list(beside.prompt_embeds.shape)
        expect(expected == got, "negative_prompt_embeds", f"the shape of prompt_embeds, {expected}", got)
        return [beside.repeated(repeats), positive.repeated(repeats)]

    def _reader(self, size: tuple[int, int], samples: int) -> Callable[..., Prompt]:
        """What makes of the tensors what the transformer reads: beside the text the size that is drawn, if it reads
        that."""
        added = None
        if self.transformer.has_sizes:
            sizes = torch.tensor([[*size, size[0] / size[1]]], device=self.device).expand(samples, -1)
            added = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}

        def read(tensors: dict[str, Tensor], dtype: torch.dtype, keys_multiple: int) -> Prompt:
            return self.transformer.read_prompt(
                tensors["prompt_embeds"], added, dtype,
                mask=tensors["prompt_attention_mask"], keys_multiple=keys_multiple,
            )  # fmt: skip

        return read


class PixArtSigmaPipeline(PixArtPipeline):
    """PixArt-Sigma reads 300 tokens. Source: Chen et al., "PixArt-Sigma", arXiv 2403.04692."""

    index_name = "PixArtSigmaPipeline"
    tokens = SIGMA_TOKENS


class PixArtRun(Run):
    """A run of a model that predicts more channels than the sampler may read."""

    def __init__(self, *args: Any, channels: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.channels = channels

    def model(self, inputs: Tensor, cond: Conditioning, row: int) -> Tensor:
        return super().model(inputs, cond, row)[:, : self.channels]


def _features(prefix: str, embeds: Tensor | None, mask: Tensor | None) -> PixArtTextFeatures | None:
    """Both tensors, in matching shapes, or neither."""
    name, mask_name = f"{prefix}prompt_embeds", f"{prefix}prompt_attention_mask"
    got = "None" if mask is None else f"a tensor {list(mask.shape)}"
    expect((embeds is None) == (mask is None), mask_name, f"exactly when {name} is given", got)
    if embeds is None or mask is None:
        return None
    expect(embeds.dim() == 3, name, "a tensor [batch, tokens, features]", f"a tensor {list(embeds.shape)}")
    expect(mask.shape == embeds.shape[:2], mask_name, f"a tensor {list(embeds.shape[:2])} like {name}", got)
    return PixArtTextFeatures(embeds, mask)


def _both(
    callback: Callable[[int, Tensor, Tensor], None] | None, every: int, at_step_end: Callable[..., Any] | None
) -> Callable[..., Any] | None:
    """The two kinds of callback as one of the second kind."""
    if callback is None:
        return at_step_end

    def called(pipeline: Any, row: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        if row % every == 0:
            callback(row, timestep, tensors["latents"])
        return None if at_step_end is None else at_step_end(pipeline, row, timestep, tensors)

    return called
