"""Stand-ins for diffusers' attention processors, which pipelines list and set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class AttentionProcessor:
    """Stands for the attention that a model computes by itself."""


def check_processors(processor: Any, known: tuple[str, ...]) -> None:
    """Accept a processor, or a dict of one per layer, that stands for plain attention; refuse any other.

    Args:
        known: diffusers' classes that compute what the model computes anyway, the one it sets itself first.
    """
    processors = processor if isinstance(processor, Mapping) else {"all": processor}
    for name, item in processors.items():
        kind = type(item).__name__
        if kind not in (AttentionProcessor.__name__, *known):
            expected = f"plain attention ({known[0]}), which this model computes itself"
            raise ValueError(f"set_attn_processor: {name}: expected {expected}, got {kind}")
