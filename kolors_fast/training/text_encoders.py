"""Trains small text encoders of CLIP's and T5's architecture, as transformers' classes, on captions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_fast.data.shapes import caption, sample_training
from kolors_fast.data.shapes.scene import REQUEST_PARTS, Request, request_parts
from kolors_fast.data.shapes.split import CATEGORIES
from kolors_fast.pipelines.text_encoders import tokenize

from .config import TextEncoderStage
from .devices import sent_to
from .initial import scale_clip
from .monitor import validation_prompts
from .objectives import next_token_loss
from .streams import Streams


def make_clip(tokenizer: Any, config: Mapping[str, Any]) -> Any:
    """A CLIPTextModelWithProjection with fresh weights, for a tokenizer's vocabulary and length."""
    transformers = import_transformers()
    settings = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**settings, **config))


def make_t5(tokenizer: Any, config: Mapping[str, Any]) -> Any:
    """A T5EncoderModel with fresh weights, of version 1.1 (gated GELU)."""
    transformers = import_transformers()
    settings = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "dropout_rate": 0.0}
    version = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "is_encoder_decoder": False}
    model = transformers.T5EncoderModel(transformers.T5Config(**settings, **version, use_cache=False, **config))
    _look_both_ways(model)
    return model


@torch.no_grad()
def _look_both_ways(model: Any) -> None:
    """Let T5's heads in turn see what comes before a token and what follows, every second pair mostly what is near.

    The order of tokens is all that T5 knows of places. Where it must find out by itself that heads can look to one
    side, two objects were not told apart within 900 steps.
    """
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]
    half, heads = len(bias) // 2, bias.shape[1]  # at a distance of 0, 1, ... before; behind it, after
    for head in range(heads):
        seen = -0.7 * torch.arange(half) if head % 4 > 1 else torch.zeros(half)
        unseen = torch.full((half,), -4.0)
        bias[:, head] = torch.cat([seen, unseen] if head % 2 == 0 else [unseen, seen])


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "the text encoders of this system need transformers: pip install 'kolors-fast[text]'"
        ) from error
    return transformers


class Reader(nn.Module):
    """A text encoder, with one linear layer that names tokens, and one that reads a request off the pooled state."""

    def __init__(self, model: Any, width: int, pooled: int) -> None:
        super().__init__()
        self.model = model
        self.names = nn.Linear(width, model.config.vocab_size, bias=False)
        self.parts = nn.Linear(pooled, sum(map(len, REQUEST_PARTS)), bias=False)
        for layer in (self.names, self.parts):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ids [B, S], of which mask [B, S] hides some -> logits of tokens [B, S, V], and [B, n] for each part."""
        states, pooled = self.states(ids, mask)
        return self.names(states), self.parts(pooled).split([len(part) for part in REQUEST_PARTS], dim=1)

    def states(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, S, D] and pooled [B, P]."""
        raise NotImplementedError


