"""Training of an adapter in place of a model's own weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import nn

from kolors_fast.models.lora_adapter import inject_lora
from kolors_fast.models.lora_files import LoRA, lora_layers, lora_shapes


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers are adapted, and how: (alpha / rank) up down is added to their weights.

    The targets are the ends of layers' paths, whole names between dots: "to_q", "to_out.0", "attn2.to_k", or a path.
    The defaults are those of Kolors' DreamBooth training.
    """

    rank: int = 4
    alpha: float | None = None  # None: the rank
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: expected 1 or more, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha: expected more than 0, got {self.alpha}")
        if not self.targets:
            raise ValueError("targets: expected one or more, got none")


def add_lora(
    model: nn.Module, config: LoRAConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Freeze the model and add an adapter to it that does nothing yet: down from U(-b, b), b = in^(-1/2), and up zero.

    This is Kaiming's uniform distribution with a = sqrt(5), as PEFT has it.

    Args:
        seed: of down, which depends on nothing else but the layers' order and shapes.
        dtype: of the adapter's weights, which compute in it, whatever the model's own.

    Returns:
        the adapter's parameters, the only ones that take gradients.

    Raises:
        ValueError: a target names no linear layer and no convolution, or the model has an adapter already.
        ImportError: PEFT is not installed.
    """
    layers = lora_layers(model)
    chosen = set()
    for target in config.targets:
        named = [path for path in layers if path == target or path.endswith(f".{target}")]
        if not named:
            raise ValueError(_unknown(target, model))
        chosen.update(named)
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for path, layer in layers.items():
        if path in chosen:
            down, up = lora_shapes(layer, config.rank)
            weight = nn.init.kaiming_uniform_(torch.empty(down), math.sqrt(5), generator=generator)
            adapter[path] = LoRA(weight, torch.zeros(up), float(config.alpha or config.rank))
    return inject_lora(model, adapter, dtype)


def narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep what is multiplied and not trained, the weights of linear layers and convolutions, in the dtype that
    autocast would round them to in every step: the same products from half the memory, and no rounded copy that waits
    for the backward pass."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(dtype)
        if isinstance(layer, nn.Linear) and layer.bias is not None and not layer.bias.requires_grad:
            layer.bias.data = layer.bias.data.to(dtype)  # a convolution's may be added in a norm, in fp32


def _unknown(target: str, model: nn.Module) -> str:
    """The message, with the nearest of the names that would do."""
    names: set[str] = set()
    for path in lora_layers(model):
        parts = path.split(".")
        names.update(".".join(parts[i:]) for i in range(len(parts)) if not parts[i].isdigit())
    near = get_close_matches(target, sorted(names), n=3, cutoff=0)
    wanted = f"ends of paths of linear layers and convolutions of {type(model).__name__}"
    return f"targets: expected {wanted}, such as {', '.join(map(repr, near))}, got {target!r}"
