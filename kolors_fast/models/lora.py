"""The strength of LoRA layers that PEFT has injected into a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def lora_scale(kwargs: Mapping[str, Any] | None, name: str = "cross_attention_kwargs") -> float:
    """The strength of injected LoRA layers that a caller asks for in the argument `name`."""
    others = dict(kwargs or {})
    scale: float = others.pop("scale", 1.0)
    if others:
        raise ValueError(f"{name}: expected no key but 'scale', got {sorted(others)}")
    return scale


@contextmanager
def lora_scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """Multiply the strength of every injected PEFT layer inside the block."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "scale_layer")] if scale != 1.0 else []
    for layer in layers:
        layer.scale_layer(scale)
    try:
        yield
    finally:
        for layer in layers:
            if scale != 0:
                layer.unscale_layer(scale)
            else:  # a zero cannot be divided out
                for name in layer.active_adapters:
                    layer.set_scale(name, 1.0)
