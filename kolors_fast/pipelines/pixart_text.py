"""Prompts to the text features that PixArt's transformer reads, from T5.

Source: Chen et al., "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis",
2023; PixArt-alpha/PixArt-alpha `diffusion/model/t5.py`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import expect, whole
from .clean_caption import clean_caption as cleaned_once
from .text_encoders import distinct, tokenize

ALPHA_TOKENS = 120
SIGMA_TOKENS = 300


@dataclass(frozen=True)
class PixArtTextFeatures:
    """Features of B prompts, as PixArtTransformer's `encoder_hidden_states` and `encoder_attention_mask`."""

    prompt_embeds: Tensor  # [B, L, D]
    prompt_attention_mask: Tensor  # int64 [B, L], 1 on tokens, 0 on the pads to their right

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def select(self, rows: Tensor | slice) -> PixArtTextFeatures:
        """The features of some of the prompts, in any order and number; rows is int64 [M] or a slice."""
        return PixArtTextFeatures(self.prompt_embeds[rows], self.prompt_attention_mask[rows])

    def repeated(self, times: int) -> PixArtTextFeatures:
        """Those of each prompt so many times, side by side."""
        both = (self.prompt_embeds, self.prompt_attention_mask)
        return PixArtTextFeatures(*(tensor.repeat_interleave(times, dim=0) for tensor in both))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PixArtTextFeatures:
        """A copy on another device, its states in another dtype."""
        return PixArtTextFeatures(self.prompt_embeds.to(device, dtype), self.prompt_attention_mask.to(device))


def read_pixart_prompts(
    tokenizer: Any,
    text_encoder: Any,
    prompts: list[str],
    max_sequence_length: int = ALPHA_TOKENS,
    clean_caption: bool = True,
) -> PixArtTextFeatures:
    """Features of B prompts in T5's dtype; equal prompts are read once.

    Longer prompts are cut, with a warning that shows what is lost; one of which cleaning leaves nothing warns, too. An
    empty prompt keeps one token, its end.

    Args:
        tokenizer: T5Tokenizer or T5TokenizerFast.
        text_encoder: T5EncoderModel; it sees the mask, as in training.
        prompts: B strings.
        max_sequence_length: rows L; 120 in PixArt-alpha, 300 in PixArt-Sigma.
        clean_caption: clean each prompt twice, see `clean_caption.clean_caption`; False only lowers its case and strips
            it.

    Raises:
        ValueError: no prompts, or a length below 1.
    """
    expect(len(prompts) > 0, "prompts", "at least one", 0)
    fits = whole(max_sequence_length) and max_sequence_length >= 1
    expect(fits, "max_sequence_length", "a whole number from 1", repr(max_sequence_length))
    clean = _cleaned if clean_caption else _lowered
    cleaned = [clean(prompt) for prompt in prompts]
    for prompt, left in zip(prompts, cleaned, strict=True):
        if prompt.strip() and not left:  # as of Chinese, which cleaning takes for noise
            warnings.warn(
                f"prompt: cleaning leaves nothing of '{prompt:.60}'; clean_caption=False reads it as it is",
                stacklevel=2,
            )
    texts, rows = distinct(cleaned)
    ids, mask = tokenize(tokenizer, texts, max_sequence_length, "text_encoder")
    mask = mask.to(text_encoder.device)
    with torch.no_grad():
        embeds = text_encoder(ids.to(text_encoder.device), attention_mask=mask)[0]
    return PixArtTextFeatures(embeds.to(text_encoder.dtype), mask).select(rows)


def _cleaned(prompt: str) -> str:
    return cleaned_once(cleaned_once(prompt))


def _lowered(prompt: str) -> str:
    return prompt.lower().strip()
