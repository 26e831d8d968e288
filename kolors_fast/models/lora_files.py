"""LoRA adapters as safetensors files, with the keys of diffusers, PEFT or kohya's trainer.

| format    | keys of a layer                                                        |
|-----------|------------------------------------------------------------------------|
| diffusers | `unet.<path>.lora.down.weight`, `.lora.up.weight`                      |
| peft      | `unet.<path>.lora_A.weight`, `.lora_B.weight`                          |
| kohya     | `lora_unet_<path with _>.lora_down.weight`, `.lora_up.weight`, `.alpha` |

A transformer's begin with `transformer.` and `lora_transformer_`. The first two formats have alpha in the metadata,
where diffusers looks for it; a reader that does not takes it to be the rank.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .checkpoint import CheckpointError, read_json, write_file
from .unet import KolorsUNet

# endings of the keys, and what they hold
ENDINGS = {
    "diffusers": {".lora.down.weight": "down", ".lora.up.weight": "up"},
    "peft": {".lora_A.weight": "down", ".lora_B.weight": "up"},
    "kohya": {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"},
}
PARTS = {ending: part for endings in ENDINGS.values() for ending, part in endings.items()}
CONFIG = "lora_adapter_metadata"  # the key of diffusers' metadata that has PEFT's config


@dataclass(frozen=True)
class LoRA:
    """What is added to one layer's weight: (alpha / rank) up down (Hu et al. 2021, arXiv 2106.09685).

    down [rank, in] and up [out, rank]; of a convolution [rank, in, height, width] and [out, rank, 1, 1].
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)


def lora_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that can have an adapter, by their paths."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def lora_shapes(layer: nn.Linear | nn.Conv2d, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of down and up."""
    out, *rest = layer.weight.shape
    return (rank, *rest), (out, rank, *(1 for _ in rest[1:]))


def write_lora(
    path: str | os.PathLike[str],
    adapter: Mapping[str, LoRA],
    model: nn.Module,
    format: str = "diffusers",
    base_model: str = "",
) -> None:
    """Write an adapter of the model in a format of this module's table, beside and renamed.

    Args:
        adapter: by the paths of the model's layers.
        base_model: the name of the weights that it was trained with, for the metadata.
    """
    if format not in ENDINGS:
        raise ValueError(f"format: expected one of {list(ENDINGS)}, got {format!r}")
    if not adapter:
        raise ValueError("adapter: expected one layer or more, got none")
    component = component_of(model)
    tensors: dict[str, Tensor] = {}
    for layer, lora in adapter.items():
        name = f"lora_{component}_{layer.replace('.', '_')}" if format == "kohya" else f"{component}.{layer}"
        alpha = torch.tensor(lora.alpha, dtype=torch.float64)  # which rounds none
        parts = {"down": lora.down, "up": lora.up, "alpha": alpha}
        for ending, part in ENDINGS[format].items():
            tensors[name + ending] = parts[part].detach().cpu().contiguous()
    config = peft_config(adapter)
    metadata = {"format": "pt", "base_model": base_model}
    metadata |= {"rank": str(config["r"]), "alpha": str(config["lora_alpha"])}  # of most layers
    if format == "kohya":
        metadata |= {"ss_network_dim": metadata["rank"], "ss_network_alpha": metadata["alpha"]}
    else:
        metadata[CONFIG] = json.dumps({f"{component}.{key}": value for key, value in config.items()}, indent=2)
    write_file(Path(path), save(tensors, metadata))


def read_lora(path: str | os.PathLike[str], model: nn.Module) -> dict[str, LoRA]:
    """Read an adapter of the model from a file of any format, told apart by its keys.

    Kohya's trainer names the layers of SDXL's UNet as the code does that it was released with; these names are known,
    too. Where nothing tells alpha, it is the rank. PEFT's own `adapter_model.safetensors` is read together with the
    `adapter_config.json` beside it.

    Args:
        model: without an adapter; its layers' paths and shapes are what the file must fit.

    Returns:
        the adapter by the paths of the model's layers, in their order.

    Raises:
        CheckpointError: no safetensors file, a key that names no layer of the model, half a pair, a wrong shape, or
            another kind of adapter (DoRA, rsLoRA).
    """
    file = Path(path)
    tensors, config = _read(file, component_of(model))
    layers, names = lora_layers(model), _names(model)
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in tensors.items():
        ending = next((ending for ending in PARTS if key.endswith(ending)), "")
        layer = names.get(key.removesuffix(ending)) if ending else None
        if layer is None:
            unknown.append(key)
        elif PARTS[ending] in found.setdefault(layer, {}):
            raise CheckpointError(f"{file} holds the '{PARTS[ending]}' of layer '{layer}' twice, again as '{key}'")
        else:
            found[layer][PARTS[ending]] = value
    if unknown or not found:
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        got = f"'{unknown[0]}'{others}" if unknown else "nothing"
        wanted = f"LoRA weights of linear layers and convolutions of {type(model).__name__}"
        raise CheckpointError(f"{file}: expected {wanted}, got {got}")
    return {name: _lora(file, name, layer, found[name], config) for name, layer in layers.items() if name in found}


