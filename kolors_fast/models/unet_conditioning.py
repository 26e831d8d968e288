"""What Kolors' UNet reads of its prompts: the projected text, its keys and values in every cross-attention, and the
embedding of pooled text and sizes."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._folded_attention import Folded
from .attention import Attention, KeysValues


class Prompt:
    """What the UNet reads of its prompts at every step.

    Args:
        text: [B, S, cross_attention_dim].
        bias: [B, S], added to the logits of cross-attention.
        added: [B, time_dim], of pooled text and sizes.
        readers: the cross-attentions for which keys and values are computed now, not at every step.
    """

    def __init__(self, text: Tensor, bias: Tensor | None, added: Tensor, readers: Iterable[Attention]) -> None:
        self.text, self.bias, self.added = text, bias, added
        self._kept = {attention: self._read(attention) for attention in readers}

    def of(self, attention: Attention) -> KeysValues | Folded:
        """What one cross-attention reads."""
        kept = self._kept.get(attention)
        return attention.keys_values(self.text) if kept is None else kept

    def tensors(self) -> list[Tensor | None]:
        """Everything that a step reads."""
        kept = [tensor for read in self._kept.values() for tensor in read]
        return [self.text, self.bias, *kept]

    def clone(self) -> Prompt:
        """A copy in memory of its own."""
        copied = copy(self)
        copied.text, copied.bias = self.text.clone(), None if self.bias is None else self.bias.clone()
        copied._kept = {
            attention: Folded(*(t.clone() for t in read))
            if isinstance(read, Folded)
            else (read[0].clone(), read[1].clone())
            for attention, read in self._kept.items()
        }
        return copied

    def _read(self, attention: Attention) -> KeysValues | Folded:
        found = attention.keys_values(self.text)
        return attention.fold(found, self.bias) if attention.folds(self.text.shape[1]) else found


# ---- pads


def collapse_pads(text: Tensor) -> tuple[Tensor, Tensor] | None:
    """The equal states that a prompt begins with as one, and the bias that makes it count as many.

    A key that occurs m times in a softmax is one key whose logit is raised by ln(m).

    Args:
        text: [B, S, D], padded on the left. Asks the device how many states are equal, which waits for it.

    Returns:
        [B, K, D] with K <= S: the pad, then the other states, then zeros; and [B, K] in at least fp32: ln(m), then 0,
        then -inf for the zeros. None where no prompt gets shorter.
    """
    samples, length, _ = text.shape
    if length < 3:
        return None
    equal = (text[:, 1:] == text[:, :1]).all(-1)  # [B, S - 1]
    pads = 1 + equal.long().cumprod(1).sum(1)  # m, [B]
    fewest = int(pads.min())
    if fewest < 2:
        return None
    kept, wide = length - fewest + 1, torch.promote_types(text.dtype, torch.float32)
    column = torch.arange(kept, device=text.device).expand(samples, -1)  # 0 the pad, 1.. the others
    source = pads[:, None] - 1 + column
    past = source >= length
    short = text.gather(1, source.clamp(max=length - 1)[..., None].expand(-1, -1, text.shape[-1]))
    bias = torch.zeros(samples, kept, dtype=wide, device=text.device).masked_fill(past, float("-inf"))
    bias[:, 0] = pads.to(wide).log()
    return short.masked_fill(past[..., None], 0.0), bias


def balanced(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias with the same softmax that loses little in `dtype`, where only the first key's is neither 0 nor infinite.

    bfloat16 would round ln(240) by up to 0.02. A softmax ignores what all logits share: the other keys get minus the
    rounded value, which is exact, and the first one gets the small remainder.
    """
    if dtype in (torch.float32, torch.float64):
        return bias
    first = bias[:, :1]
    return bias - first.to(dtype).float().masked_fill(first.isinf(), 0.0)


def filled_up(text: Tensor, bias: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """text [B, K, D] and bias [B, K] with keys that do not count, up to a multiple."""
    missing = -text.shape[1] % multiple
    return F.pad(text, (0, 0, 0, missing)), F.pad(bias, (0, missing), value=float("-inf"))
