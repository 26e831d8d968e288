"""LoRA adapters in a model: PEFT's layers around the model's own, whose state-dict keys stay those of PEFT."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .lora_files import LoRA, peft_config, read_lora, write_lora

ADAPTER = "default"  # PEFT's name of the one that is here


def load_lora(
    model: nn.Module, path: str | os.PathLike[str], dtype: torch.dtype | None = torch.float32
) -> list[nn.Parameter]:
    """Put a file's adapter into the model, as `inject_lora` does. The file: see `lora_files.read_lora`."""
    _expect_plain(model)
    return inject_lora(model, read_lora(path, model), dtype)


def save_lora(model: nn.Module, path: str | os.PathLike[str], format: str = "diffusers", base_model: str = "") -> None:
    """Write the model's adapter in one of the formats of `lora_files`: diffusers, peft or kohya."""
    write_lora(path, lora_of(model), model, format, base_model)


def inject_lora(
    model: nn.Module, adapter: Mapping[str, LoRA], dtype: torch.dtype | None = torch.float32
) -> list[nn.Parameter]:
    """Freeze the model and let layer(x) become layer(x) + (alpha / rank) up(down(x)) for each layer of the adapter.

    Args:
        adapter: by the paths of the model's layers; its tensors are copied.
        dtype: of the adapter's weights, which compute in it, whatever the model's own; None keeps theirs.

    Returns:
        the adapter's parameters, which take gradients.

    Raises:
        ValueError: the model has an adapter already.
        ImportError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA layers need PEFT: pip install 'kolors-fast[train]'") from error
    _expect_plain(model)
    if not adapter:
        raise ValueError("adapter: expected one layer or more, got none")
    training = {path: model.get_submodule(path).training for path in adapter}
    config = peft.LoraConfig(**peft_config(adapter))
    state = {f"{path}.lora_A.weight": lora.down for path, lora in adapter.items()}  # tells the layers, exactly
    peft.inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True, state_dict=state)  # freezes the others
    parameters = []
    for path, layer in _injected(model).items():
        lora, device = adapter[path], layer.get_base_layer().weight.device
        for part, value in ((layer.lora_A, lora.down), (layer.lora_B, lora.up)):
            weight = nn.Parameter(value.detach().to(device, dtype, copy=True))
            part[ADAPTER].weight = weight
            parameters.append(weight)
        layer.train(training[path])
    return parameters


def lora_of(model: nn.Module) -> dict[str, LoRA]:
    """The model's one adapter, by the paths of its layers.

    Raises:
        ValueError: it has none, or several, or a layer's strength is not alpha / rank, as in rsLoRA or where it has
            been set by hand.
    """
    adapter = {}
    for path, layer in _injected(model).items():
        if len(layer.lora_A) != 1 or layer.lora_variant:
            raise ValueError(f"{path}: expected one plain LoRA adapter, got {list(layer.lora_A)}")
        (name,) = layer.lora_A
        alpha, rank = layer.lora_alpha[name], layer.r[name]
        if layer.scaling[name] != alpha / rank:
            raise ValueError(f"{path}: expected the strength alpha / rank = {alpha / rank}, got {layer.scaling[name]}")
        adapter[path] = LoRA(layer.lora_A[name].weight, layer.lora_B[name].weight, float(alpha))
    if not adapter:
        raise ValueError(f"expected a {type(model).__name__} with LoRA layers, got one without")
    return adapter


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """W <- W + (alpha / rank) up down, rounded once to W's dtype, with the model's own layers in their places again."""
    for path, layer in _injected(model).items():
        base = layer.get_base_layer()
        layer.merge()
        base.weight.mul_(1)  # an edit that is counted, as PEFT's, through `.data`, is not: caches look at the version
        model.set_submodule(path, base)
    model.__dict__.pop("peft_config", None)


def _injected(model: nn.Module) -> dict[str, Any]:
    return {path: layer for path, layer in model.named_modules() if hasattr(layer, "lora_A")}


def _expect_plain(model: nn.Module) -> None:
    if _injected(model):
        raise ValueError(f"expected a {type(model).__name__} without LoRA layers, got one with them: merge them first")
