"""Captions as the UNet reads them, encoded once and kept end to end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.models.chatglm_tokenizer import ChatGLMTokenizer

from .devices import sent, sent_to

MAX_TOKENS = 256  # of a prompt, as in Kolors
STORED_TOKENS = 64  # longest caption that is kept; the longest of the shapes world has about 45
ABSENT = -1  # fills ids [M, L] on the right
_AT_ONCE = 256


@dataclass(frozen=True)
class EncodedCaptions:
    """M captions. `states[starts[i] : starts[i + 1]]` are the states of the pad and of the tokens of caption i."""

    states: Tensor  # [total, D] fp16
    starts: Tensor  # [M + 1] int64
    pooled: Tensor  # [M, D] fp16

    def __len__(self) -> int:
        return len(self.pooled)

    def gather(self, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Captions `which` [B] in the form of `ChatGLM.text_features_collapsed`.

        Returns:
            embeds [B, N + 1, D] fp32, key_bias [B, N + 1] fp32 and pooled [B, D] fp32, N the longest's tokens.
        """
        start = self.starts[which]
        length = self.starts[which + 1] - start  # with the pad
        rank = torch.arange(int(length.max()))
        present = rank < length[:, None]
        embeds = self.states[torch.where(present, start[:, None] + rank, 0)].float()
        key_bias = torch.where(present, 0.0, float("-inf"))
        key_bias[:, 0] = (MAX_TOKENS + 1 - length).float().log()
        return embeds.masked_fill(~present[..., None], 0.0), key_bias, self.pooled[which].float()


def encode_texts(text_encoder: ChatGLM, tokenizer: ChatGLMTokenizer, texts: list[str]) -> EncodedCaptions:
    """Encode captions of at most STORED_TOKENS tokens."""
    return encode_captions(text_encoder, torch.stack([_stored(tokenizer.encode(text)) for text in texts]))


@torch.no_grad()
def encode_captions(text_encoder: ChatGLM, captions: Tensor) -> EncodedCaptions:
    """Encode token ids [M, L], each row padded on the right with ABSENT; in full precision, as at inference."""
    lengths = (captions != ABSENT).sum(1)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (lengths + 1).cumsum(0)])
    width = text_encoder.config.hidden_size
    states = torch.empty(int(starts[-1]), width, dtype=torch.float16)
    pooled = torch.empty(len(captions), width, dtype=torch.float16)
    for some in lengths.argsort().split(_AT_ONCE):  # of about equal length
        with torch.autocast(text_encoder.device.type, enabled=False):
            ids, mask = sent_to(text_encoder, *pad_left(captions[some]))
            embeds, _, last = sent(text_encoder.text_features_collapsed(ids, mask), torch.device("cpu"))
        present = torch.arange(embeds.shape[1]) <= lengths[some][:, None]
        states[(starts[some][:, None] + torch.arange(embeds.shape[1]))[present]] = embeds[present].half()
        pooled[some] = last.half()
    return EncodedCaptions(states, starts, pooled)


def pad_left(captions: Tensor, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Captions [B, L] padded on the right with ABSENT -> ids and mask [B, 256], padded on the left."""
    ids = torch.full((len(captions), MAX_TOKENS), pad_id)
    mask = torch.zeros_like(ids)
    for row, real, caption_ids in zip(ids, mask, captions, strict=True):
        count = int((caption_ids != ABSENT).sum())
        row[MAX_TOKENS - count :] = caption_ids[:count].long()
        real[MAX_TOKENS - count :] = 1
    return ids, mask


def _stored(ids: list[int]) -> Tensor:
    if len(ids) > STORED_TOKENS:
        raise ValueError(f"captions: expected at most {STORED_TOKENS} tokens, got {len(ids)}")
    return torch.tensor(ids + [ABSENT] * (STORED_TOKENS - len(ids)), dtype=torch.int32)
