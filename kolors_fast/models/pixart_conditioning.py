"""What PixArt reads of its prompts: keys and values of the captions in every cross-attention, and the embedded sizes.

Pads are dropped rather than masked: a key that counts for nothing takes products as any other, and where no key is left
to be masked, the logits need no bias, which fast attention on GPUs does not add.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._folded_attention import Folded
from .attention import Attention, KeysValues

# logits lowered by this much weigh nothing in any dtype; diffusers lowers those of pads by 10000
DROPPED = -5000.0


class Captions(NamedTuple):
    """States of the tokens that count."""

    states: Tensor  # [B, K, C]
    bias: Tensor | None = None  # [B, K] in at least fp32, added to the logits: -inf for a row's keys beyond its own
    alive: Tensor | None = None  # bool [B]: whether a caption has any token that counts; None: all have


class Prompt:
    """What the transformer reads of its prompts at every step.

    Args:
        text: the projected captions [B, K, cross_attention_dim].
        captions: whose bias and `alive` hold for the text, too.
        sizes: the embedding of resolution and aspect ratio [B, D], of a model that has one.
        dtype: of the samples.
        readers: the cross-attentions for which keys and values are computed now, not at every step.
    """

    def __init__(
        self, text: Tensor, captions: Captions, sizes: Tensor | None, dtype: torch.dtype, readers: Iterable[Attention]
    ) -> None:
        self.text, self.bias, self.sizes, self.dtype = text, captions.bias, sizes, dtype
        alive = captions.alive
        self._alive = None if alive is None else alive[:, None, None, None].to(text.dtype)
        self._kept = {attention: self._read(attention) for attention in readers}

    def of(self, attention: Attention) -> KeysValues | Folded:
        """What one cross-attention reads."""
        kept = self._kept.get(attention)
        return self._keys_values(attention) if kept is None else kept

    def tensors(self) -> list[Tensor | None]:
        """Everything that a step reads."""
        kept = [tensor for read in self._kept.values() for tensor in read]
        return [self.text, self.bias, self.sizes, self._alive, *kept]

    def clone(self) -> Prompt:
        """A copy in memory of its own."""
        copied = copy(self)
        copied.text = self.text.clone()
        copied.bias, copied.sizes, copied._alive = (
            None if tensor is None else tensor.clone() for tensor in (self.bias, self.sizes, self._alive)
        )
        copied._kept = {
            attention: Folded(*(t.clone() for t in read))
            if isinstance(read, Folded)
            else (read[0].clone(), read[1].clone())
            for attention, read in self._kept.items()
        }
        return copied

    def _read(self, attention: Attention) -> KeysValues | Folded:
        found = self._keys_values(attention)
        return attention.fold(found, self.bias) if attention.folds(self.text.shape[1]) else found

    def _keys_values(self, attention: Attention) -> KeysValues:
        k, v = attention.keys_values(self.text)
        return k, v if self._alive is None else v * self._alive.to(v.dtype)  # a branch may be in float16


# ---- masks


def masked(states: Tensor, mask: Tensor) -> Captions:
    """Captions [B, S, C] under a mask [B, S], 1 keep and 0 drop, or a bias [B, 1, S] on the logits.

    A caption without any token that counts keeps all its keys, for a softmax needs some, and gets no values.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    bias = mask.new_zeros(mask.shape, dtype=wide) if mask.dim() == 2 else mask[:, 0].to(wide)
    dropped = mask == 0 if mask.dim() == 2 else bias <= DROPPED
    alive = ~dropped.all(1)
    bias = bias.masked_fill(dropped, float("-inf")).masked_fill(~alive[:, None], 0.0)
    return Captions(states, bias, alive)


def trimmed(captions: Captions) -> Captions:
    """Without the tokens that no caption of the batch needs, and without a bias where no key is left out.

    Asks the device how many tokens count, which waits for it.

    Captions of other lengths stay in one call, under a bias. On a CPU that took less time than a call for each in 13 of
    15 cases (bench/measure_captions.py, one thread of an Intel Xeon, float32): for captions of 1 and 20 tokens and 1024
    patches 9.8 ms against 13.1, and 21.1 untrimmed; for 1 and 60 tokens and 4096 patches 75.7 against 63.5, and 90.2.
    """
    states, bias, alive = captions
    assert bias is not None and alive is not None
    kept = ~bias.isinf() & alive[:, None]
    counts = kept.sum(1)
    biased = (kept & (bias != 0)).any()
    longest, fewest, has_bias = torch.stack([counts.max(), counts.min(), biased.to(counts.dtype)]).tolist()
    first = kept.long().argsort(dim=1, descending=True, stable=True)[:, : max(longest, 1)]
    states = states.gather(1, first[..., None].expand(-1, -1, states.shape[-1]))
    needed = has_bias or fewest < longest
    return Captions(states, bias.gather(1, first) if needed else None, None if fewest else alive)
