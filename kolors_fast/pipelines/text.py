"""Prompts to the text features that Kolors' UNet reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.chatglm import ChatGLM
from ..models.chatglm_tokenizer import ChatGLMTokenizer


@dataclass(frozen=True)
class TextFeatures:
    """Features of B prompts, in one of two exactly equivalent forms.

    Full: `embeds` has the S states that the model was trained with, pads on the left, and `key_bias` is None.
    Collapsed: the pads of a prompt, which are all equal, stand as one key whose logit is raised by ln(their number).
    """

    embeds: Tensor  # [B, K, D]
    pooled: Tensor  # [B, D]
    key_bias: Tensor | None = None  # fp32 [B, K]

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def select(self, rows: Tensor | slice) -> TextFeatures:
        """The features of some of the prompts, in any order and number; rows is int64 [M] or a slice."""
        bias = None if self.key_bias is None else self.key_bias[rows]
        return TextFeatures(self.embeds[rows], self.pooled[rows], bias)

    def expanded(self, length: int) -> TextFeatures:
        """The full form, of `length` states."""
        if self.key_bias is None:
            return self
        # real tokens have bias 0, the pad ln(length - n), fillers on the right -inf
        real = (self.key_bias[:, 1:] == 0).sum(1, keepdim=True)  # n, [B, 1]
        column = torch.arange(length, device=real.device) - (length - real) + 1  # 1.. at the real tokens
        source = column.clamp(min=0)[..., None].expand(-1, -1, self.embeds.shape[-1])
        return TextFeatures(self.embeds.gather(1, source), self.pooled)

    def to(self, device: torch.device | str | None) -> TextFeatures:
        """A copy on another device."""
        bias = None if self.key_bias is None else self.key_bias.to(device)
        return TextFeatures(self.embeds.to(device), self.pooled.to(device), bias)

    def zeroed(self) -> TextFeatures:
        """Zeros in the same form; a key bias would make no difference among equal keys."""
        bias = None if self.key_bias is None else torch.zeros_like(self.key_bias)
        return TextFeatures(torch.zeros_like(self.embeds), torch.zeros_like(self.pooled), bias)


Text = str | list[str] | TextFeatures


@torch.no_grad()
def read_prompts(
    tokenizer: ChatGLMTokenizer, text_encoder: ChatGLM, prompts: list[str], max_length: int
) -> TextFeatures:
    """Collapsed features of the prompts, all of one width; equal prompts are read once.

    Prompts longer than `max_length` tokens are cut, with a warning by the tokenizer.
    """
    distinct = list(dict.fromkeys(prompts))
    tokens = tokenizer(distinct, padding="max_length", max_length=max_length, truncation=True)
    tokens = tokens.to(text_encoder.device)
    embeds, key_bias, pooled = text_encoder.text_features_collapsed(**tokens)
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=embeds.device)
    return TextFeatures(embeds, pooled, key_bias).select(rows)


def read_guided(
    tokenizer: ChatGLMTokenizer,
    text_encoder: ChatGLM,
    prompt: Text,
    negative: Text | None,
    max_length: int,
    *,
    zeros: bool,
) -> tuple[TextFeatures, TextFeatures | None]:
    """Features of B prompts and of their negatives, in the same form: collapsed where all were read here.

    Args:
        prompt: text, or full features as given by the user.
        negative: the same, one text for all prompts or one for each; None reads no negatives.
        max_length: tokens of the full form.
        zeros: zeros in the place of the negatives' features.
    """
    given = prompt if isinstance(prompt, TextFeatures) else None
    given_negative = negative if isinstance(negative, TextFeatures) else None
    texts = _listed(prompt)
    count = len(texts) if given is None else len(given)
    negatives = [] if zeros else _listed(negative)
    negatives = negatives * count if len(negatives) == 1 else negatives
    if given_negative is not None and len(given_negative) != count:
        raise ValueError(f"negative_prompt_embeds: expected one for each of {count} prompts, got {len(given_negative)}")
    if negatives and len(negatives) != count:
        raise ValueError(f"negative_prompt: expected one string or {count}, got {len(negatives)}")

    read = None
    if negatives or texts:
        read = read_prompts(tokenizer, text_encoder, negatives + texts, max_length)
        if given is not None or given_negative is not None:
            read = read.expanded(max_length)
            for name, other in (("prompt_embeds", given), ("negative_prompt_embeds", given_negative)):
                if other is not None and other.embeds.shape[1:] != read.embeds.shape[1:]:
                    expected, got = list(read.embeds.shape[1:]), list(other.embeds.shape[1:])
                    raise ValueError(f"{name}: expected {expected} tokens and features per prompt, got {got}")
    positive = given if read is None or given is not None else read.select(slice(len(negatives), None))
    assert positive is not None
    if zeros:
        return positive, positive.zeroed()
    if negatives and read is not None:
        return positive, read.select(slice(len(negatives)))
    return positive, given_negative


def _listed(value: Text | None) -> list[str]:
    if isinstance(value, str):
        return [value]
    return value if isinstance(value, list) else []