class ClipReader(Reader):
    """Pooled is the projection of the end token's state; being causal, CLIP sees no pad before it."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.config.hidden_size, model.config.projection_dim)

    def states(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        output = self.model(ids)
        return output.last_hidden_state, output.text_embeds


class T5Reader(Reader):
    """Pooled is the end token's state. Off the mean state, two objects were not told apart within 900 steps."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.config.d_model, model.config.d_model)

    def states(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        states = self.model(ids, attention_mask=mask).last_hidden_state
        ends = (ids == self.model.config.eos_token_id).int().argmax(1)  # one in each row
        return states, states[torch.arange(len(ids), device=ids.device), ends]


class TextEncoderObjective:
    """What CLIP and T5 share: captions, what they ask for, and how many held-out ones are read right."""

    module: Reader

    def __init__(self, tokenizer: Any, stage: TextEncoderStage, streams: Streams) -> None:
        self.tokenizer, self.stage, self.streams = tokenizer, stage, streams

    def captions(self, step: int) -> list[tuple[str, Request]]:
        """The step's captions, and what each asserts."""
        rng = self.streams.numpy(step)
        drawn = [caption(sample_training(rng)[0], rng) for _ in range(self.stage.batch)]
        return drawn[self.streams.share(len(drawn))]

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """ids and mask [B, S], padded as the denoiser's are."""
        return tokenize(self.tokenizer, texts, self.tokenizer.model_max_length, self.stage.component)

    def hidden(self, ids: Tensor, step: int) -> Tensor:
        """Which words [B, S] of every second caption are hidden from the encoder.

        Where a colour must be read without its shape, and a shape without its colour, pairs that no caption has are
        read right as well.
        """
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        whole = torch.rand(self.stage.batch, ids.shape[1], generator=self.streams.torch(step)) < self.stage.masked
        whole[::2] = False
        return whole[self.streams.share(len(whole))] & ~special

    def reading_loss(self, of_parts: tuple[Tensor, ...], requests: list[Request]) -> Tensor:
        (parts,) = sent_to(self.module, torch.tensor([request_parts(request) for request in requests]))
        losses = [F.cross_entropy(one.float(), parts[:, k]) for k, one in enumerate(of_parts)]
        return self.stage.reading_weight * torch.stack(losses).sum()

    def finish(self, model: Any) -> None:
        """What the trained encoder still needs before the denoiser reads it."""

    @torch.no_grad()
    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """How many held-out captions are read right, and the size of what the denoiser reads."""
        assert isinstance(averaged, Reader)
        prompts = validation_prompts(200)
        ids, mask = sent_to(averaged, *self.tokens([one.prompt for one in prompts]))
        asked = torch.tensor([request_parts(one.request) for one in prompts], device=ids.device)
        figures = {}
        for name, seen in (("", None), (" behind a mask", mask)):
            read = torch.stack([one.argmax(1) for one in averaged(ids, seen)[1]], dim=1)
            right = (read == asked).all(1).tolist()
            for category in CATEGORIES:
                chosen = [ok for ok, one in zip(right, prompts, strict=True) if one.category == category]
                figures[f"{category} read right{name}"] = float(np.mean(chosen))
            if isinstance(averaged, ClipReader):
                break  # which has no mask
        states = averaged.model(ids, output_hidden_states=True)
        seen_states = states.hidden_states[-2] if isinstance(averaged, ClipReader) else states.last_hidden_state
        return figures | {"rms of states": float(seen_states.square().mean().sqrt())}


class ClipObjective(TextEncoderObjective):
    """Cross-entropy of the next token, the end's included, and of what the caption asks for."""

    def __init__(self, model: Any, tokenizer: Any, stage: TextEncoderStage, streams: Streams) -> None:
        super().__init__(tokenizer, stage, streams)
        self.module = ClipReader(model)

    def loss(self, step: int) -> Tensor:
        captions = self.captions(step)
        ids, mask = self.tokens([text for text, _ in captions])
        seen = ids.masked_fill(self.hidden(ids, step), 0)  # "!", of which captions have none
        ids, mask, seen = sent_to(self.module, ids, mask, seen)
        logits, of_parts = self.module(seen)
        following = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        return next_token_loss(logits[:, :-1], following) + self.reading_loss(of_parts, [r for _, r in captions])

    @torch.no_grad()
    def finish(self, model: Any) -> None:
        """Let states and pooled states have a root mean square of one, beside those of other encoders: weight decay
        lets them shrink."""
        ids, _ = self.tokens([text for text, _ in self.captions(0)])
        output = model(ids.to(model.device), output_hidden_states=True)
        sizes = (states.square().mean().rsqrt() for states in (output.hidden_states[-2], output.text_embeds))
        scale_clip(model, *map(float, sizes))


class T5Objective(TextEncoderObjective):
    """Cross-entropy of hidden tokens, and of what the caption asks for.

    The pads of every second batch are hidden behind an attention mask, as PixArt does; SD3 lets T5 read them.
    """

    def __init__(self, model: Any, tokenizer: Any, stage: TextEncoderStage, streams: Streams) -> None:
        super().__init__(tokenizer, stage, streams)
        self.module = T5Reader(model)

    def loss(self, step: int) -> Tensor:
        captions = self.captions(step)
        ids, mask = self.tokens([text for text, _ in captions])
        ids, mask, hidden = sent_to(self.module, ids, mask, self.hidden(ids, step))
        logits, of_parts = self.module(ids.masked_fill(hidden, self.tokenizer.unk_token_id), mask if step % 2 else None)
        hidden_ids = ids.masked_fill(~hidden, -100).flatten()
        guessing = F.cross_entropy(logits.float().flatten(0, 1), hidden_ids, reduction="sum")
        guessing = guessing / hidden.sum().clamp(min=1)
        return guessing + self.reading_loss(of_parts, [r for _, r in captions])
