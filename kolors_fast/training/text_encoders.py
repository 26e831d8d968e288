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
    return transformers.T5EncoderModel(transformers.T5Config(**settings, **version, use_cache=False, **config))


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "the text encoders of this system need transformers: pip install 'kolors-fast[text]'"
        ) from error
    return transformers


class ClipReader(nn.Module):
    """CLIP, with one linear layer that names the next token, and one that reads a request off the pooled state."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.names = _linear(model.config.hidden_size, model.config.vocab_size)
        self.parts = _linear(model.config.projection_dim, sum(map(len, REQUEST_PARTS)))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ids [B, S] -> next-token logits [B, S, V], and [B, n] for each part of the request."""
        output = self.model(ids)  # causal: pads follow all that is read
        parts = self.parts(output.text_embeds).split([len(part) for part in REQUEST_PARTS], dim=1)
        return self.names(output.last_hidden_state), parts


class T5Reader(nn.Module):
    """T5, with one linear layer that names a token, and for each part of a request a query and a linear layer.

    A part is read off the states' mean weighted by the softmax of their products with its query: a state must tell
    what it is about and for which object, which is what attention will look for. Off the plain mean, T5 did not learn
    to read two objects within 900 steps.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, width = model, model.config.d_model
        self.names = _linear(width, model.config.vocab_size)
        self.queries = _linear(width, len(REQUEST_PARTS))
        self.parts = nn.ModuleList(_linear(width, len(part)) for part in REQUEST_PARTS)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ids [B, S], of which mask [B, S] hides some -> logits of all tokens [B, S, V], and [B, n] for each part."""
        states = self.model(ids, attention_mask=mask).last_hidden_state  # [B, S, D]
        pads = (ids == self.model.config.pad_token_id)[..., None]
        weights = self.queries(states).masked_fill(pads, float("-inf")).softmax(1)  # [B, S, P]
        means = weights.transpose(1, 2) @ states  # [B, P, D]
        return self.names(states), tuple(part(means[:, k]) for k, part in enumerate(self.parts))


def _linear(width: int, count: int) -> nn.Linear:
    """Without bias, of nearly equal answers."""
    layer = nn.Linear(width, count, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


class TextEncoderObjective:
    """What CLIP and T5 share: captions, what they ask for, and how many held-out ones are read right."""

    module: ClipReader | T5Reader

    def __init__(self, tokenizer: Any, stage: TextEncoderStage, streams: Streams) -> None:
        self.tokenizer, self.stage, self.streams = tokenizer, stage, streams

    def captions(self, step: int) -> list[tuple[str, Request]]:
        """The step's captions, and what each asserts."""
        rng = self.streams.numpy(step)
        return [caption(sample_training(rng)[0], rng) for _ in range(self.stage.batch)]

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """ids and mask [B, S], padded as the denoiser's are."""
        return tokenize(self.tokenizer, texts, self.tokenizer.model_max_length, self.stage.component)

    def reading_loss(self, of_parts: tuple[Tensor, ...], requests: list[Request]) -> Tensor:
        parts = torch.tensor([request_parts(request) for request in requests])
        losses = [F.cross_entropy(one.float(), parts[:, k]) for k, one in enumerate(of_parts)]
        return self.stage.reading_weight * torch.stack(losses).sum()

    @torch.no_grad()
    def monitor(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """How many held-out captions are read right, and the size of what the denoiser reads."""
        assert isinstance(averaged, ClipReader | T5Reader)
        prompts = validation_prompts(200)
        ids, mask = self.tokens([one.prompt for one in prompts])
        figures = {}
        for name, seen in (("", None), (" behind a mask", mask)):
            read = torch.stack([one.argmax(1) for one in averaged(ids, seen)[1]], dim=1)
            right = (read == torch.tensor([request_parts(one.request) for one in prompts])).all(1).tolist()
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
        logits, of_parts = self.module(ids)
        following = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        return next_token_loss(logits[:, :-1], following) + self.reading_loss(of_parts, [r for _, r in captions])


class T5Objective(TextEncoderObjective):
    """Cross-entropy of masked tokens, for which `<unk>` stands, and of what the whole caption asks for.

    The pads of every second batch are hidden behind an attention mask, as PixArt does; SD3 lets T5 read them.
    """

    def __init__(self, model: Any, tokenizer: Any, stage: TextEncoderStage, streams: Streams) -> None:
        super().__init__(tokenizer, stage, streams)
        self.module = T5Reader(model)

    def loss(self, step: int) -> Tensor:
        captions = self.captions(step)
        ids, mask = self.tokens([text for text, _ in captions])
        drawn = torch.rand(ids.shape, generator=self.streams.torch(step))
        hidden = (drawn < self.stage.masked) & (mask == 1)
        seen = mask if step % 2 else None
        guesses, _ = self.module(ids.masked_fill(hidden, self.tokenizer.unk_token_id), seen)
        _, of_parts = self.module(ids, seen)
        targets = ids.masked_fill(~hidden, -100)
        return next_token_loss(guesses, targets) + self.reading_loss(of_parts, [r for _, r in captions])
