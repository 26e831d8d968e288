"""What Kolors' UNet reads beside the feature map, computed as rarely as it changes.

Of a prompt: the projected text, its keys and values in every cross-attention, and the embedding of pooled text and
sizes. Of a step: what every residual block makes of the time embedding. Both are kept only while everything they
were computed from is the same object and unchanged (`ops._marks`), LoRA layers included, and never where gradients
are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import savings
from ..ops._backends import forced
from ..ops._folded_attention import Folded
from ..ops._library import tracing
from ..ops._marks import Mark
from .attention import Attention, KeysValues
from .layers import PEFT_STATE, is_wrapped


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


class Conditioning(NamedTuple):
    """What every block reads beside the feature map."""

    prompt: Prompt
    shifts: Mapping[nn.Module, Tensor]  # [B, Cout] each, of the time embedding
    self_bias: Tensor | None = None  # [B, H*W], added to the logits of self-attention


class State:
    """Tensors, layers and switches that a result depends on, as they were."""

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        layers: Iterable[nn.Module],
        *numbers: Any,
        on_death: Callable[[Any], None] | None = None,
    ) -> None:
        found = _inputs(tensors, layers)
        self.marks: list[Mark | None] | None = None  # None: the result cannot be kept
        if found is None or torch.is_grad_enabled() or tracing(*tensors):
            return
        if all(t is None or (type(t) in (Tensor, nn.Parameter) and not t.is_inference()) for t in found[0]):
            self.marks = [None if t is None else Mark(t, on_death) for t in found[0]]
            self.others = (found[1], numbers, _switches())

    def holds(self, tensors: Sequence[Tensor | None], layers: Iterable[nn.Module], *numbers: Any) -> bool:
        """Whether all of them are the same and unchanged."""
        if self.marks is None or torch.is_grad_enabled() or tracing(*tensors):
            return False
        found = _inputs(tensors, layers)
        if found is None or (found[1], numbers, _switches()) != self.others or len(found[0]) != len(self.marks):
            return False
        return all(
            t is None if mark is None else t is not None and mark.holds(t)
            for mark, t in zip(self.marks, found[0], strict=True)
        )


def _switches() -> tuple[Any, ...]:
    return savings.switched_off(), forced(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _inputs(
    tensors: Sequence[Tensor | None], layers: Iterable[nn.Module]
) -> tuple[list[Tensor | None], list[Any]] | None:
    """All tensors and other values that the layers' results depend on; None where an unknown wrapper hides them."""
    found, others = list(tensors), []
    for layer in layers:
        if not is_wrapped(layer):
            found += layer._parameters.values()
            continue
        if not all(hasattr(layer, name) for name in PEFT_STATE):
            return None
        found += layer.parameters()
        others.append([repr(getattr(layer, name)) for name in PEFT_STATE])
    return found, others


class Steps:
    """The conditioning of all steps of a run.

    Args:
        shifts: of every residual block, [T, B, Cout].
        timesteps: [T].
        state: of what the shifts were computed from.
    """

    def __init__(self, prompt: Prompt, shifts: Mapping[nn.Module, Tensor], timesteps: Tensor, state: State) -> None:
        self.prompt, self.timesteps, self.state = prompt, timesteps, state
        self._blocks = {block: one.shape[1:] for block, one in shifts.items()}
        # in one tensor, so that a row is one look-up
        self._shifts = torch.cat([one.flatten(1) for one in shifts.values()], dim=1)  # [T, sum of B * Cout]

    def at(self, row: int | Tensor) -> Conditioning:
        """Of one step; a row int64 [1] on the device is not read by the host."""
        flat = self._shifts[row] if isinstance(row, int) else self._shifts.index_select(0, row)[0]
        parts = flat.split([shape.numel() for shape in self._blocks.values()])
        shifts = {block: part.view(shape) for (block, shape), part in zip(self._blocks.items(), parts, strict=True)}
        return Conditioning(self.prompt, shifts)

    def signature(self) -> Any:
        """All that decides whether `load` fits."""
        blocks = tuple((id(block), shape) for block, shape in self._blocks.items())
        return blocks, tuple(None if t is None else (t.shape, t.dtype) for t in self._tensors())

    def fixed(self) -> Steps:
        """A copy in memory of its own."""
        copied = copy(self)
        copied.prompt, copied._shifts = self.prompt.clone(), self._shifts.clone()
        return copied

    def load(self, other: Steps) -> None:
        """Take over the values of steps with the same signature."""
        for own, given in zip(self._tensors(), other._tensors(), strict=True):
            if own is not None and given is not None:
                own.copy_(given)

    def _tensors(self) -> list[Tensor | None]:
        return [self._shifts, *self.prompt.tensors()]


class PromptCache:
    """The prompts seen last, so that each is read once; several, for some callers give each guidance term a call."""

    SIZE = 4

    def __init__(self) -> None:
        self._entries: list[tuple[State, Prompt]] = []

    def get(
        self,
        tensors: Sequence[Tensor | None],
        layers: Sequence[nn.Module],
        numbers: tuple[Any, ...],
        read: Callable[[bool], Prompt],
    ) -> Prompt:
        """The prompt read from these inputs, from `read(whether it will be kept)` where it is not known."""
        if not savings.on("prompt_cache"):
            return read(False)
        for state, prompt in self._entries:
            if state.holds(tensors, layers, *numbers):
                return prompt
        prompt = read(State(tensors, layers, *numbers).marks is not None)
        # only now: reading may have joined weights, which moves them
        state = State(tensors, layers, *numbers, on_death=lambda _: self._drop_dead())
        if state.marks is not None:
            self._entries = [*self._entries, (state, prompt)][-self.SIZE :]
        return prompt

    def _drop_dead(self) -> None:
        """What can no longer be asked for, as soon as it cannot: keys and values take much memory."""
        self._entries = [
            (state, prompt)
            for state, prompt in self._entries
            if all(mark is None or mark.of() is not None for mark in state.marks or [])
        ]

    def forget(self) -> None:
        self._entries.clear()

    def __deepcopy__(self, memo: Any) -> PromptCache:
        return PromptCache()

    def __reduce__(self) -> tuple[type[PromptCache], tuple[()]]:
        return PromptCache, ()


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
