"""Kolors' text-to-image pipeline, with the arguments and results of diffusers' KolorsPipeline."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence, Sized
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .. import savings
from ..models.autoencoder_kl import AutoencoderKL
from ..models.chatglm import ChatGLM
from ..models.chatglm_tokenizer import ChatGLMTokenizer
from ..models.checkpoint import Config
from ..models.unet import KolorsUNet, lora_scale
from ..sampling.denoise import denoise
from ..sampling.graphs import StepGraphs
from ..schedulers import Scheduler, StepTable
from ..schedulers.table import draw_noise
from .checks import (
    CALLBACK_TENSORS,
    MAX_TEXT,
    check_choices,
    check_components,
    check_dtype,
    check_embeds,
    check_guidance,
    check_latents,
    check_prompts,
    check_size,
    check_unsupported,
    expect,
)
from .folder import load_components, load_configs, save_components, weights_loader
from .images import to_pictures
from .memory import Plan, Turns, plan_memory
from .run import Run
from .text import Text, TextFeatures, read_guided

Self = TypeVar("Self", bound="KolorsPipeline")
Size = tuple[int, int]
Generator = torch.Generator | list[torch.Generator] | None


class KolorsPipelineOutput(NamedTuple):
    """What the pipeline returns."""

    images: list[Image.Image] | np.ndarray | Tensor  # by output_type, see `to_pictures`; "latent": [B, C, h, w]


class KolorsPipeline:
    """Prompt to picture: ChatGLM3 reads, the UNet denoises, the autoencoder decodes.

    Arguments, their order and their defaults are those of diffusers' KolorsPipeline; image prompts are not supported.
    Where it differs on purpose, because the reference is at fault: `max_sequence_length` is honoured; given
    `prompt_embeds` are repeated for `num_images_per_prompt`; time ids keep their row when the batch has several
    prompts, and stay float32; `force_zeros_for_empty_prompt` zeroes the pooled negative features too; one
    negative prompt may stand for a list of prompts.

    Source: Kwai-Kolors/Kolors; Podell et al., "SDXL", 2023 (micro-conditioning).
    """

    _callback_tensor_inputs: ClassVar = list(CALLBACK_TENSORS)  # the name that diffusers' callbacks read

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: ChatGLM,
        tokenizer: ChatGLMTokenizer,
        unet: KolorsUNet,
        scheduler: Scheduler,
        force_zeros_for_empty_prompt: bool = False,
    ) -> None:
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.unet = unet
        self.scheduler = scheduler
        self.config = Config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.default_sample_size = unet.config.sample_size
        self._progress: dict[str, Any] = {}
        self._guidance_scale: float | Sequence[float] = 1.0
        self._num_timesteps = 0
        self._interrupt = False
        self._graphs: StepGraphs | None = None
        self._turns: Turns | None = None
        self.memory_plan: Plan | None = None

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

        Raises:
            CheckpointError (an OSError): a file is missing, broken or unsuitable.
            ValueError: the memory limit is malformed or too small.
        """
        plan = memory_limit
        if plan is not None and not isinstance(plan, Plan):
            plan = plan_memory(
                plan,
                load_configs(path_or_id),
                dtype=torch_dtype or torch.float32,
                device=device or "cpu",
                quantization=text_encoder_quantization,
            )
        quantization = text_encoder_quantization if plan is None else plan.quantization
        at_once = plan is None or not plan.one_by_one
        parts = load_components(path_or_id, torch_dtype, variant, device, quantization, with_weights=at_once)
        pipeline = cls(**parts)
        pipeline.memory_plan = plan
        if not at_once:
            models = {name: parts[name] for name in ("text_encoder", "unet", "vae")}
            pipeline._turns = Turns(models, weights_loader(path_or_id, variant, device), torch.device(device or "cpu"))
        if plan is not None and plan.tiled:
            parts["vae"].enable_tiling()
        return pipeline

    def save_pretrained(self, folder: str | os.PathLike[str], *, variant: str | None = None) -> None:
        """Write the pipeline in diffusers' layout."""
        self._check_present("save_pretrained")
        save_components(self, folder, variant)

    @property
    def components(self) -> dict[str, Any]:
        """The constructor arguments that are objects, by name."""
        return {name: getattr(self, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast the models, as `nn.Module.to` does."""
        self._check_present("to")
        for model in (self.vae, self.text_encoder, self.unet):
            model.to(*args, **kwargs)
        return self

    @property
    def default_size(self) -> Size:
        """(height, width) in pixels: the UNet's own size."""
        height, width = _pair(self.default_sample_size)
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def device(self) -> torch.device:
        return self.unet.device if self._turns is None else self._turns.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def enable_cuda_graphs(self, keep: int = 4) -> None:
        """Capture each shape's denoising step as a CUDA graph and replay it: the same pictures with less host time.

        A capture takes as long as two steps. `keep` graphs stay, one for each size, batch, number of steps and
        guidance on or off; what each costs in memory is logged (`logging`, level INFO).

        Raises:
            ValueError: the pipeline is not on a CUDA device, or under a memory limit, which counts no graphs.
        """
        if self.memory_plan is not None:
            raise ValueError("enable_cuda_graphs: expected a pipeline without a memory limit, got one with a plan")
        if self.device.type != "cuda":
            raise ValueError(f"enable_cuda_graphs: expected a pipeline on a CUDA device, got one on {self.device}")
        self._graphs = StepGraphs(self.unet, keep=keep)

    def disable_cuda_graphs(self) -> None:
        """Launch every kernel by itself, and free the graphs."""
        self._graphs = None

    def _turn(self, name: str | None) -> None:
        """Under a plan of one model after the other, have this one's weights here and no other's."""
        if self._turns is not None:
            self._turns.turn(name)

    def _check_present(self, name: str) -> None:
        if self._turns is not None:
            raise ValueError(f"{name}: expected a pipeline whose models are resident, got one after the other")

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Arguments of tqdm for the denoising bar, such as disable=True."""
        self._progress = kwargs

    @property
    def guidance_scale(self) -> float | Sequence[float]:
        """Of the running call: a number, or where prompts differ one for each; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        scale = self._guidance_scale
        return max(scale) > 1 if isinstance(scale, Sequence) else scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback that sets `_interrupt` ends the denoising; the latents are decoded as they are."""
        return self._interrupt

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
        height, width = (
            own if side is None else side for side, own in zip((height, width), self.default_size, strict=True)
        )
        repeats = 1 if num_images_per_prompt is None else num_images_per_prompt
        self._turn(None)  # a call that failed left one there
        check_components(self.unet, self.text_encoder, self.vae, self.scheduler)
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
        check_choices(num_inference_steps, repeats, max_sequence_length, output_type, names)
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
        time_ids = self._time_ids(sizes, positive.pooled)
        negative_time_ids = self._time_ids(own_sizes or sizes, positive.pooled)

        table, stop = self._plan(num_inference_steps, timesteps, sigmas, denoising_end, eta)
        channels = self.unet.config.in_channels
        sample = self.prepare_latents(
            len(positive), channels, height, width, self.dtype, self.device, generator, latents
        )
        self._turn("unet")
        run = Run(self, table.timesteps, lora_scale(cross_attention_kwargs), callback_on_step_end, names)
        run.condition(positive, negative, time_ids, negative_time_ids)
        self._num_timesteps = stop
        with tqdm(total=stop, **self._progress) as run.progress:
            sample = denoise(
                run.predict,
                table,
                sample,
                run.weights,
                stop=stop,
                generator=generator,
                callback=run.after_step,
                interrupted=lambda: self._interrupt,
                step=None if self._graphs is None else run.step_by(self._graphs, table),
            )
        images = sample if output_type == "latent" else to_pictures(self._decode(sample), output_type)
        self._turn(None)
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
                check_dtype(name, given.embeds, self.unet)
                check_dtype(name.replace("prompt", "pooled_prompt"), given.pooled, self.unet)
        if any(given is not None and not isinstance(given, TextFeatures) for given in (prompt, negative)):
            self._turn("text_encoder")
        positive, beside = read_guided(self.tokenizer, self.text_encoder, prompt, negative, max_length, zeros=zeros)
        rows = torch.arange(len(positive)).repeat_interleave(repeats)
        positive = positive.to(self.device).select(rows.to(self.device))
        return positive, None if beside is None else beside.to(self.device).select(rows.to(self.device))

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generator,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise [B, C, h, w] of the scheduler's first standard deviation, drawn or as given (of deviation 1)."""
        factor = self.vae_scale_factor
        shape = (batch_size, num_channels_latents, height // factor, width // factor)
        if isinstance(generator, list):
            expect(len(generator) == batch_size, "generator", f"a list of {batch_size} generators", len(generator))
        if latents is None:
            latents = draw_noise(shape, generator, device, dtype)
        else:
            check_latents(latents, shape)
            check_dtype("latents", latents, self.unet)
        return latents.to(device) * self.scheduler.init_noise_sigma

    def _time_ids(self, sizes: tuple[Size, Size, Size], pooled: Tensor) -> Tensor:
        """[B, 6]; float32, for bfloat16 holds whole numbers only to 256."""
        per_id = self.unet.config.addition_time_embed_dim
        expected = self.unet.add_embedding.linear_1.in_features - 6 * per_id
        expect(pooled.shape[-1] == expected, "pooled_prompt_embeds", f"{expected} features", pooled.shape[-1])
        ids = torch.tensor([value for size in sizes for value in size], dtype=torch.float32, device=pooled.device)
        return ids.expand(len(pooled), 6)

    def _plan(
        self,
        num_inference_steps: int,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        denoising_end: float | None,
        eta: float,
    ) -> tuple[StepTable, int]:
        """The step table of the run, and the row at which it stops."""
        expect(timesteps is None or sigmas is None, "timesteps", "None together with sigmas", "a list")
        choice: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        for name, value in (("timesteps", timesteps), ("sigmas", sigmas)):
            if value is not None:
                accepted = name in inspect.signature(self.scheduler.set_timesteps).parameters
                kind = type(self.scheduler).__name__
                expect(accepted, name, f"None with {kind}, which chooses its own", "a list")
                choice = {name: value}
        self.scheduler.set_timesteps(device=self.device, **choice)
        takes_eta = "eta" in inspect.signature(self.scheduler.step_table).parameters
        table: StepTable = self.scheduler.step_table(**({"eta": eta} if takes_eta else {}))
        if denoising_end is None:
            return table, len(table)
        expect(0 < denoising_end <= 1, "denoising_end", "a share of the run above 0 and up to 1", denoising_end)
        cutoff = round(len(self.scheduler) * (1 - denoising_end))  # in timesteps: the scheduler's length is T
        return table, int((table.timesteps >= cutoff).sum())

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images [B, 3, H, W] in about [-1, 1], in the autoencoder's dtype."""
        if not torch.isfinite(latents).all():
            raise RuntimeError(f"the denoised latents hold NaN or infinity in {latents.dtype}; bfloat16 has more range")
        self._turn("vae")
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(scaled, return_dict=False)[0]


def _either(text: str | list[str] | None, embeds: Tensor | None, pooled: Tensor | None) -> Any:
    """The text, or the features given in its place; None where neither is."""
    return text if embeds is None or pooled is None else TextFeatures(embeds, pooled)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _negative_sizes(original: Size | None, crop: Size, target: Size | None) -> tuple[Size, Size, Size] | None:
    got = f"{original} and {target}"
    expect((original is None) == (target is None), "negative_original_size", "negative_target_size beside it", got)
    return None if original is None or target is None else (original, crop, target)
