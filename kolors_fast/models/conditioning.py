"""What a denoiser reads beside the sample, computed as rarely as it changes.

Of a prompt: whatever the model makes of the text alone. Of a step: what every block makes of the timestep (and, in a
diffusion transformer, of the pooled text). Both are kept only while everything they were computed from is the same
object and unchanged (`ops._marks`), LoRA layers included, and never where gradients are wanted.

A denoiser offers the denoising loop four methods, and nothing else of it is known there:

    read_prompt(...) -> Prompt                  what it reads of prompts; known ones are not read again
    plan_steps(timesteps, prompt) -> Steps      what all blocks make of all timesteps at once
    follows(steps, prompt) -> bool              whether such a plan still holds
    denoise(sample, conditioning) -> Tensor     the model proper, at one step
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .. import savings
from ..ops._backends import forced
from ..ops._library import tracing
from ..ops._marks import Mark
from .layers import PEFT_STATE, is_wrapped


class Prompt(Protocol):
    """What a model reads of its prompts at every step."""

    def tensors(self) -> list[Tensor | None]:
        """Everything that a step reads."""

    def clone(self) -> Any:
        """A copy in memory of its own."""


PromptT = TypeVar("PromptT", bound=Prompt)


class Conditioning(NamedTuple):
    """What every block reads beside the sample."""

    prompt: Any  # the model's own Prompt
    modulations: Mapping[nn.Module, Tensor]  # [B, width] each: what a block makes of the timestep
    self_bias: Tensor | None = None  # [B, tokens], added to the logits of self-attention


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
        modulations: of every block, [T, B, width].
        timesteps: [T].
        state: of what the modulations were computed from.
    """

    def __init__(
        self, prompt: Prompt, modulations: Mapping[nn.Module, Tensor], timesteps: Tensor, state: State
    ) -> None:
        self.prompt, self.timesteps, self.state = prompt, timesteps, state
        self._blocks = {block: one.shape[1:] for block, one in modulations.items()}
        # in one tensor, so that a row is one look-up
        self._rows = torch.cat([one.flatten(1) for one in modulations.values()], dim=1)  # [T, sum of B * width]

    def at(self, row: int | Tensor) -> Conditioning:
        """Of one step; a row int64 [1] on the device is not read by the host."""
        flat = self._rows[row] if isinstance(row, int) else self._rows.index_select(0, row)[0]
        parts = flat.split([shape.numel() for shape in self._blocks.values()])
        found = {block: part.view(shape) for (block, shape), part in zip(self._blocks.items(), parts, strict=True)}
        return Conditioning(self.prompt, found)

    def signature(self) -> Any:
        """All that decides whether `load` fits."""
        blocks = tuple((id(block), shape) for block, shape in self._blocks.items())
        return blocks, tuple(None if t is None else (t.shape, t.dtype) for t in self._tensors())

    def fixed(self) -> Steps:
        """A copy in memory of its own."""
        copied = copy(self)
        copied.prompt, copied._rows = self.prompt.clone(), self._rows.clone()
        return copied

    def load(self, other: Steps) -> None:
        """Take over the values of steps with the same signature."""
        for own, given in zip(self._tensors(), other._tensors(), strict=True):
            if own is not None and given is not None:
                own.copy_(given)

    def _tensors(self) -> list[Tensor | None]:
        return [self._rows, *self.prompt.tensors()]


class PromptCache:
    """The prompts seen last, so that each is read once; several, for some callers give each guidance term a call."""

    SIZE = 4

    def __init__(self) -> None:
        self._entries: list[tuple[State, Any]] = []

    def get(
        self,
        tensors: Sequence[Tensor | None],
        layers: Sequence[nn.Module],
        numbers: tuple[Any, ...],
        read: Callable[[bool], PromptT],
    ) -> PromptT:
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