def _lora(
    file: Path, name: str, layer: nn.Linear | nn.Conv2d, parts: dict[str, Tensor], config: Mapping[str, Any]
) -> LoRA:
    """What the file holds for one layer, checked against it."""
    for part in ("down", "up"):
        if part not in parts:
            raise CheckpointError(f"{file} lacks the '{part}' of layer '{name}'")
    down, up, alpha = parts["down"], parts["up"], parts.get("alpha")
    rank = max(1, down.shape[0] if down.dim() else 0)
    expected, got = lora_shapes(layer, rank), (tuple(down.shape), tuple(up.shape))
    if got != expected:
        raise CheckpointError(f"{file}: down and up of layer '{name}': expected shapes {expected}, got {got}")
    if alpha is None:
        return LoRA(down, up, _alpha(name, rank, config))
    if alpha.numel() != 1:
        raise CheckpointError(f"{file}: alpha of layer '{name}': expected one number, got shape {tuple(alpha.shape)}")
    return LoRA(down, up, float(alpha))


# ---- names


def component_of(model: nn.Module) -> str:
    """What pipelines call the model."""
    return "unet" if isinstance(model, KolorsUNet) else "transformer"


def _names(model: nn.Module) -> dict[str, str]:
    """Paths of the model's layers, by every name that files have for them."""
    component, names = component_of(model), {}
    blocks = _original_blocks(model) if isinstance(model, KolorsUNet) else {}
    for path in lora_layers(model):
        for name in (path, f"{component}.{path}", f"base_model.model.{path}"):
            names[name] = path
        for name in (path, _original_name(path, blocks)):
            flat = name.replace(".", "_")
            names[f"lora_{component}_{flat}"] = names[f"lora_unet_{flat}"] = path
    return names


def _original_blocks(unet: KolorsUNet) -> dict[str, str]:
    """Where our blocks are in the code that SDXL was released with (Stability-AI/generative-models, openaimodel.py)."""
    names = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    for number in (1, 2):
        names[f"time_embedding.linear_{number}"] = f"time_embed.{2 * number - 2}"
        names[f"add_embedding.linear_{number}"] = f"label_emb.0.{2 * number - 2}"
    names |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    names["mid_block.resnets.1"] = "middle_block.2"
    blocks: list[tuple[str, Any]] = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    blocks += [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
    counts = {"down": 1, "up": 0}
    for path, block in blocks:
        side = path.partition("_")[0]
        kind = {"down": "input_blocks", "up": "output_blocks"}[side]
        for i in range(len(block.resnets)):
            names[f"{path}.resnets.{i}"] = f"{kind}.{counts[side]}.0"
            names[f"{path}.attentions.{i}"] = f"{kind}.{counts[side]}.1"
            counts[side] += 1
        if side == "down" and block.downsamplers:
            names[f"{path}.downsamplers.0.conv"] = f"{kind}.{counts[side]}.0.op"
            counts[side] += 1
        if side == "up":
            names[f"{path}.upsamplers.0.conv"] = f"{kind}.{counts[side] - 1}.{2 if block.attentions else 1}.conv"
    return names


_IN_RESNETS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _original_name(path: str, blocks: dict[str, str]) -> str:
    """A layer's path there; its own, where it has none."""
    for ours, theirs in blocks.items():
        if path == ours or path.startswith(f"{ours}."):
            rest = path[len(ours) + 1 :]
            return f"{theirs}.{_IN_RESNETS.get(rest, rest)}" if rest else theirs
    return path


# ---- what PEFT calls the config


def peft_config(adapter: Mapping[str, LoRA]) -> dict[str, Any]:
    """The values of PEFT's LoraConfig: those of most layers, and patterns for the others."""
    rank = Counter(lora.rank for lora in adapter.values()).most_common(1)[0][0]
    alpha = Counter(lora.alpha for lora in adapter.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{path}": lora.rank for path, lora in adapter.items() if lora.rank != rank},
        "alpha_pattern": {f"^{path}": lora.alpha for path, lora in adapter.items() if lora.alpha != alpha},
        "target_modules": list(adapter),
    }


def _alpha(path: str, rank: int, config: Mapping[str, Any]) -> float:
    """A layer's alpha by such a config, the first matching pattern's as in PEFT."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(alpha)
    return float(config.get("lora_alpha") or rank)


def _read(file: Path, component: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors and PEFT's config; {} where there is none."""
    if not file.is_file():
        raise CheckpointError(f"the file {file} is missing")
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a dict)
            metadata = content.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error
    beside = file.with_name("adapter_config.json")
    try:
        if CONFIG in metadata:
            config = json.loads(metadata[CONFIG])
            config = {key.removeprefix(f"{component}."): value for key, value in config.items()}
        else:
            config = read_json(beside) if file.name == "adapter_model.safetensors" and beside.is_file() else {}
    except (json.JSONDecodeError, AttributeError) as error:
        raise CheckpointError(f"{file}: '{CONFIG}' of its metadata: expected a JSON object ({error})") from error
    for kind in ("use_dora", "use_rslora"):
        if config.get(kind):
            raise CheckpointError(f"{file}: expected a plain LoRA adapter, got one with {kind}")
    return tensors, config
