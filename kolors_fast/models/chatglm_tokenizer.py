"""ChatGLM3's tokenizer on sentencepiece alone; transformers is not needed.

Source: THUDM/ChatGLM3 and Kwai-Kolors/Kolors `kolors/models/tokenization_chatglm.py`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from .checkpoint import CheckpointError, model_folder, read_json, write_file

MODEL_NAME = "tokenizer.model"
CONFIG_NAME = "tokenizer_config.json"
# appended in this order after the sentencepiece vocabulary
SPECIAL_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)


class TokenBatch(dict[str, Tensor]):
    """`input_ids`, `attention_mask` and `position_ids`, [B, S] int64 each, as items and as attributes."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the token batch has no '{name}'") from None

    def to(self, device: torch.device | str) -> TokenBatch:
        """A copy on another device."""
        return TokenBatch({name: value.to(device) for name, value in self.items()})


class ChatGLMTokenizer:
    """Text to `[gMASK] sop pieces...`, padded on the left.

    Args:
        vocab_file: the sentencepiece model. The nine special tokens follow its ids, so that any size works.
        **config: values of tokenizer_config.json, kept for `save_pretrained`.
    """

    padding_side = "left"
    model_input_names = ("input_ids", "attention_mask", "position_ids")

    def __init__(self, vocab_file: str | os.PathLike[str], **config: Any) -> None:
        path = Path(vocab_file)
        if not path.is_file():
            raise CheckpointError(f"the file {path} is missing")
        try:
            self.pieces = SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise CheckpointError(f"{path} is truncated or not a sentencepiece model: {error}") from error
        self.config = config
        first = self.pieces.vocab_size()
        self.special_ids = {name: first + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._special_names = {index: name for name, index in self.special_ids.items()}
        self.pad_token_id: int = self.pieces.unk_id()  # `<unk>` is the pad, id 0 in the released model
        self.bos_token_id: int = self.pieces.bos_id()
        self.eos_token_id: int = self.pieces.eos_id()

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike[str], *, subfolder: str | None = None) -> ChatGLMTokenizer:
        """Load `tokenizer.model`, and tokenizer_config.json where there is one, from a folder or a hub id."""
        folder = model_folder(path_or_id, subfolder, [MODEL_NAME, CONFIG_NAME])
        config = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).exists() else {}
        named = config.get("tokenizer_class", cls.__name__)
        if named != cls.__name__:
            raise CheckpointError(f"{folder / CONFIG_NAME} describes a {named}, expected a {cls.__name__}")
        return cls(folder / MODEL_NAME, **config)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.model` and tokenizer_config.json, each beside and renamed."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        fixed = {"tokenizer_class": type(self).__name__, "padding_side": self.padding_side}
        defaults = {"do_lower_case": False, "remove_space": False, "clean_up_tokenization_spaces": False}
        config = json.dumps({**defaults, **self.config, **fixed}, indent=2, sort_keys=True, ensure_ascii=False)
        write_file(target / MODEL_NAME, self.pieces.serialized_model_proto())
        write_file(target / CONFIG_NAME, f"{config}\n".encode())

    @property
    def vocab_size(self) -> int:
        """Sentencepiece pieces plus special tokens; the model's padded_vocab_size must not be smaller."""
        return self.pieces.vocab_size() + len(SPECIAL_TOKENS)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def prefix(self) -> list[int]:
        """The ids before every text: [gMASK], sop."""
        return [self.special_ids["[gMASK]"], self.special_ids["sop"]]

    def encode(self, text: str) -> list[int]:
        """The prefix and the ids of a text; names of special tokens inside the text are plain text."""
        return self.prefix + self.pieces.encode(text)

    def decode(self, ids: Iterable[int] | Tensor, *, skip_special_tokens: bool = False) -> str:
        """Text of ids [S]; pads, bos and eos vanish, special tokens appear by name unless skipped."""
        silent = {self.pad_token_id, self.bos_token_id, self.eos_token_id}
        kept = [i for i in (int(i) for i in ids) if i not in silent]
        if skip_special_tokens:
            return self.pieces.decode([i for i in kept if i < self.pieces.vocab_size()])
        names = [self._special_names.get(i) or self.pieces.id_to_piece(i) for i in kept]
        return self.pieces.decode_pieces(names)

    def __call__(
        self,
        text: str | list[str],
        *,
        padding: bool | str = "max_length",
        max_length: int = 256,
        truncation: bool = True,
        return_tensors: str = "pt",
    ) -> TokenBatch:
        """Token ids, mask and positions of one text or several, [B, S] int64.

        Args:
            padding: "max_length", or True or "longest" for the longest text, or False (all of one length).
            max_length: most tokens per text, the two of the prefix included.
            truncation: cut longer texts on the right, with a warning that shows what is lost; False refuses them.
            return_tensors: only "pt".

        Returns:
            input_ids; attention_mask, 0 on pads; position_ids, 0 on pads and 0, 1, ... on the tokens.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"text must be a string or a non-empty list of strings, got {text!r}")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        if padding not in ("max_length", "longest", True, False):
            raise ValueError(f"padding must be 'max_length', 'longest', True or False, got {padding!r}")
        if max_length < len(self.prefix):
            raise ValueError(f"max_length must be at least {len(self.prefix)} (the prefix), got {max_length}")
        rows = []
        for t in texts:  # no comprehension: before Python 3.12 its frame would shift the warning's location
            rows.append(self._fit(t, max_length, truncation))
        width = max_length if padding == "max_length" else max(map(len, rows))
        if padding is False and min(map(len, rows)) != width:
            raise ValueError("padding=False needs texts of one length in tokens, got several lengths")
        return self._pad(rows, width)

    def _fit(self, text: str, max_length: int, truncation: bool) -> list[int]:
        ids = self.encode(text)
        if len(ids) <= max_length:
            return ids
        found = f"the text has {len(ids)} tokens, but the limit is {max_length}"
        if not truncation:
            raise ValueError(f"{found} and truncation is off")
        lost = self.pieces.decode(ids[max_length:])
        warnings.warn(f"{found}; lost at its end: '{lost}'", stacklevel=3)
        return ids[:max_length]

    def _pad(self, rows: list[list[int]], width: int) -> TokenBatch:
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            start = width - len(row)
            ids[i, start:] = torch.tensor(row)
            mask[i, start:] = 1
            positions[i, start:] = torch.arange(len(row))
        return TokenBatch(input_ids=ids, attention_mask=mask, position_ids=positions)
