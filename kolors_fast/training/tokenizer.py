"""Trains the tokenizer's sentencepiece model on captions."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import sentencepiece

from kolors_fast.data.shapes import sample_training
from kolors_fast.models.chatglm_tokenizer import ChatGLMTokenizer
from kolors_fast.models.checkpoint import write_file

from .config import TokenizerRecipe

# of the stages' random streams, so that no two draw alike
TOKENIZER_STREAM = 1000
_HAN = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")


def train_tokenizer(recipe: TokenizerRecipe, seed: int, folder: Path) -> ChatGLMTokenizer:
    """A BPE model of at most `recipe.pieces` pieces in `folder`; bytes stand for characters it has not seen.

    English becomes words, Chinese characters: pieces that hold a whole Chinese phrase would make a colour and shape
    never seen together a different kind of text.
    """
    rng = np.random.default_rng([seed, TOKENIZER_STREAM])
    captions = (_HAN.sub(r" \g<0> ", sample_training(rng)[1]) for _ in range(recipe.captions))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=captions,
        model_writer=model,
        vocab_size=recipe.pieces,
        model_type="bpe",
        normalization_rule_name="identity",
        character_coverage=1.0,
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "tokenizer.model", model.getvalue())
    tokenizer = ChatGLMTokenizer(folder / "tokenizer.model")
    tokenizer.save_pretrained(folder)
    return tokenizer
