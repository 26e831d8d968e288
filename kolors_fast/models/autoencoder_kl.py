"""The KL autoencoder of Stable Diffusion, SDXL and Kolors: images [B,3,8h,8w] <-> latents [B,4,h,w].

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022. Config keys, state-dict
keys and call signatures follow diffusers' AutoencoderKL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .autoencoder_kl_layers import (
    AutoencoderDownsample,
    AutoencoderResnet,
    AutoencoderUpsample,
    MidAttention,
    StreamNorm,
    affine,
    stream_scale,
)
from .autoencoder_kl_tiles import decode_in_strips, encode_in_strips
from .checkpoint import PretrainedModel
from .layers import Conv2d, use_channels_last

# attention layers as files written before 2023 name them
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class DiagonalGaussianDistribution:
    """Normal distribution with independent components, from moments [B, 2C, h, w] = [mean | log variance]."""

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)  # [B, C, h, w] each
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """mean + std * noise; the noise is drawn on the generator's device, one generator for all or per item."""
        shape, dtype, device = self.mean.shape, self.parameters.dtype, self.parameters.device
        if isinstance(generator, Sequence):
            if len(generator) != shape[0]:
                raise ValueError(f"generator: expected one per item, {shape[0]}, got {len(generator)}")
            draws = [torch.randn(shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]
            noise = torch.stack([draw.to(device) for draw in draws])
        else:
            source = generator.device if generator is not None else device
            noise = torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL divergence in nats to `other` (default: the standard normal), summed per item: [B]."""
        if self.deterministic:
            return torch.zeros(1)
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            gap = (self.mean - other.mean) ** 2
            terms = (gap + self.var) / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=[1, 2, 3])


class AutoencoderKLOutput(NamedTuple):
    latent_dist: DiagonalGaussianDistribution


class DecoderOutput(NamedTuple):
    sample: Tensor  # [B, 3, H, W]


class MidBlock(nn.Module):
    def __init__(self, channels: int, num_groups: int, *, add_attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([MidAttention(channels, num_groups)] if add_attention else [])
        self.resnets = nn.ModuleList(AutoencoderResnet(channels, channels, num_groups) for _ in range(2))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.resnets[0](x, scale)
        for attention in self.attentions:
            x = attention(x, scale)
        return self.resnets[1](x, scale)


class DownBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, num_groups: int, *, downsample: bool
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * num_layers]
        self.resnets = nn.ModuleList(AutoencoderResnet(a, b, num_groups) for a, b in pairwise(widths))
        self.downsamplers = nn.ModuleList([AutoencoderDownsample(out_channels)] if downsample else [])

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x, scale)
        return x


class UpBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, num_groups: int, *, upsample: bool
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * num_layers]
        self.resnets = nn.ModuleList(AutoencoderResnet(a, b, num_groups) for a, b in pairwise(widths))
        self.upsamplers = nn.ModuleList([AutoencoderUpsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, scale)
        return x


class Encoder(nn.Module):
    """[B, in_channels, H, W] -> [B, out_channels, H / 2^(levels-1), W / 2^(levels-1)]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        num_layers: int,
        num_groups: int,
        *,
        mid_attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = Conv2d(in_channels, widths[0], 3, padding=1)
        levels = list(pairwise([widths[0], *widths]))
        self.down_blocks = nn.ModuleList(
            DownBlock(a, b, num_layers, num_groups, downsample=i < len(levels) - 1) for i, (a, b) in enumerate(levels)
        )
        self.mid_block = MidBlock(widths[-1], num_groups, add_attention=mid_attention)
        self.conv_norm_out = StreamNorm(num_groups, widths[-1])
        self.conv_out = Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x, scale = x.contiguous(memory_format=torch.channels_last), stream_scale(x)
        x = affine(self.conv_in, x, scale, normalised=True)
        for block in self.down_blocks:
            x = block(x, scale)
        return self.conv_out(self.conv_norm_out(self.mid_block(x, scale), scale=scale))


class Decoder(nn.Module):
    """[B, in_channels, h, w] -> [B, out_channels, h * 2^(levels-1), w * 2^(levels-1)]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        num_layers: int,
        num_groups: int,
        *,
        mid_attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = Conv2d(in_channels, widths[-1], 3, padding=1)
        levels = list(pairwise([widths[-1], *reversed(widths)]))
        self.up_blocks = nn.ModuleList(
            UpBlock(a, b, num_layers, num_groups, upsample=i < len(levels) - 1) for i, (a, b) in enumerate(levels)
        )
        self.mid_block = MidBlock(widths[-1], num_groups, add_attention=mid_attention)
        self.conv_norm_out = StreamNorm(num_groups, widths[0])
        self.conv_out = Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z, scale = z.contiguous(memory_format=torch.channels_last), stream_scale(z)
        x = self.mid_block(affine(self.conv_in, z, scale, normalised=True), scale)
        for block in self.up_blocks:
            x = block(x, scale)
        return self.conv_out(self.conv_norm_out(x, scale=scale))


class AutoencoderKL(PretrainedModel):
    """Encoder to a Gaussian over latents, and decoder back to images.

    Images are in [-1, 1]. The diffusion model works on `latent * config.scaling_factor`; this class never scales.
    Any number of levels: the side shrinks by 2^(len(block_out_channels) - 1).

    float16 needs no upcast: maps up to 4.19e6 fit (`autoencoder_kl_layers.py`). `force_upcast` is kept for diffusers'
    pipelines, which go by it. `enable_slicing` and `enable_tiling` trade time for memory, at the same result.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.register_config(**config)
        levels = len(block_out_channels)
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if list(self.config[key]) != [kind] * levels:
                raise ValueError(f"{key}: expected {levels} times {kind!r}, got {list(self.config[key])}")
        if act_fn not in ("silu", "swish"):
            raise ValueError(f"act_fn: expected 'silu', got {act_fn!r}")

        self.encoder = Encoder(
            in_channels,
            2 * latent_channels,
            block_out_channels,
            layers_per_block,
            norm_num_groups,
            mid_attention=mid_block_add_attention,
        )
        self.decoder = Decoder(
            latent_channels,
            out_channels,
            block_out_channels,
            layers_per_block + 1,
            norm_num_groups,
            mid_attention=mid_block_add_attention,
        )
        moments = 2 * latent_channels
        self.quant_conv = Conv2d(moments, moments, 1) if use_quant_conv else None
        self.post_quant_conv = Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        use_channels_last(self)
        self.use_slicing = self.use_tiling = False

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """x [B, in_channels, H, W] in [-1, 1] -> the posterior over latents [B, latent_channels, h, w]."""
        moments = self._by_slices(self._encode, x)  # [B, 2 * latent_channels, h, w]
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """z [B, latent_channels, h, w], unscaled -> images [B, out_channels, H, W], about in [-1, 1].

        `generator` is accepted for callers that pass one to every autoencoder; decoding is deterministic.
        """
        image = self._by_slices(self._decode, z)
        return DecoderOutput(image) if return_dict else (image,)

    def _encode(self, x: Tensor) -> Tensor:
        moments = encode_in_strips(self.encoder, x) if self._in_strips(x) else self.encoder(x)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode(self, z: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return decode_in_strips(self.decoder, z) if self._in_strips(z) else self.decoder(z)

    def _by_slices(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self.use_slicing or x.shape[0] < 2:
            return function(x)
        return torch.cat([function(one) for one in x.split(1)])

    def _in_strips(self, x: Tensor) -> bool:
        tracked = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        return self.use_tiling and not tracked and x.numel() > 0

    def enable_slicing(self) -> None:
        """Encode and decode one item of a batch at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encode and decode by strips of rows: the same result up to rounding, and no seams, in less memory.

        See `decode_peak_bytes`. Where autograd records, which keeps every map anyway, nothing is divided.
        """
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def forward(
        self,
        sample: Tensor,  # [B, in_channels, H, W]
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode, take the mode (or a sample) of the posterior, decode."""
        posterior = self.encode(sample)[0]
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def _convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        def renamed(key: str) -> str:
            for old, new in OLD_NAMES.items():
                key = key.replace(old, new)
            return key

        return {renamed(key): value for key, value in state.items()}
