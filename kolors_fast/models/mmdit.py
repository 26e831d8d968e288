"""The denoiser of Stable Diffusion 3 and 3.5: a transformer of two streams, picture and text, with one attention.

Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206. Config keys,
state-dict keys and the forward signature follow diffusers' SD3Transformer2DModel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import mmdit_original
from .checkpoint import PretrainedModel, _check_state
from .conditioning import Conditioning, PromptCache, State, Steps
from .dit_layers import TIME_DIM, PatchProjection, as_timesteps, position_table, sinusoid, unpatchify
from .layers import Linear, TimestepEmbedding
from .lora import lora_scale, lora_scaled
from .mmdit_blocks import Attention, JointBlock, Modulation, Stream
from .processors import AttentionProcessor, check_processors

SIZES = (
    "sample_size",
    "patch_size",
    "in_channels",
    "num_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "pos_embed_max_size",
)


class Transformer2DModelOutput(NamedTuple):
    sample: Tensor  # [B, out_channels, H, W]


class Prompt(NamedTuple):
    """What the MM-DiT reads of its prompts: the text at every step, the pooled text where steps are planned."""

    context: Tensor  # [B, L, D]
    pooled: Tensor  # [B, D]

    def tensors(self) -> list[Tensor | None]:
        """Everything that a step reads."""
        return [self.context]

    def clone(self) -> Prompt:
        """A copy in memory of its own."""
        return self._replace(context=self.context.clone())


class PatchEmbed(PatchProjection):
    """Patches with their places added, which are cut from the middle of a square table."""

    pos_embed: Tensor  # [1, max_size * max_size, D]

    def __init__(self, patch_size: int, in_channels: int, dim: int, *, max_size: int, base_size: int) -> None:
        super().__init__(patch_size, in_channels, dim)
        self.max_size = max_size
        table = torch.empty(1, max_size**2, dim)
        if not table.is_meta:  # checkpoints bring the table that they were trained with
            table[0] = position_table(dim, (max_size, max_size), base_size=base_size, scale=1.0)
        self.register_buffer("pos_embed", table)

    def forward(self, sample: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, D]"""
        rows, columns = self.grid(sample)
        if max(rows, columns) > self.max_size:
            most = self.max_size * self.patch_size
            got = f"{sample.shape[-2]}x{sample.shape[-1]}"
            raise ValueError(f"hidden_states: expected sides up to {most}, for which there are positions, got {got}")
        top, left = (self.max_size - rows) // 2, (self.max_size - columns) // 2
        table = self.pos_embed.unflatten(1, (self.max_size, self.max_size))
        places = table[:, top : top + rows, left : left + columns]  # read in place
        tokens = self.tokens(sample)
        return (tokens.unflatten(1, (rows, columns)) + places).to(tokens.dtype).flatten(1, 2)


class ConditioningEmbedding(nn.Module):
    """Two networks whose results are added up: of the timestep and of the pooled text."""

    def __init__(self, dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_DIM, dim)
        self.text_embedder = TimestepEmbedding(pooled_dim, dim)


