"""Prompts to the text features that SD3's MM-DiT reads, from two CLIP encoders and T5, any of which may be missing.

    sequence = [ CLIP-L | CLIP-bigG | zeros up to T5's width ]   77 rows
               [ T5                                          ]   max_sequence_length rows
    pooled   = [ CLIP-L | CLIP-bigG ]

Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024;
Stability-AI/sd3.5 `sd3_impls.py`, `other_impls.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import expect, whole
from .text_encoders import distinct, tokenize

CLIP_TOKENS = 77  # of both CLIP models
MAX_T5_TOKENS = 512
DROP = 0.463  # dropped independently, all three are 0.463^3, a tenth of the time


@dataclass(frozen=True)
class SD3TextFeatures:
    """Features of B prompts, as MMDiT's `encoder_hidden_states` and `pooled_projections`."""

    prompt_embeds: Tensor  # [B, 77 + L, joint_attention_dim]
    pooled_prompt_embeds: Tensor  # [B, pooled_projection_dim]

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def select(self, rows: Tensor | slice) -> SD3TextFeatures:
        """The features of some of the prompts, in any order and number; rows is int64 [M] or a slice."""
        return SD3TextFeatures(self.prompt_embeds[rows], self.pooled_prompt_embeds[rows])

    def repeated(self, times: int) -> SD3TextFeatures:
        """Those of each prompt so many times, side by side."""
        both = (self.prompt_embeds, self.pooled_prompt_embeds)
        return SD3TextFeatures(*(tensor.repeat_interleave(times, dim=0) for tensor in both))

    def to(self, *args: Any, **kwargs: Any) -> SD3TextFeatures:
        """A copy on another device or in another dtype, as `Tensor.to` makes it."""
        return SD3TextFeatures(self.prompt_embeds.to(*args, **kwargs), self.pooled_prompt_embeds.to(*args, **kwargs))


@dataclass(frozen=True)
class SD3TextParts:
    """Outputs of the three encoders for B prompts, apart, so that training can drop each by itself."""

    clip_l: Tensor  # [B, 77, W1]
    clip_l_pooled: Tensor  # [B, P1]
    clip_g: Tensor  # [B, 77, W2]
    clip_g_pooled: Tensor  # [B, P2]
    t5: Tensor  # [B, L, joint_attention_dim]

    def __len__(self) -> int:
        return self.t5.shape[0]

    def join(self) -> SD3TextFeatures:
        """The features that the denoiser reads; parts of several dtypes take the widest, as in diffusers."""
        clip = torch.cat((self.clip_l, self.clip_g), -1)
        clip = pad(clip, (0, self.t5.shape[-1] - clip.shape[-1]))
        pooled = torch.cat((self.clip_l_pooled, self.clip_g_pooled), -1)
        return SD3TextFeatures(torch.cat((clip, self.t5), 1), pooled)


class _Widths(NamedTuple):
    clip_l: int
    clip_l_pooled: int
    clip_g: int
    clip_g_pooled: int


