"""Trains the tokenizers of CLIP and T5 on captions, in the file formats of the released models.

Both learn words: an English one, or a Chinese one such as a colour, is one token, for the denoiser reads as many tokens
as the longest prompt has. A piece never holds more, so that a colour and shape never seen together are no new text.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kolors_fast.data.shapes import sample_training
from kolors_fast.data.shapes.captions import words
from kolors_fast.models.checkpoint import write_file
from kolors_fast.pipelines.text_encoders import load_tokenizer

from .config import TextTokenizerRecipe
from .tokenizer import TOKENIZER_STREAM

START, END, PAD_OF_BIGG = "<|startoftext|>", "<|endoftext|>", "!"
LAST = "</w>"  # ends the last token of what CLIP takes for a word: letters in a row, thus a whole Chinese phrase
_CLIP_WORD = re.compile(r"[^\W\d_]+|\d|[^\s\w]+")
_HAN = re.compile(r"[\u4e00-\u9fff]+")
_CHINESE = re.compile("|".join(sorted((*words("zh"), "一个", "的", "在", "背景"), key=len, reverse=True)))
_PUNCTUATION = re.compile(r"([，：、,:])")
_RARE = -20.0  # log-probability of a character that no word needs


def train_clip_tokenizer(recipe: TextTokenizerRecipe, seed: int, folder: Path, pad: str = END) -> Any:
    """A byte-level BPE in `folder`: vocab.json and merges.txt, as OpenAI's CLIP has them.

    Args:
        pad: CLIP-L pads with the end token, OpenCLIP bigG with "!", whose id is 0.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in _captions(recipe, seed):
        for word in _CLIP_WORD.findall(text.lower()):
            *inner, last = chinese_words(word) if _HAN.match(word) else [word]
            counts.update(tuple(_bytes(character) for character in part) for part in inner)
            ending = (*map(_bytes, last[:-1]), _bytes(last[-1]) + LAST)
            counts[ending] += 1
    merges = list(_merges_of_bytes({character for word in counts for character in word}))
    merges += _merges_of_characters(counts)
    alphabet = list(_BYTES.values())
    tokens = [*alphabet, *(one + LAST for one in alphabet), *(a + b for a, b in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "vocab.json", json.dumps({token: i for i, token in enumerate(tokens)}).encode())
    lines = "\n".join(("#version: 0.2", *(f"{a} {b}" for a, b in merges), ""))
    write_file(folder / "merges.txt", lines.encode())
    return _complete(folder, "CLIPTokenizer", recipe.length, {"pad_token": pad, "bos_token": START, "eos_token": END})


def train_t5_tokenizer(recipe: TextTokenizerRecipe, seed: int, folder: Path) -> Any:
    """A sentencepiece unigram model in `folder`: words, with the logarithm of their share of the captions.

    Raises:
        ImportError: protobuf, in whose format the model is, is not installed.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ImportError("T5's tokenizer needs protobuf: pip install 'kolors-fast[text]'") from error
    format: Any = sentencepiece_model_pb2  # whose classes are made when it is imported
    counts: Counter[str] = Counter()
    for text in _captions(recipe, seed):
        for chunk in text.split():
            first, *others = t5_words(chunk)
            counts.update(["▁" + first, *others])
    total = sum(counts.values())
    scores = {word: math.log(count / total) for word, count in counts.most_common()}
    rare = ["▁", *sorted(set("".join(counts)) | set("abcdefghijklmnopqrstuvwxyz"))]
    scores |= {character: _RARE for character in rare if character not in scores}
    model = format.ModelProto()
    kinds = format.ModelProto.SentencePiece
    for piece, kind in (("<pad>", kinds.CONTROL), ("</s>", kinds.CONTROL), ("<unk>", kinds.UNKNOWN)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for piece, score in scores.items():
        model.pieces.add(piece=piece, score=score, type=kinds.NORMAL)
    model.trainer_spec.model_type = format.TrainerSpec.UNIGRAM
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = 0, 1, 2
    model.trainer_spec.bos_id = -1
    model.normalizer_spec.name = "identity"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "spiece.model", model.SerializeToString())
    return _complete(folder, "T5Tokenizer", recipe.length, {"extra_ids": 0})


def chinese_words(phrase: str) -> list[str]:
    """Chinese letters in a row, cut at the words by which captions name things."""
    cuts = sorted({0, len(phrase), *itertools.chain(*(found.span() for found in _CHINESE.finditer(phrase)))})
    return [phrase[a:b] for a, b in itertools.pairwise(cuts)]


def t5_words(chunk: str) -> list[str]:
    """Text without spaces as words and punctuation marks."""
    parts = (part for part in _PUNCTUATION.split(chunk) if part)
    return [word for part in parts for word in (chinese_words(part) if _HAN.match(part) else [part])]


def _captions(recipe: TextTokenizerRecipe, seed: int) -> Iterator[str]:
    rng = np.random.default_rng([seed, TOKENIZER_STREAM])
    return (sample_training(rng)[1] for _ in range(recipe.captions))


def _byte_letters() -> dict[int, str]:
    """A printable letter for every byte, as in GPT-2: its own where it has one."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_BYTES = _byte_letters()


def _bytes(character: str) -> str:
    return "".join(_BYTES[byte] for byte in character.encode())


def _merges_of_bytes(characters: set[str]) -> Iterator[tuple[str, str]]:
    """What joins the bytes of each character, from the left; a character that ends a word bears LAST."""
    seen = set()
    for character in sorted(characters):
        letters = list(character.removesuffix(LAST))
        letters[-1] += character[len(character.removesuffix(LAST)) :]
        for i in range(1, len(letters)):
            pair = "".join(letters[:i]), letters[i]
            if pair not in seen:
                seen.add(pair)
                yield pair


def _merges_of_characters(counts: Counter[tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """Byte pair encoding (Sennrich et al. 2016) until every word is one token: the most frequent pair first."""
    found = {word: list(word) for word in counts}
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in found.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            return
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        yield best
        for symbols in found.values():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1


def _complete(folder: Path, kind: str, length: int, settings: dict[str, Any]) -> Any:
    """The tokenizer that transformers reads from the folder, which also gets the file that it reads fastest."""
    settings = {"tokenizer_class": kind, "model_max_length": length, **settings}
    write_file(folder / "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode())
    tokenizer = load_tokenizer(folder.parent, folder.name, kind)
    tokenizer.save_pretrained(folder)
    return tokenizer