class MMDiT(PretrainedModel):
    """Predicts the velocity (noise minus picture) in a latent [B, in_channels, H, W] from the timestep and the text.

    The defaults are those of diffusers; depth and width are free. `dual_attention_layers` names the blocks in which
    the picture has an attention of its own beside the joint one; `qk_norm` is None or "rms_norm".
    """

    diffusers_name = "SD3Transformer2DModel"

    def __init__(
        self,
        *,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: Sequence[int] = (),
        qk_norm: str | None = None,
    ) -> None:
        values = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.register_config(**values)
        _check(self.config)
        dim = num_attention_heads * attention_head_dim
        self.pos_embed = PatchEmbed(
            patch_size, in_channels, dim, max_size=pos_embed_max_size, base_size=sample_size // patch_size
        )
        self.time_text_embed = ConditioningEmbedding(dim, pooled_projection_dim)
        self.context_embedder = Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(dim, num_attention_heads, dual=i in dual_attention_layers, last=i == num_layers - 1)
            for i in range(num_layers)
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = Linear(dim, patch_size**2 * (out_channels or in_channels))
        self.gradient_checkpointing = False
        self._prompts = PromptCache()
        if qk_norm is not None:
            self._add_norms()

    @classmethod
    def from_single_file(
        cls,
        file: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> MMDiT:
        """Load a model, in eval mode, from a file in Stability's own layout, whose shapes tell its config.

        Args:
            file: .safetensors, or .pt or .ckpt of plain tensors; other models in it are left alone.
            torch_dtype: dtype of the weights; None is float32.
            device: where they go; None is the CPU.

        Raises:
            CheckpointError: the file is missing, truncated or another model's, or has other keys or shapes.
        """
        state = mmdit_original.read(file)
        model = cls.empty(mmdit_original.config_of(state, file), torch_dtype)
        wanted = model.state_dict()
        _check_state(state, mmdit_original.to_original(wanted), cls.__name__, Path(file))
        loaded = mmdit_original.from_original(state)
        model.load_state_dict({k: v.to(device or "cpu", wanted[k].dtype) for k, v in loaded.items()}, assign=True)
        return model

    def save_single_file(self, file: str | os.PathLike[str]) -> None:
        """Write safetensors in Stability's own layout, beside and renamed."""
        if self.config.qk_norm is None and self.config.attention_head_dim != mmdit_original.HEAD_DIM:
            expected, got = mmdit_original.HEAD_DIM, self.config.attention_head_dim
            raise ValueError(f"attention_head_dim: expected {expected}, for such a file does not tell it, got {got}")
        mmdit_original.write(file, mmdit_original.to_original(self.state_dict()))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor | float | int,
        block_controlnet_hidden_states: Sequence[Tensor] | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: Sequence[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity in `hidden_states`.

        Args:
            hidden_states: [B, in_channels, H, W], sides in multiples of the patch.
            encoder_hidden_states: text states [B, L, joint_attention_dim].
            pooled_projections: pooled text [B, pooled_projection_dim].
            timestep: number, or tensor of 1 or B numbers: 1000 times sigma.
            block_controlnet_hidden_states: a ControlNet's residuals [B, N, D], each for a run of equally many blocks.
            joint_attention_kwargs: `scale` multiplies the injected LoRA layers for this call.
            return_dict: whether to return Transformer2DModelOutput(sample) or (sample,).
            skip_layers: blocks that are bypassed.

        Raises:
            ValueError: an argument is missing, or has another shape than said above.
        """
        with lora_scaled(self, lora_scale(joint_attention_kwargs, "joint_attention_kwargs")):
            prompt = self.read_prompt(encoder_hidden_states, pooled_projections, hidden_states.dtype)
            time = self.embed_time(timestep, hidden_states)
            _check_rows(prompt, len(hidden_states))
            if len(time) not in (1, len(hidden_states)):
                raise ValueError(f"timestep: expected 1 or {len(hidden_states)} numbers, got {len(time)}")
            cond = Conditioning(prompt, self.modulations(time, prompt))
            velocity = self.denoise(hidden_states, cond, block_controlnet_hidden_states, skip_layers=skip_layers or ())
        return Transformer2DModelOutput(velocity) if return_dict else (velocity,)

    def read_prompt(self, encoder_hidden_states: Tensor, pooled_projections: Tensor, dtype: torch.dtype) -> Prompt:
        """What the model reads of its prompts; known prompts are not read again.

        Arguments as those of `forward`; dtype is the sample's. An argument or weight that was edited is seen, unless it
        was edited through `.data` on a GPU, which PyTorch does not record: call `forget_prompts` after that.
        """
        _check_text("encoder_hidden_states", encoder_hidden_states, "B, L", self.config.joint_attention_dim)
        _check_text("pooled_projections", pooled_projections, "B", self.config.pooled_projection_dim)
        if len(encoder_hidden_states) != len(pooled_projections):
            expected, got = len(encoder_hidden_states), len(pooled_projections)
            raise ValueError(f"pooled_projections: expected {expected} rows, as encoder_hidden_states has, got {got}")
        project, embed = self.context_embedder, self.time_text_embed.text_embedder

        def read(_keeps: bool) -> Prompt:
            return Prompt(project(encoder_hidden_states.to(dtype)), embed(pooled_projections.to(dtype)))

        return self._prompts.get(
            (encoder_hidden_states, pooled_projections), (project, embed.linear_1, embed.linear_2), (dtype,), read
        )

    def forget_prompts(self) -> None:
        """Drop what is kept of prompts."""
        self._prompts.forget()

    def embed_time(self, timestep: Tensor | float | int, like: Tensor) -> Tensor:
        """T timesteps -> [T, D], on the device and in the dtype of `like`."""
        return self.time_text_embed.timestep_embedder(sinusoid(as_timesteps(timestep, like.device), like.dtype))

    def modulations(self, time: Tensor, prompt: Prompt) -> dict[nn.Module, Tensor]:
        """What adaLN reads in all blocks, [..., B, width] each, made of the time embedding [..., B or 1, D]."""
        vector = F.silu(time + prompt.pooled)
        return {modulation: modulation.linear(vector) for modulation in self._modulations()}

    def plan_steps(self, timesteps: Tensor, prompt: Prompt) -> Steps:
        """The modulations of all steps [T] of a run at once."""
        state = State((timesteps,), self._time_layers())
        time = self.embed_time(timesteps, prompt.pooled)[:, None]  # [T, 1, D]
        return Steps(prompt, self.modulations(time, prompt), timesteps, state)

    def follows(self, steps: Steps, prompt: Prompt) -> bool:
        """Whether a plan still holds: for this prompt, and no layer that made it has changed since."""
        return steps.prompt is prompt and steps.state.holds((steps.timesteps,), self._time_layers())

    def _modulations(self) -> Iterator[Modulation]:
        block: Any
        for block in self.transformer_blocks:
            yield block.norm1
            yield block.norm1_context
        yield self.norm_out

    def _time_layers(self) -> list[nn.Module]:
        """Whatever turns timesteps into modulations."""
        embedder = self.time_text_embed.timestep_embedder
        return [embedder.linear_1, embedder.linear_2, *(modulation.linear for modulation in self._modulations())]

    def denoise(
        self,
        sample: Tensor,
        cond: Conditioning,
        control: Sequence[Tensor] | None = None,
        *,
        skip_layers: Sequence[int] = (),
        skipped: int | None = None,
    ) -> Tensor:
        """The transformer proper.

        Args:
            sample: [B, in_channels, H, W].
            cond: of B samples, or of the B - skipped first ones.
            control: a ControlNet's residuals, each for a run of equally many blocks.
            skip_layers: blocks that are bypassed, by the last `skipped` of the samples or by all (None).
            skipped: S, for skip-layer guidance. The last S samples are equal to the S before them, and read the same
                prompts; up to the first block that they bypass they are the same, and are computed once.
        """
        blocks, rows = self.transformer_blocks, len(sample) - (skipped or 0)
        _check_skips(skip_layers, len(blocks), skipped, rows, control)
        _check_rows(cond.prompt, rows)
        image, text = Stream(self.pos_embed(sample[:rows])), Stream(cond.prompt.context)
        every = _with_skipped(cond, skipped) if skipped else cond
        waiting: list[Tensor] = []  # both streams of the skipped samples, while the others pass a block
        for i, block in enumerate(blocks):
            if skipped and i in skip_layers and not waiting:
                sums = [image.sum(), text.sum()]
                waiting = [x[-skipped:] for x in sums]
                image, text = [Stream(x[:rows]) for x in sums]
            elif waiting and i not in skip_layers:
                image, text = [Stream(torch.cat([a.sum(), b])) for a, b in zip((image, text), waiting, strict=True)]
                waiting = []
            if skipped or i not in skip_layers:
                image, text = self._run(block, image, text, cond if len(image.x) == rows else every)
            if control is not None and i < len(blocks) - 1:
                residual = control[int(i / (len(blocks) / len(control)))]
                image = Stream(image.sum() + residual.to(image.x.dtype))
        if waiting:
            image = Stream(torch.cat([image.sum(), waiting[0]]))
        scale, shift = self.norm_out.of(every)
        tokens = self.proj_out(image.modulated(scale, shift)[1])
        return unpatchify(tokens, self.pos_embed.grid(sample), self.config.patch_size)

    def _run(self, block: nn.Module, image: Stream, text: Stream, cond: Conditioning) -> tuple[Stream, Any]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            found: tuple[Stream, Any] = checkpoint(block, image, text, cond, use_reentrant=False)
            return found
        return block(image, text, cond)

    def enable_gradient_checkpointing(self) -> None:
        """Compute what is inside of blocks again in the backward pass, instead of keeping it."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def add_qk_norm_(self) -> MMDiT:
        """Normalise queries and keys from now on, with weights of one, as before training at higher resolutions.

        That changes what the model computes; training adapts it. Raises ValueError where they are normalised already.
        """
        if self.config.qk_norm is not None:
            raise ValueError(f"qk_norm: expected None, to which norms can be added, got {self.config.qk_norm!r}")
        self._add_norms()
        self.register_config(qk_norm="rms_norm")
        return self

    def _add_norms(self) -> None:
        for attention in self._attentions().values():
            attention.add_norms()

    def _attentions(self) -> dict[str, Attention]:
        """By path, in module order."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Attention)}

    @property
    def attn_processors(self) -> dict[str, AttentionProcessor]:
        """One entry per attention layer, in module order."""
        return {f"{name}.processor": AttentionProcessor() for name in self._attentions()}

    def set_attn_processor(self, processor: Any) -> None:
        """Accept what stands for plain joint attention, see `check_processors`."""
        check_processors(processor, ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"))


def _check(config: Mapping[str, Any]) -> None:
    for key in SIZES:
        if not isinstance(config[key], int) or config[key] < 1:
            raise ValueError(f"{key}: expected a positive number, got {config[key]!r}")
    dim, layers = config["num_attention_heads"] * config["attention_head_dim"], range(config["num_layers"])
    if config["caption_projection_dim"] != dim:
        got = config["caption_projection_dim"]
        raise ValueError(f"caption_projection_dim: expected {dim}, the width of all heads, got {got!r}")
    if not set(config["dual_attention_layers"]) <= set(layers):
        got = list(config["dual_attention_layers"])
        raise ValueError(f"dual_attention_layers: expected numbers from 0 to {layers[-1]}, got {got}")
    if config["qk_norm"] not in (None, "rms_norm"):
        raise ValueError(f"qk_norm: expected None or 'rms_norm', got {config['qk_norm']!r}")


def _check_text(name: str, value: Any, axes: str, width: int) -> None:
    shape = list(value.shape) if isinstance(value, Tensor) else value
    if not isinstance(value, Tensor) or value.dim() != axes.count(",") + 2 or value.shape[-1] != width:
        raise ValueError(f"{name}: expected [{axes}, {width}], got {shape}")


def _check_rows(prompt: Prompt, rows: int) -> None:
    if len(prompt.context) != rows:
        raise ValueError(f"encoder_hidden_states: expected {rows} rows, got {len(prompt.context)}")


def _with_skipped(cond: Conditioning, skipped: int) -> Conditioning:
    """What the skipped samples read too, which is what the samples before them do."""
    return cond._replace(modulations={m: torch.cat([v, v[-skipped:]]) for m, v in cond.modulations.items()})


def _check_skips(layers: Sequence[int], count: int, skipped: int | None, rows: int, control: Any) -> None:
    if not set(layers) <= set(range(count)):
        raise ValueError(f"skip_layers: expected numbers from 0 to {count - 1}, got {list(layers)}")
    if skipped is None:
        return
    if not 1 <= skipped <= rows:
        raise ValueError(f"skipped: expected 1 to {(rows + skipped) // 2} of {rows + skipped} samples, got {skipped}")
    if not layers:
        raise ValueError(f"skip_layers: expected those that {skipped} samples bypass, got none")
    if control is not None:
        raise ValueError("control: expected None beside samples that bypass layers, got residuals")