@dataclass(frozen=True)
class SD3TextEncoders:
    """The three text encoders of a pipeline by its own names, None where one is missing.

    In place of a missing encoder stand zeros, in the dtype and on the device of the first one present (float32 on the
    CPU if there is none). Their shapes follow from the denoiser's config and nothing else:

    - T5: `max_sequence_length` rows of joint_attention_dim.
    - One CLIP: 77 rows; its pooled width is what the other leaves of pooled_projection_dim, and its width in the
      sequence the same, as in every released checkpoint (768 and 1280).
    - Both CLIPs: pooled_projection_dim as 3 to 5 (768 and 1280 of 2048), which no joined feature shows: all are zeros.

    Without any encoder every feature is zero: what the model was trained with on the tenth of its pictures.

    Args:
        joint_attention_dim, pooled_projection_dim: of the denoiser's config.
        tokenizer, text_encoder: CLIPTokenizer, and CLIPTextModelWithProjection of CLIP-L.
        tokenizer_2, text_encoder_2: the same of OpenCLIP bigG.
        tokenizer_3, text_encoder_3: T5TokenizerFast or T5Tokenizer, and T5EncoderModel.

    Raises:
        ValueError: an encoder comes without its tokenizer, or its width does not fit the denoiser.
    """

    joint_attention_dim: int
    pooled_projection_dim: int
    tokenizer: Any = None
    text_encoder: Any = None
    tokenizer_2: Any = None
    text_encoder_2: Any = None
    tokenizer_3: Any = None
    text_encoder_3: Any = None

    def __post_init__(self) -> None:
        for suffix in ("", "_2", "_3"):
            encoder, tokenizer = getattr(self, f"text_encoder{suffix}"), getattr(self, f"tokenizer{suffix}")
            paired = encoder is None or tokenizer is not None
            expect(paired, f"tokenizer{suffix}", f"the tokenizer of text_encoder{suffix}", "None")
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(self, name)
            expected = "None or a CLIPTextModelWithProjection"
            expect(encoder is None or hasattr(encoder, "text_projection"), name, expected, type(encoder).__name__)
        if self.text_encoder_3 is not None:
            width = self.text_encoder_3.config.d_model
            expected = f"a width of {self.joint_attention_dim}, the denoiser's joint_attention_dim"
            expect(width == self.joint_attention_dim, "text_encoder_3", expected, width)
        widths = self.widths
        pooled = (widths.clip_l_pooled, widths.clip_g_pooled)
        expected = f"projections that fill the denoiser's pooled_projection_dim, {self.pooled_projection_dim}"
        fits = sum(pooled) == self.pooled_projection_dim and min(pooled) >= 0
        expect(fits, "text_encoder and text_encoder_2", expected, f"{pooled[0]} and {pooled[1]}")
        expected = f"at most {self.joint_attention_dim} features, the denoiser's joint_attention_dim"
        fits = widths.clip_l + widths.clip_g <= self.joint_attention_dim
        expect(fits, "text_encoder and text_encoder_2", expected, f"{widths.clip_l} and {widths.clip_g}")

    @property
    def widths(self) -> _Widths:
        """Features of both CLIPs in the sequence and in the pooled vector, see the class."""
        clip_l, clip_g = (
            None if encoder is None else (encoder.config.hidden_size, encoder.config.projection_dim)
            for encoder in (self.text_encoder, self.text_encoder_2)
        )
        pooled = self.pooled_projection_dim
        if clip_l is None:
            clip_l = (pooled - clip_g[1],) * 2 if clip_g is not None else (pooled * 3 // 8,) * 2
        if clip_g is None:
            clip_g = (pooled - clip_l[1],) * 2
        return _Widths(*clip_l, *clip_g)

    @property
    def clip_tokens(self) -> int:
        """Rows of both CLIPs: the shorter of what those present were made for, 77 in every released checkpoint."""
        pairs = ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2))
        present = [(tokenizer, encoder) for tokenizer, encoder in pairs if encoder is not None]
        limits = [
            min(tokenizer.model_max_length, encoder.config.max_position_embeddings) for tokenizer, encoder in present
        ]
        return min(limits, default=CLIP_TOKENS)


def read_sd3_prompts(
    encoders: SD3TextEncoders,
    prompts: Sequence[list[str]],
    max_sequence_length: int = 256,
    clip_skip: int | None = None,
) -> SD3TextFeatures:
    """Features of B prompts, see `read_sd3_parts`."""
    return read_sd3_parts(encoders, prompts, max_sequence_length, clip_skip).join()


def read_sd3_parts(
    encoders: SD3TextEncoders,
    prompts: Sequence[list[str]],
    max_sequence_length: int = 256,
    clip_skip: int | None = None,
) -> SD3TextParts:
    """Outputs of the three encoders for B prompts; each reads equal prompts once.

    Prompts longer than 77 tokens, or `max_sequence_length` for T5, are cut with a warning that names the encoder and
    what is lost. No encoder sees a mask: pads are read as any token, as in training.

    Args:
        encoders: any of them may be missing.
        prompts: three lists of B: for CLIP-L, for CLIP-bigG and for T5; `per_encoder` makes them.
        max_sequence_length: T5's rows, 1 to 512.
        clip_skip: layers of CLIP to skip before the last but one, which None and 0 read. diffusers skips none for
            negative prompts.

    Raises:
        ValueError: lists of several lengths or empty ones, or a number out of its range.
    """
    counts = [len(texts) for texts in prompts]
    same = len(counts) == 3 and min(counts) > 0 and len(set(counts)) == 1
    expect(same, "prompts", "three lists of one length from 1, one for each text encoder", f"lengths {counts}")
    fits = whole(max_sequence_length) and 1 <= max_sequence_length <= MAX_T5_TOKENS
    expect(fits, "max_sequence_length", f"1 to {MAX_T5_TOKENS}", repr(max_sequence_length))

    present = [e for e in (encoders.text_encoder, encoders.text_encoder_2, encoders.text_encoder_3) if e is not None]
    dtype, device = (present[0].dtype, present[0].device) if present else (torch.float32, torch.device("cpu"))
    widths, tokens = encoders.widths, encoders.clip_tokens

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(counts[0], *shape, dtype=dtype, device=device)

    parts: list[Tensor] = []
    for place, suffix in enumerate(("", "_2")):
        name, encoder = f"text_encoder{suffix}", getattr(encoders, f"text_encoder{suffix}")
        if encoder is None:
            width, pooled_width = widths[2 * place : 2 * place + 2]
            parts += [zeros(tokens, width), zeros(pooled_width)]
        else:
            tokenizer = getattr(encoders, f"tokenizer{suffix}")
            parts += _read_clip(name, tokenizer, encoder, prompts[place], tokens, clip_skip)
    if encoders.text_encoder_3 is None:
        parts.append(zeros(max_sequence_length, encoders.joint_attention_dim))
    else:
        parts.append(_read_t5(encoders.tokenizer_3, encoders.text_encoder_3, prompts[2], max_sequence_length))
    return SD3TextParts(*(part.to(device) for part in parts))


