"""The denoiser of PixArt-alpha and PixArt-Sigma: a diffusion transformer with cross-attention to T5's states and one
modulation network for all blocks (adaLN-single).

Chen et al., "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis",
arXiv 2310.00426; Chen et al., "PixArt-Sigma", arXiv 2403.04692. Config keys, state-dict keys and the forward signature
follow diffusers' PixArtTransformer2DModel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import savings
from ..ops import _library
from . import pixart_from_dit, pixart_original
from .attention import Attention
from .checkpoint import PretrainedModel, _check_state
from .conditioning import Conditioning, PromptCache, State, Steps
from .dit_layers import add_and_modulate, as_timesteps, modulated, unpatchify
from .layers import Linear, is_wrapped
from .lora import lora_scale, lora_scaled
from .pixart_blocks import AdaLayerNormSingle, CaptionProjection, Left, PatchEmbedding, TransformerBlock
from .pixart_conditioning import Captions, Prompt, masked, trimmed
from .pixart_original import NULL_CAPTION, from_original, read_file, to_original
from .processors import AttentionProcessor, check_processors
from .unet_conditioning import filled_up

SIZES = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size")

# config values of diffusers' class that have one meaning here; unlisted ones must be unset
FIXED = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "upcast_attention": False,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_type": "default",
}


class PixArtTransformerOutput(NamedTuple):
    sample: Tensor  # [B, out_channels, H, W]


class PixArtTransformer(PretrainedModel):
    """Predicts the noise in a latent [B, in_channels, h, w], and its variance where there are twice as many
    out_channels, from the timestep, the captions and maybe the picture's sizes.

    The defaults are diffusers'; released models have caption_channels=4096. Their weights fit sample sizes 32, 64 and
    128 alike, which differ in how finely positions are counted.

    Args:
        num_attention_heads, attention_head_dim: whose product is the width D, a multiple of 4.
        out_channels: None: those that come in.
        sample_size: side of the latents that positions are counted for; others are stretched to it.
        interpolation_scale: what positions are divided by; None: max(sample_size // 64, 1).
        use_additional_conditions: whether `added_cond_kwargs` are read; None: where sample_size is 128. PixArt-Sigma's
            1024-pixel model has that size and says False.
        caption_channels: width of the captions; None: they are `cross_attention_dim` wide and not projected.
        norm_num_groups, num_embeds_ada_norm: without influence, in diffusers too.
        fixed: diffusers' config values for variants of the architecture: only PixArt's values are accepted.
    """

    diffusers_name = "PixArtTransformer2DModel"
    _other_names = ("Transformer2DModel",)

    transformer_blocks: Sequence[TransformerBlock]
    # states [S, caption_channels] that training put in the place of dropped captions, of a model from a single file
    # that has them; diffusers drops them and encodes "" instead
    null_caption: Tensor | None = None

    def __init__(
        self,
        *,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        norm_num_groups: int = 32,
        cross_attention_dim: int = 1152,
        sample_size: int = 128,
        patch_size: int = 2,
        num_embeds_ada_norm: int | None = 1000,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        **fixed: Any,
    ) -> None:
        values = {k: v for k, v in locals().items() if k not in ("self", "__class__", "fixed")}
        super().__init__()
        self.register_config(**values, **_check_fixed(fixed))
        for key in SIZES:
            if not isinstance(self.config[key], int) or self.config[key] < 1:
                raise ValueError(f"{key}: expected a positive number, got {self.config[key]!r}")
        dim = num_attention_heads * attention_head_dim
        self.has_sizes = sample_size == 128 if use_additional_conditions is None else use_additional_conditions
        if dim % 4 or (self.has_sizes and dim % 3):
            multiple = 12 if self.has_sizes else 4
            raise ValueError(f"attention_head_dim: expected heads that are {multiple}n wide together, got {dim}")
        if caption_channels is not None and cross_attention_dim != dim:
            raise ValueError(f"cross_attention_dim: expected {dim}, as wide as the heads, got {cross_attention_dim}")

        self.pos_embed = PatchEmbedding(
            patch_size,
            in_channels,
            dim,
            base_size=sample_size // patch_size,
            scale=max(sample_size // 64, 1) if interpolation_scale is None else interpolation_scale,
        )
        self.transformer_blocks = nn.ModuleList(  # type: ignore[assignment]  # a sequence of them
            TransformerBlock(dim, num_attention_heads, cross_attention_dim) for _ in range(num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = Linear(dim, patch_size**2 * (out_channels or in_channels))
        self.adaln_single = AdaLayerNormSingle(dim, has_sizes=self.has_sizes)
        self.caption_projection = CaptionProjection(caption_channels, dim) if caption_channels is not None else None
        self.gradient_checkpointing = False
        self._prompts = PromptCache()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor | float | int,
        added_cond_kwargs: Mapping[str, Tensor | None] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> PixArtTransformerOutput | tuple[Tensor]:
        """Predict the noise in `hidden_states`.

        Args:
            hidden_states: [B, in_channels, h, w], sides in multiples of the patch.
            encoder_hidden_states: captions [B, S, caption_channels].
            timestep: number, or tensor of 1 or B numbers.
            added_cond_kwargs: `resolution` [B, 2] (height and width in pixels) and `aspect_ratio` [B, 1] (height over
                width), read by models with micro-conditioning only.
            cross_attention_kwargs: `scale` multiplies the injected LoRA layers for this call.
            attention_mask: [B, N], 1 keep, 0 drop, or a bias [B, 1, N], on the patches of self-attention.
            encoder_attention_mask: [B, S], 1 keep, 0 drop, or a bias [B, 1, S] on the logits, on the captions. Where
                it keeps no token of a caption, that sample's cross-attention adds `to_out`'s bias alone, as in PixArt's
                own code, whose attention sees nothing but the kept tokens; diffusers attends to all of the pads.
            return_dict: whether to return PixArtTransformerOutput(sample) or (sample,).

        Raises:
            ValueError: an argument is missing, or has another shape than said above.
        """
        with lora_scaled(self, lora_scale(cross_attention_kwargs)):
            prompt = self.read_prompt(
                encoder_hidden_states, added_cond_kwargs, hidden_states.dtype, mask=encoder_attention_mask
            )
            time = self._embed_time(as_timesteps(timestep, hidden_states.device), prompt)
            samples, captions = len(hidden_states), len(encoder_hidden_states)
            if captions != samples:
                raise ValueError(f"encoder_hidden_states: expected {samples} captions, one a sample, got {captions}")
            if len(time) not in (1, samples):
                raise ValueError(f"timestep: expected 1 or {samples} numbers, got {len(time)}")
            bias = _self_bias(attention_mask, hidden_states.dtype)
            cond = Conditioning(prompt, self._modulations(time, prompt), bias)
            sample = self.denoise(hidden_states, cond)
        return PixArtTransformerOutput(sample) if return_dict else (sample,)

    def read_prompt(
        self,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor | None] | None,
        dtype: torch.dtype,
        *,
        mask: Tensor | None = None,
        keys_multiple: int = 1,
    ) -> Prompt:
        """What the model reads of its prompts at every step; known prompts are not read again.

        Arguments as those of `forward`; dtype is the sample's. Where there is a mask, only the tokens of the longest
        caption are kept, and keys that do not count make their number a multiple of `keys_multiple`. An argument or
        weight that was edited is seen, unless it was edited through `.data` on a GPU, which PyTorch does not record:
        call `forget_prompts` after that.
        """
        self._check_captions(encoder_hidden_states, mask)
        resolution, aspect_ratio = self._check_sizes(added_cond_kwargs, len(encoder_hidden_states))

        def read(keeps: bool) -> Prompt:
            captions = Captions(encoder_hidden_states)
            if mask is not None:
                captions = masked(encoder_hidden_states, mask)
                looks = not _library.tracing(encoder_hidden_states, mask) and not torch.is_grad_enabled()
                if looks and savings.on("pad_collapse"):
                    captions = trimmed(captions)
                if keys_multiple > 1:
                    captions = _filled_up(captions, keys_multiple)
            text = captions.states if self.caption_projection is None else self.caption_projection(captions.states)
            sizes = None
            if resolution is not None and aspect_ratio is not None:
                sizes = self.adaln_single.emb.sizes(resolution, aspect_ratio, dtype)
            return Prompt(text, captions, sizes, dtype, self._cross_attentions() if keeps else ())

        inputs = (encoder_hidden_states, mask, resolution, aspect_ratio)
        return self._prompts.get(inputs, self._text_layers(), (dtype, keys_multiple), read)

    def forget_prompts(self) -> None:
        """Drop what is kept of prompts."""
        self._prompts.forget()

    def plan_steps(self, timesteps: Tensor, prompt: Prompt) -> Steps:
        """The modulations of all steps [T] of a run at once."""
        state = State((timesteps, *self._tables()), self._time_layers())
        time = self._embed_time(timesteps, prompt)[:, None]  # [T, 1, D]
        return Steps(prompt, self._modulations(time, prompt), timesteps, state)

    def follows(self, steps: Steps, prompt: Prompt) -> bool:
        """Whether a plan still holds: for this prompt, and nothing that made it has changed since."""
        same = steps.prompt is prompt
        return same and steps.state.holds((steps.timesteps, *self._tables()), self._time_layers())

    def denoise(self, sample: Tensor, cond: Conditioning) -> Tensor:
        """The transformer proper, at one step."""
        x, left = self.pos_embed(sample), None
        for block in self.transformer_blocks:
            x, left = self._run(block, x, left, cond)
        shift, scale = cond.modulations[self].chunk(2, dim=-1)
        h = modulated(x, scale, shift) if left is None else add_and_modulate(x, *left, scale, shift)[1]
        return unpatchify(self.proj_out(h), self.pos_embed.grid(sample), self.pos_embed.patch_size)

    def enable_gradient_checkpointing(self) -> None:
        """Keep one tensor of each block for the backward pass, and compute the others anew there."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    @property
    def attn_processors(self) -> dict[str, AttentionProcessor]:
        """One entry per attention layer, in module order; self- before cross-attention."""
        names = [name for name, module in self.named_modules() if isinstance(module, Attention)]
        return {f"{name}.processor": AttentionProcessor() for name in names}

    def set_attn_processor(self, processor: Any) -> None:
        """Accept what stands for plain attention, see `check_processors`."""
        check_processors(processor, ("AttnProcessor2_0", "AttnProcessor"))

    # ---- other files, and fresh weights

    @classmethod
    def from_single_file(
        cls,
        file: str | os.PathLike[str],
        *,
        sample_size: int,
        interpolation_scale: float | None = None,
        num_attention_heads: int = 16,
        ema: bool = False,
        torch_dtype: torch.dtype | None = None,
    ) -> PixArtTransformer:
        """Load one of PixArt's own .pth files, in eval mode; `null_caption` is the file's, where it has one.

        Args:
            file: holds a state dict, by itself or under "state_dict" or "state_dict_ema".
            sample_size, interpolation_scale, num_attention_heads: what the file does not tell: 32, 64 or 128 for
                pictures of 256, 512 or 1024 pixels, 256 for 2048; see the class; 16 in all released models.
            ema: of two state dicts take the averaged one.
            torch_dtype: None is float32.

        Raises:
            CheckpointError: the file is missing, truncated, another model's, or a PixArt-Sigma with compressed keys.
        """
        names = ("state_dict_ema", "state_dict") if ema else ("state_dict", "state_dict_ema")
        state = read_file(file, *names)
        config = pixart_original.config_of(state, num_attention_heads, file)
        model = cls.empty(
            {**config, "sample_size": sample_size, "interpolation_scale": interpolation_scale}, torch_dtype
        )
        model._take(from_original(state), file)
        model.null_caption = state.get(NULL_CAPTION)
        return model

    def save_single_file(self, file: str | os.PathLike[str]) -> None:
        """Write a .pth file as `from_single_file` and PixArt's own code read it."""
        caption = {} if self.null_caption is None else {NULL_CAPTION: self.null_caption}
        pixart_original.write_state(file, {**to_original(self.state_dict()), **caption})

    @classmethod
    def from_dit(
        cls,
        source: Mapping[str, Tensor] | str | os.PathLike[str],
        *,
        caption_channels: int = 4096,
        sample_size: int | None = None,
        num_attention_heads: int = 16,
        generator: torch.Generator | None = None,
    ) -> PixArtTransformer:
        """A model to be trained that starts as a class-conditional DiT: at t = 500 it computes what that does without
        its class embedding, for any caption (see `pixart_from_dit`).

        Args:
            source: a DiT's state dict, or a file of it, by itself or under "ema", with the keys of
                github.com/facebookresearch/DiT.
            caption_channels: see the class.
            sample_size: None: that of the DiT's position table.
            num_attention_heads: 16 in DiT-XL and DiT-L.
            generator: of the weights that a DiT does not determine, see `init_weights`.

        Raises:
            CheckpointError: the source is no such DiT.
        """
        dit, name = (source, "the state dict") if isinstance(source, Mapping) else (read_file(source, "ema"), source)
        config = pixart_from_dit.config_of(dit, num_attention_heads, str(name))
        if sample_size is not None:
            config["sample_size"] = sample_size
        if "sample_size" not in config:
            raise ValueError(f"sample_size: expected a number, for {name} has no position table to tell it, got None")
        model = cls(caption_channels=caption_channels, **config)
        model.init_weights(generator)
        started = {**to_original(model.state_dict()), **pixart_from_dit.reparameterised(dit, config["num_layers"])}
        model._take(from_original(started), str(name))
        return model.eval()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights, as PixArt's training begins: cross-attention adds nothing, and the prediction is zero.

        Linear layers and patches are Xavier-uniform, those of embeddings and of the shared modulation N(0, 0.02^2),
        biases zero, tables N(0, 1 / D). The generator is on the device of the weights.
        """
        parts = (self.adaln_single, self.caption_projection)
        narrow = {layer for part in parts if part is not None for layer in part.modules()}
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                bound = (6 / (layer.weight[0].numel() + len(layer.weight))) ** 0.5
                if layer in narrow:
                    layer.weight.normal_(std=0.02, generator=generator)
                else:
                    layer.weight.uniform_(-bound, bound, generator=generator)
                if layer.bias is not None:
                    layer.bias.zero_()
        for table in self._tables():
            table.normal_(std=table.shape[1] ** -0.5, generator=generator)
        self.proj_out.weight.zero_()
        for attention in self._cross_attentions():
            attention.to_out[0].weight.zero_()  # type: ignore[operator]  # a linear layer's

    def _take(self, state: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
        """Load a complete state dict, cast to the model's dtypes; tensors that need no cast are taken over."""
        wanted = self.state_dict()
        _check_state(dict(state), wanted, type(self).__name__, Path(source))
        self.load_state_dict({key: value.to(wanted[key].dtype) for key, value in state.items()}, assign=True)

    # ---- parts

    def _run(
        self, block: TransformerBlock, x: Tensor, left: Left | None, cond: Conditioning
    ) -> tuple[Tensor, Left | None]:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(x, left, cond)
        return checkpoint(block.whole, x, cond, use_reentrant=False), None

    def _embed_time(self, timesteps: Tensor, prompt: Prompt) -> Tensor:
        """[T] -> [T, D], in the dtype of the samples."""
        return self.adaln_single.emb.time(timesteps, prompt.dtype)

    def _modulations(self, time: Tensor, prompt: Prompt) -> dict[nn.Module, Tensor]:
        """What every block, and the last layer, make of the time embedding [..., B or 1, D]: [..., B, 6D or 2D]."""
        if prompt.sizes is not None:
            time = time + prompt.sizes
        shared = self.adaln_single(time)
        samples = (*time.shape[:-2], len(prompt.text), -1)
        found: dict[nn.Module, Tensor] = {
            block: (shared + block.scale_shift_table.flatten()).expand(samples) for block in self.transformer_blocks
        }
        found[self] = (time[..., None, :] + self.scale_shift_table).flatten(-2).expand(samples)
        return found

    def _cross_attentions(self) -> Iterator[Attention]:
        for block in self.transformer_blocks:
            yield block.attn2

    def _text_layers(self) -> list[nn.Module]:
        """Whatever turns prompts into what the blocks read."""
        layers: list[nn.Module] = []
        for attention in self._cross_attentions():
            folded = [layer for layer in (attention.to_q, attention.to_out[0]) if not is_wrapped(layer)]
            layers += [attention.to_k, attention.to_v, *folded]
        if self.caption_projection is not None:
            layers += [self.caption_projection.linear_1, self.caption_projection.linear_2]
        if self.has_sizes:
            for embedder in (self.adaln_single.emb.resolution_embedder, self.adaln_single.emb.aspect_ratio_embedder):
                layers += [embedder.linear_1, embedder.linear_2]
        return layers

    def _time_layers(self) -> list[nn.Module]:
        """Whatever turns timesteps into modulations, beside the tables."""
        embedder = self.adaln_single.emb.timestep_embedder
        return [embedder.linear_1, embedder.linear_2, self.adaln_single.linear]

    def _tables(self) -> list[Tensor]:
        return [self.scale_shift_table, *(block.scale_shift_table for block in self.transformer_blocks)]

    # ---- checks

    def _check_captions(self, captions: Tensor, mask: Tensor | None) -> None:
        width = self.config.caption_channels or self.config.cross_attention_dim
        if not isinstance(captions, Tensor) or captions.dim() != 3 or captions.shape[-1] != width:
            got = list(captions.shape) if isinstance(captions, Tensor) else captions
            raise ValueError(f"encoder_hidden_states: expected captions [B, S, {width}], got {got}")
        samples, length, _ = captions.shape
        if mask is not None and mask.shape not in ((samples, length), (samples, 1, length)):
            expected = f"[{samples}, {length}] or [{samples}, 1, {length}]"
            raise ValueError(f"encoder_attention_mask: expected {expected}, got {list(mask.shape)}")

    def _check_sizes(
        self, added: Mapping[str, Tensor | None] | None, samples: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Resolution and aspect ratio, of a model that reads them."""
        if not self.has_sizes:
            return None, None
        found = []
        for key, shapes in (("resolution", ((samples, 2),)), ("aspect_ratio", ((samples, 1), (samples,)))):
            value = (added or {}).get(key)
            if value is None:
                raise ValueError(f"added_cond_kwargs: expected resolution and aspect_ratio, got no {key}")
            if value.shape not in shapes:
                raise ValueError(f"added_cond_kwargs: {key}: expected {list(shapes[0])}, got {list(value.shape)}")
            found.append(value)
        return found[0], found[1]


def _filled_up(captions: Captions, multiple: int) -> Captions:
    """With keys that do not count, up to a multiple."""
    states, bias, alive = captions
    if bias is None:
        bias = states.new_zeros(states.shape[:2], dtype=torch.promote_types(states.dtype, torch.float32))
    return Captions(*filled_up(states, bias, multiple), alive)


def _self_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask [B, N], 1 keep and 0 drop, or a bias [B, 1, N] -> [B, N], to be added to logits."""
    if mask is None:
        return None
    if mask.dim() == 3 and mask.shape[1] != 1:
        samples, _, keys = mask.shape
        raise ValueError(
            f"attention_mask: expected [{samples}, {keys}] or [{samples}, 1, {keys}], got {list(mask.shape)}"
        )
    return (1 - mask.to(dtype)) * -10000.0 if mask.dim() == 2 else mask[:, 0]


def _check_fixed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The full table of fixed values; unset, None, False and 0 mean the same."""
    for key, value in given.items():
        expected = FIXED.get(key)
        if (value or None) != (expected or None):
            raise ValueError(f"{key}: expected {expected!r}, the only value PixArtTransformer knows, got {value!r}")
    return {**FIXED, **{k: v for k, v in given.items() if v is not None}}
