"""Tiny CLIP and T5 checkpoints with tokenizers, written from nothing in the layout of the released folders.

transformers writes the weights; the tokenizers are plain files, as their own formats have them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

SENTENCES = [
    "a photo of a cat, high quality",
    "two red circles on a blue background",
    "a green square to the left of a yellow star",
    "the quick brown fox jumps over the lazy dog, 1234567890",
    "PixArt draws https://example.com/pictures.png - and (brackets)!",
]
CLIP_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_L = {"hidden_size": 8, "projection_dim": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP_G = {"hidden_size": 16, "projection_dim": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
T5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 48}
POOLED_DIM, JOINT_DIM = 8 + 16, 32  # of a denoiser that reads them


def write_sd3_text(folder: Path) -> Path:
    """text_encoder, text_encoder_2, text_encoder_3 and their tokenizers, of POOLED_DIM and JOINT_DIM features."""
    torch.manual_seed(0)
    size = write_clip_tokenizer(folder / "tokenizer", pad=END)
    write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    write_clip(folder / "text_encoder", size, CLIP_L, hidden_act="quick_gelu", eos_token_id=2)  # an older config's id
    write_clip(folder / "text_encoder_2", size, CLIP_G, hidden_act="gelu", eos_token_id=size - 1)
    write_t5(folder / "text_encoder_3", write_t5_tokenizer(folder / "tokenizer_3"))
    return folder


def write_pixart_text(folder: Path) -> Path:
    """text_encoder (T5 of JOINT_DIM features) and its tokenizer."""
    torch.manual_seed(0)
    write_t5(folder / "text_encoder", write_t5_tokenizer(folder / "tokenizer"))
    return folder


def write_clip_tokenizer(folder: Path, pad: str) -> int:
    """vocab.json and merges.txt; returns the number of tokens, of which the end is the last, as in CLIP."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)]  # "!" is the first, as in CLIP
    merges = [("t", "h"), ("th", "e</w>"), ("o", "n</w>"), ("e", "d</w>"), ("r", "ed</w>"), ("c", "a"), ("ca", "t</w>")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    write_json(folder / "vocab.json", {token: place for place, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_TOKENS, "do_lower_case": True, **special}
    write_json(folder / "tokenizer_config.json", config)
    return len(tokens)


def write_t5_tokenizer(folder: Path) -> int:
    """spiece.model alone, as in PixArt's release; returns the number of tokens with T5's 100 extra ones."""
    folder.mkdir(parents=True)
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 10),
        model_prefix=str(folder / "spiece"),
        vocab_size=90,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 100, **special}
    write_json(folder / "tokenizer_config.json", config)
    return SentencePieceProcessor(str(folder / "spiece.model")).vocab_size() + 100


def write_clip(folder: Path, vocab_size: int, sizes: dict[str, int], **config: Any) -> None:
    ids = {"bos_token_id": vocab_size - 2, "pad_token_id": 1}
    ff = {"intermediate_size": 2 * sizes["hidden_size"], "max_position_embeddings": CLIP_TOKENS}
    model = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=vocab_size, **sizes, **ff, **ids, **config))
    save(model, folder)


def write_t5(folder: Path, vocab_size: int) -> None:
    config = T5Config(vocab_size=vocab_size, **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    save(T5EncoderModel(config), folder)


def save(model: Any, folder: Path) -> None:
    """With weights large enough that every token and layer shows in the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    model.save_pretrained(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