def drop_sd3_features(
    parts: SD3TextParts, probability: float = DROP, generator: torch.Generator | None = None
) -> SD3TextParts:
    """Zeros in place of each encoder's output for each prompt by a draw of its own, for training with guidance.

    A CLIP's rows and its pooled vector go together. What is left may hold no encoder at all: the unconditional features
    of a model trained so.

    Args:
        parts: not changed.
        probability: of each drop, 0 to 1. The default is the paper's main text (its appendix says 46.4 %).
        generator: the source of the 3 B draws, on its own device; None is torch's default on the CPU. Equal states give
            equal drops, whatever the device of the parts.

    Raises:
        ValueError: the probability is out of range.
    """
    expect(0 <= probability <= 1, "probability", "0 to 1", probability)
    device = None if generator is None else generator.device
    return without_encoders(parts, torch.rand(3, len(parts), generator=generator, device=device) < probability)


def without_encoders(parts: SD3TextParts, drops: Tensor) -> SD3TextParts:
    """Zeros in place of an encoder's output where `drops` [3, B], of CLIP L, CLIP G and T5, says so."""

    def dropped(value: Tensor, drop: Tensor) -> Tensor:
        return value.masked_fill(drop.to(value.device).view(-1, *(1,) * (value.dim() - 1)), 0)

    return SD3TextParts(
        clip_l=dropped(parts.clip_l, drops[0]),
        clip_l_pooled=dropped(parts.clip_l_pooled, drops[0]),
        clip_g=dropped(parts.clip_g, drops[1]),
        clip_g_pooled=dropped(parts.clip_g_pooled, drops[1]),
        t5=dropped(parts.t5, drops[2]),
    )


def per_encoder(
    prompt: str | list[str],
    prompt_2: str | list[str] | None,
    prompt_3: str | list[str] | None,
    count: int | None = None,
    prefix: str = "",
) -> tuple[list[str], list[str], list[str]]:
    """The lists that `read_sd3_prompts` reads: an empty prompt_2 or prompt_3 is prompt, as in diffusers.

    Args:
        prompt, prompt_2, prompt_3: one string stands for all prompts.
        count: the number of prompts; None is that of `prompt`.
        prefix: of the arguments' names in errors: "negative_".

    Raises:
        ValueError: a list of another length.
    """
    if count is None:
        count = 1 if isinstance(prompt, str) else len(prompt)

    def listed(suffix: str, value: str | list[str]) -> list[str]:
        texts = [value] * count if isinstance(value, str) else value
        expect(len(texts) == count, f"{prefix}prompt{suffix}", f"one string or {count}", len(texts))
        return texts

    return listed("", prompt), listed("_2", prompt_2 or prompt), listed("_3", prompt_3 or prompt)


def _read_clip(
    name: str, tokenizer: Any, encoder: Any, prompts: list[str], length: int, clip_skip: int | None
) -> tuple[Tensor, Tensor]:
    """States before the last layer and `clip_skip` more, without the final norm, and the end token's projection."""
    layers = encoder.config.num_hidden_layers
    skipped = 0 if clip_skip is None else clip_skip
    expect(whole(skipped) and 0 <= skipped < layers, "clip_skip", f"None or 0 to {layers - 1}", repr(clip_skip))
    texts, rows = distinct(prompts)
    ids, _ = tokenize(tokenizer, texts, length, name)
    with torch.no_grad():
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
    embeds = output.hidden_states[-(skipped + 2)].to(encoder.dtype)
    return embeds[rows], output.text_embeds[rows]


def _read_t5(tokenizer: Any, encoder: Any, prompts: list[str], length: int) -> Tensor:
    texts, rows = distinct(prompts)
    ids, _ = tokenize(tokenizer, texts, length, "text_encoder_3")
    with torch.no_grad():
        embeds = encoder(ids.to(encoder.device))[0]
    return embeds.to(encoder.dtype)[rows]
