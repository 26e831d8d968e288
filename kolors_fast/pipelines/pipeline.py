"""What the pipelines share: their models' whereabouts, schedules, noise, the denoising run, and decoding."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.checkpoint import Config
from ..sampling.denoise import denoise
from ..sampling.graphs import StepGraphs
from ..schedulers import Scheduler, StepTable
from ..schedulers.table import draw_noise
from .checks import check_dtype, check_latents, check_scheduler, expect
from .folder import Part, load_components, save_components
from .images import to_pictures
from .memory import Plan, Turns
from .run import Run

Self = TypeVar("Self", bound="Pipeline")
Size = tuple[int, int]
Generator = torch.Generator | list[torch.Generator] | None


class Pipeline:
    """Base of the pipelines: a subclass reads prompts and says how its denoiser is conditioned on them.

    Its constructor takes the components of `parts` by name, and sets them as attributes.
    """

    parts: ClassVar[Mapping[str, Part]]  # components beside the scheduler, as model_index.json has them
    index_name: ClassVar[str]  # the class there
    denoiser_name: ClassVar[str]
    typed: ClassVar[Mapping[str, Any]] = {}  # arguments for prompts from the command line or a file of them
    _callback_tensor_inputs: ClassVar[list[str]]  # the name that diffusers' callbacks read

    vae: Any
    scheduler: Scheduler

    def __init__(self, components: Mapping[str, Any], **config: Any) -> None:
        for name, component in components.items():
            setattr(self, name, component)
        self.config = Config(**config)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.default_sample_size = self.denoiser.config.sample_size
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
        **components: Any,
    ) -> Self:
        """Load a folder in diffusers' layout, a Hub id, or a bundled model by its name.

        Args:
            path_or_id: as said above.
            torch_dtype: of all models; None is float32.
            variant: middle part of the weight files' names, such as "fp16".
            device: where the weights go; None is the CPU.
            components: taken as they are in the place of the folder's, such as `text_encoder_3=None`.

        Raises:
            CheckpointError (an OSError): a file is missing, broken or unsuitable.
        """
        loaded = load_components(path_or_id, cls.parts, torch_dtype, variant, device, given=components)
        return cls(**loaded.components, **cls._options(loaded.options))

    @classmethod
    def _options(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments that model_index.json holds beside the components."""
        return {}

    def save_pretrained(self, folder: str | os.PathLike[str], *, variant: str | None = None) -> None:
        """Write the pipeline in diffusers' layout."""
        self._check_present("save_pretrained")
        save_components(folder, self.index_name, self.parts, self.components, dict(self.config), variant)

    @property
    def components(self) -> dict[str, Any]:
        """The constructor arguments that are objects, by name."""
        return {name: getattr(self, name) for name in (*self.parts, "scheduler")}

    @property
    def denoiser(self) -> Any:
        """The model that `sampling` runs."""
        return getattr(self, self.denoiser_name)

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast the models, as `nn.Module.to` does."""
        self._check_present("to")
        for component in self.components.values():
            if isinstance(component, nn.Module):
                component.to(*args, **kwargs)
        return self

    @property
    def default_size(self) -> Size:
        """(height, width) in pixels: the denoiser's own size."""
        height, width = _pair(self.default_sample_size)
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def device(self) -> torch.device:
        device: torch.device = self.denoiser.device if self._turns is None else self._turns.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.denoiser.dtype
        return dtype

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
        self._graphs = StepGraphs(self.denoiser, keep=keep)

    def disable_cuda_graphs(self) -> None:
        """Launch every kernel by itself, and free the graphs."""
        self._graphs = None

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

    def _turn(self, name: str | None) -> None:
        """Under a plan of one model after the other, have this one's weights here and no other's."""
        if self._turns is not None:
            self._turns.turn(name)

    def _check_present(self, name: str) -> None:
        if self._turns is not None:
            raise ValueError(f"{name}: expected a pipeline whose models are resident, got one after the other")

    def _check_components(self) -> None:
        """All models must be where the denoiser is, and the scheduler must make tables."""
        for name, component in self.components.items():
            if isinstance(component, nn.Module):
                expected = f"the device of the {self.denoiser_name}, {self.denoiser.device}"
                expect(component.device == self.denoiser.device, name, expected, component.device)
        check_scheduler(self.scheduler)

    def _sides(self, height: int | None, width: int | None) -> Size:
        """As asked for, else the denoiser's own."""
        own = self.default_size
        return own[0] if height is None else height, own[1] if width is None else width

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
            check_dtype("latents", latents, self.denoiser_name, self.denoiser)
        return latents.to(device) * self.scheduler.init_noise_sigma

    def _schedule(
        self,
        num_inference_steps: int,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        *,
        eta: float = 0.0,
        **options: Any,
    ) -> StepTable:
        """The step table of the run; `options` go to `set_timesteps`."""
        expect(timesteps is None or sigmas is None, "timesteps", "None together with sigmas", "a list")
        choice: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        for name, value in (("timesteps", timesteps), ("sigmas", sigmas)):
            if value is not None:
                accepted = name in inspect.signature(self.scheduler.set_timesteps).parameters
                kind = type(self.scheduler).__name__
                expect(accepted, name, f"None with {kind}, which chooses its own", "a list")
                choice = {name: value}
        self.scheduler.set_timesteps(device=self.device, **choice, **options)
        takes_eta = "eta" in inspect.signature(self.scheduler.step_table).parameters
        table: StepTable = self.scheduler.step_table(**({"eta": eta} if takes_eta else {}))
        return table

    def _denoise(self, run: Run, table: StepTable, sample: Tensor, generator: Generator, stop: int) -> Tensor:
        """Latents after row `stop` of the table."""
        self._turn(self.denoiser_name)
        self._num_timesteps = stop
        with tqdm(total=stop, **self._progress) as run.progress:
            return denoise(
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

    def _pictures(self, latents: Tensor, output_type: str) -> Any:
        """What a call returns of its latents, see `to_pictures`."""
        images = latents if output_type == "latent" else to_pictures(self._decode(latents), output_type)
        self._turn(None)
        return images

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images [B, 3, H, W] in about [-1, 1], in the autoencoder's dtype."""
        if not torch.isfinite(latents).all():
            raise RuntimeError(f"the denoised latents hold NaN or infinity in {latents.dtype}; bfloat16 has more range")
        self._turn("vae")
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        if self.vae.config.shift_factor is not None:
            scaled = scaled + self.vae.config.shift_factor
        image: Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return image


def _pair(size: int | Sequence[int]) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
