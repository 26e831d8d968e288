"""The denoiser of Kolors: SDXL's UNet with a projection of ChatGLM's 4096-wide text states.

Podell et al., "SDXL", 2023; Kolors team, "Kolors: Effective Training of Diffusion Model for Photorealistic
Text-to-Image Synthesis", 2024. Config keys, state-dict keys and the forward signature follow diffusers'
UNet2DConditionModel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import savings
from ..ops import _library
from .attention import Attention
from .checkpoint import PretrainedModel
from .conditioning import Conditioning, PromptCache, State, Steps
from .layers import (
    Conv2d,
    GroupNorm,
    Linear,
    ResnetBlock,
    TimestepEmbedding,
    is_wrapped,
    sinusoidal_embedding,
    store_convolutions,
    use_channels_last,
)
from .lora import lora_scale, lora_scaled
from .processors import AttentionProcessor, check_processors
from .unet_blocks import BlockShape, DownBlock, MidBlock, UpBlock
from .unet_conditioning import Prompt, balanced, collapse_pads, filled_up

DOWN_TYPES = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_TYPES = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}

SIZES = (
    "in_channels",
    "out_channels",
    "norm_num_groups",
    "cross_attention_dim",
    "encoder_hid_dim",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
PER_LEVEL = ("block_out_channels", "layers_per_block", "transformer_layers_per_block", "attention_head_dim")

# config values of diffusers' class that have one meaning here; unlisted ones must be unset
FIXED = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "encoder_hid_dim_type": "text_proj",
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "center_input_sample": False,
    "only_cross_attention": False,
    "dropout": 0.0,
    "reverse_transformer_layers_per_block": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_skip_time_act": False,
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}


class Level(NamedTuple):
    """One resolution, in the order of PER_LEVEL."""

    width: int  # channels
    layers: int  # residual blocks on the way down
    depth: int  # transformer blocks per transformer
    heads: int


class UNet2DConditionOutput(NamedTuple):
    sample: Tensor  # [B, out_channels, H, W]


class KolorsUNet(PretrainedModel):
    """Predicts the noise in a latent [B, in_channels, h, w] from the timestep, the text and the picture's sizes.

    The defaults are Kolors' own config. Each level has `layers_per_block` residual blocks on the way down and one
    more on the way up; `attention_head_dim` counts heads, as in diffusers. Keyword arguments beside the named
    ones are diffusers' config values for variants of the architecture: only Kolors' values are accepted.
    """

    diffusers_name = "UNet2DConditionModel"

    def __init__(
        self,
        *,
        sample_size: int | Sequence[int] | None = 128,
        in_channels: int = 4,
        out_channels: int = 4,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types: Sequence[str] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Sequence[int] = (320, 640, 1280),
        layers_per_block: int | Sequence[int] = 2,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 2048,
        transformer_layers_per_block: int | Sequence[int] = (1, 2, 10),
        encoder_hid_dim: int = 4096,
        attention_head_dim: int | Sequence[int] = (5, 10, 20),
        addition_time_embed_dim: int = 256,
        projection_class_embeddings_input_dim: int = 5632,
        **fixed: Any,
    ) -> None:
        values = {k: v for k, v in locals().items() if k not in ("self", "__class__", "fixed")}
        super().__init__()
        self.register_config(**values, **_check_fixed(fixed))
        for key in SIZES:
            if not isinstance(self.config[key], int) or self.config[key] < 1:
                raise ValueError(f"{key}: expected a positive number, got {self.config[key]!r}")
        levels = _levels(self.config)
        width, time_dim = levels[0].width, 4 * levels[0].width

        self.conv_in = Conv2d(in_channels, width, 3, padding=1)
        self.time_embedding = TimestepEmbedding(width, time_dim)
        self.encoder_hid_proj = Linear(encoder_hid_dim, cross_attention_dim)
        self.add_embedding = TimestepEmbedding(projection_class_embeddings_input_dim, time_dim)
        # the mid block comes last, as in diffusers' state dict
        self.down_blocks, skip_channels = self._build_down(levels)
        self.up_blocks = self._build_up(levels, skip_channels)
        self.mid_block = MidBlock(levels[-1].width, self._shape(levels[-1], True))
        self.conv_norm_out = GroupNorm(norm_num_groups, width, norm_eps)
        self.conv_out = Conv2d(width, out_channels, 3, padding=1)
        use_channels_last(self)
        self._prompts = PromptCache()

    def _shape(self, level: Level, attends: bool) -> BlockShape:
        config = self.config
        return BlockShape(
            time_dim=4 * config.block_out_channels[0],
            text_dim=config.cross_attention_dim,
            heads=level.heads,
            depth=level.depth if attends else 0,
            num_groups=config.norm_num_groups,
            eps=config.norm_eps,
        )

    def _build_down(self, levels: Sequence[Level]) -> tuple[nn.ModuleList, list[int]]:
        """The blocks, and the channels of every map that the up path will read, in the order made."""
        attends = _attends("down_block_types", self.config, DOWN_TYPES)
        blocks = nn.ModuleList()
        width = levels[0].width
        skip_channels = [width]
        for level, attend in zip(levels, attends, strict=True):
            last = level is levels[-1]
            shape = self._shape(level, attend)
            blocks.append(DownBlock(width, level.width, level.layers, shape, downsample=not last))
            width = level.width
            skip_channels += [width] * (level.layers + (not last))
        return blocks, skip_channels

    def _build_up(self, levels: Sequence[Level], skip_channels: list[int]) -> nn.ModuleList:
        attends = _attends("up_block_types", self.config, UP_TYPES)
        blocks = nn.ModuleList()
        width = levels[-1].width
        for level, attend in zip(reversed(levels), attends, strict=True):
            taken = [skip_channels.pop() for _ in range(level.layers + 1)]
            shape = self._shape(level, attend)
            blocks.append(UpBlock(width, level.width, taken, shape, upsample=level is not levels[0]))
            width = level.width
        return blocks

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: None = None,
        timestep_cond: None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        *,
        encoder_key_bias: Tensor | None = None,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise in `sample`.

        Args:
            sample: [B, in_channels, h, w], any h and w.
            timestep: number, or tensor of 1 or B numbers.
            encoder_hidden_states: text states [B, S, encoder_hid_dim].
            class_labels, timestep_cond: not part of this model; must be None.
            attention_mask: [B, h*w], 1 keep, 0 drop, on the pixels of self-attention; fits only where all levels
                with self-attention have that many pixels.
            cross_attention_kwargs: `scale` multiplies the injected LoRA layers for this call.
            added_cond_kwargs: `text_embeds` [B, D] and `time_ids` [B, 6] (original height and width, crop top and
                left, target height and width, in pixels).
            down_block_additional_residuals, mid_block_additional_residual: a ControlNet's, one per skip and one;
                the first without the second is read as the next argument.
            down_intrablock_additional_residuals: a T2I-Adapter's, one per down block, and maybe the mid block.
            encoder_attention_mask: [B, S], 1 keep, 0 drop, on the text.
            return_dict: whether to return UNet2DConditionOutput(sample) or (sample,).
            encoder_key_bias: fp32 [B, S], added to the cross-attention logits of every block. One key with bias
                ln(m) counts as m equal keys, so m equal pad states can be given once.

        Raises:
            ValueError: an argument is missing, or has another shape than said above.
        """
        for name, value in (("class_labels", class_labels), ("timestep_cond", timestep_cond)):
            if value is not None:
                raise ValueError(f"{name}: expected None, for this model has no such input, got a value")
        adapter = down_intrablock_additional_residuals
        if adapter is None and mid_block_additional_residual is None:
            adapter = down_block_additional_residuals
        control = None
        if down_block_additional_residuals is not None and mid_block_additional_residual is not None:
            control = [*down_block_additional_residuals, mid_block_additional_residual]

        with lora_scaled(self, lora_scale(cross_attention_kwargs)):
            prompt = self.read_prompt(
                encoder_hidden_states, added_cond_kwargs, sample.dtype,
                mask=encoder_attention_mask, key_bias=encoder_key_bias,
            )  # fmt: skip
            time = self.embed_time(timestep, sample)
            if len(time) not in (1, len(sample)):
                raise ValueError(f"timestep: expected 1 or {len(sample)} numbers, got {len(time)}")
            shifts = self.shifts(time, prompt)
            cond = Conditioning(prompt, shifts, _mask_bias(attention_mask, sample.dtype))
            noise = self.denoise(sample, cond, control, adapter)
        return UNet2DConditionOutput(noise) if return_dict else (noise,)

    def read_prompt(
        self,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None,
        dtype: torch.dtype,
        *,
        mask: Tensor | None = None,
        key_bias: Tensor | None = None,
        keys_multiple: int = 1,
    ) -> Prompt:
        """What the model reads of its prompts at every step; known prompts are not read again.

        Arguments as those of `forward`; dtype is the sample's. Keys that do not count make their number a multiple of
        `keys_multiple`, where there are pads or a bias. An argument or weight that was edited is seen, unless it
        was edited through `.data` on a GPU, which PyTorch does not record: call `forget_prompts` after that.
        """
        for key in ("text_embeds", "time_ids"):
            if added_cond_kwargs is None or key not in added_cond_kwargs:
                raise ValueError(f"added_cond_kwargs: expected text_embeds and time_ids, got no {key}")
        assert added_cond_kwargs is not None
        pooled, time_ids = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]

        def read(keeps: bool) -> Prompt:
            states, bias = encoder_hidden_states, _sum(_mask_bias(mask, dtype), key_bias)
            if (
                bias is None
                and savings.on("pad_collapse")
                and not _library.tracing(states)
                and not torch.is_grad_enabled()
            ):
                states, bias = collapse_pads(states) or (states, None)
            if bias is not None:
                states, bias = filled_up(states, balanced(bias, dtype), keys_multiple)
            added = self.embed_added(pooled, time_ids, dtype)
            return Prompt(self.encoder_hid_proj(states), bias, added, self._cross_attentions() if keeps else ())

        return self._prompts.get(
            (encoder_hidden_states, mask, key_bias, pooled, time_ids), self._text_layers(), (dtype, keys_multiple), read
        )

    def forget_prompts(self) -> None:
        """Drop what is kept of prompts."""
        self._prompts.forget()

    def _text_layers(self) -> list[nn.Module]:
        """Whatever turns prompts into what the blocks read."""
        layers: list[nn.Module] = [self.encoder_hid_proj, self.add_embedding.linear_1, self.add_embedding.linear_2]
        for attention in self._cross_attentions():
            folded = [layer for layer in (attention.to_q, attention.to_out[0]) if not is_wrapped(layer)]
            layers += [attention.to_k, attention.to_v, *folded]
        return layers

    def _cross_attentions(self) -> Iterator[Attention]:
        for block in (*self.down_blocks, *self.up_blocks, self.mid_block):
            for transformer in block.attentions:
                for layer in transformer.transformer_blocks:
                    yield layer.attn2

    def _resnets(self) -> Iterator[ResnetBlock]:
        for block in (*self.down_blocks, *self.up_blocks, self.mid_block):
            yield from block.resnets

    def embed_time(self, timestep: Tensor | float | int, like: Tensor) -> Tensor:
        """T timesteps -> [T, time_dim], on the device and in the dtype of `like`."""
        if isinstance(timestep, Tensor):
            t = timestep.to(like.device).reshape(-1)
        else:  # filled on the device: a copy from the host would wait for it
            t = torch.full((1,), float(timestep), device=like.device)
        return self.time_embedding(self._sinusoid(t, self.config.block_out_channels[0]).to(like.dtype))

    def embed_added(self, pooled: Tensor, time_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Pooled text [B, D] and size ids [B, 6] -> [B, time_dim]."""
        sizes = self._sinusoid(time_ids.flatten(), self.config.addition_time_embed_dim)  # [B*6, 256]
        joined = torch.cat([pooled.to(dtype), sizes.reshape(pooled.shape[0], -1).to(dtype)], dim=-1)
        return self.add_embedding(joined)

    def shifts(self, time: Tensor, prompt: Prompt) -> dict[nn.Module, Tensor]:
        """What every residual block adds of the time embedding [..., B or 1, time_dim]: [..., B, Cout] each."""
        time = F.silu(time + prompt.added)
        return {block: block.projection(time) for block in self._resnets()}

    def plan_steps(self, timesteps: Tensor, prompt: Prompt) -> Steps:
        """The shifts of all steps [T] of a run at once."""
        state = State((timesteps,), self._time_layers())
        time = self.embed_time(timesteps, prompt.added)[:, None]  # [T, 1, time_dim]
        return Steps(prompt, self.shifts(time, prompt), timesteps, state)

    def follows(self, steps: Steps, prompt: Prompt) -> bool:
        """Whether a plan still holds: for this prompt, and no layer that made it has changed since."""
        return steps.prompt is prompt and steps.state.holds((steps.timesteps,), self._time_layers())

    def _time_layers(self) -> list[nn.Module]:
        """Whatever turns timesteps into shifts."""
        projections = [block.projection for block in self._resnets()]
        return [self.time_embedding.linear_1, self.time_embedding.linear_2, *projections]

    def _sinusoid(self, positions: Tensor, dim: int) -> Tensor:
        config = self.config
        return sinusoidal_embedding(
            positions, dim, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )

    def denoise(
        self,
        sample: Tensor,
        cond: Conditioning,
        control: Sequence[Tensor] | None = None,
        adapter: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The UNet proper. `control`: one residual per skip, then the mid block's; `adapter`: one per down block."""
        residuals = list(adapter or [])
        x = self.conv_in(sample.contiguous(memory_format=self._layout()))
        skips = [x]
        for block in self.down_blocks:
            x, made = block(x, cond, residuals.pop(0) if residuals else None)
            skips += made
        x = self.mid_block(x, cond)
        if residuals and residuals[0].shape == x.shape:
            x = x + residuals[0]
        if control is not None:
            if len(control) != len(skips) + 1:
                raise ValueError(
                    f"down_block_additional_residuals: expected {len(skips)} tensors, got {len(control) - 1}"
                )
            skips = [skip + residual for skip, residual in zip(skips, control[:-1], strict=True)]
            x = x + control[-1]
        for block in self.up_blocks:
            x = block(x, skips, cond)
        return self.conv_out(self.conv_norm_out(x))

    def _layout(self) -> torch.memory_format:
        """Of maps and weights; weights that lie otherwise are stored anew, where nothing trains."""
        layout = torch.channels_last if savings.on("channels_last") else torch.contiguous_format
        if isinstance(self.conv_in, nn.Conv2d) and not torch.is_grad_enabled():
            weight = self.conv_in.weight
            if not _library.tracing(weight) and not weight.is_contiguous(memory_format=layout):
                store_convolutions(self, layout)
        return layout

    @property
    def attn_processors(self) -> dict[str, AttentionProcessor]:
        """One entry per attention layer, in module order: down, up, mid; self- before cross-attention."""
        names = [name for name, module in self.named_modules() if name.endswith((".attn1", ".attn2"))]
        return {f"{name}.processor": AttentionProcessor() for name in names}

    def set_attn_processor(self, processor: Any) -> None:
        """Accept what stands for plain attention, see `check_processors`."""
        check_processors(processor, ("AttnProcessor2_0", "AttnProcessor"))


def _check_fixed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The full table of fixed values; unset, None, False and 0 mean the same."""
    for key, value in given.items():
        expected = FIXED.get(key)
        if (value or None) != (expected or None) and not (key == "encoder_hid_dim_type" and value is None):
            raise ValueError(f"{key}: expected {expected!r}, the only value KolorsUNet knows, got {value!r}")
    return {**FIXED, **{k: v for k, v in given.items() if v is not None}}


def _levels(config: Mapping[str, Any]) -> list[Level]:
    """The per-level values, from lists or from one number for all."""
    count = len(config["block_out_channels"])
    columns = []
    for key in PER_LEVEL:
        values = [config[key]] * count if isinstance(config[key], int) else list(config[key])
        if len(values) != count or not all(isinstance(v, int) and v > 0 for v in values):
            raise ValueError(f"{key}: expected a positive number or {count} of them, got {config[key]!r}")
        columns.append(values)
    levels = [Level(*row) for row in zip(*columns, strict=True)]
    for level in levels:
        if level.width % level.heads:
            raise ValueError(f"attention_head_dim: expected a divisor of {level.width} channels, got {level.heads}")
    return levels


def _attends(key: str, config: Mapping[str, Any], known: Mapping[str, bool]) -> list[bool]:
    """Whether each block has transformers."""
    types, count = config[key], len(config["block_out_channels"])
    if len(types) != count or not set(types) <= set(known):
        raise ValueError(f"{key}: expected {count} of {', '.join(known)}, got {list(types)}")
    return [known[kind] for kind in types]


def _mask_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """1 keep, 0 drop -> 0 and -10000, to be added to logits."""
    return None if mask is None else (1 - mask.to(dtype)) * -10000.0


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
