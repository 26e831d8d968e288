"""Pipeline folders in diffusers' layout: model_index.json beside one folder per component."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import schedulers
from ..assets import BUNDLED, bundled
from ..models.autoencoder_kl import AutoencoderKL
from ..models.chatglm import ChatGLM
from ..models.chatglm_tokenizer import ChatGLMTokenizer
from ..models.checkpoint import CheckpointError, Config, PretrainedModel, model_folder, read_json, write_file
from ..models.unet import KolorsUNet

INDEX = "model_index.json"
# component -> (library that model_index.json names, the class's name there, our class)
COMPONENTS: dict[str, tuple[str, str, Any]] = {
    "vae": ("diffusers", "AutoencoderKL", AutoencoderKL),
    "text_encoder": ("kolors", "ChatGLMModel", ChatGLM),
    "tokenizer": ("kolors", "ChatGLMTokenizer", ChatGLMTokenizer),
    "unet": ("diffusers", "UNet2DConditionModel", KolorsUNet),
}


def load_configs(path_or_id: str | os.PathLike[str]) -> dict[str, Config]:
    """The configs of the models of a pipeline's folder, by component."""
    path_or_id = _resolved(path_or_id)
    models = {name: kind for name, (_, _, kind) in COMPONENTS.items() if kind is not ChatGLMTokenizer}
    return {name: kind.load_config(path_or_id, subfolder=name) for name, kind in models.items()}


def load_components(
    path_or_id: str | os.PathLike[str],
    torch_dtype: torch.dtype | None,
    variant: str | None,
    device: torch.device | str | None = None,
    quantization: str | None = None,
    *,
    with_weights: bool = True,
) -> dict[str, Any]:
    """The constructor arguments of a pipeline, from a folder, a Hub id or the name of a bundled model.

    Without weights, the models are empty, to be filled by `load_weights`.
    """
    path_or_id = _resolved(path_or_id)
    index_file = model_folder(path_or_id, None, [INDEX]) / INDEX
    index = read_json(index_file)
    loaded: dict[str, Any] = {}
    for name, (_, theirs, ours) in COMPONENTS.items():
        named = _class_named(index, name, index_file)
        if named not in (theirs, ours.__name__):
            raise CheckpointError(f"{index_file}: {name}: expected the class {theirs}, got {named}")
        if ours is ChatGLMTokenizer:
            loaded[name] = ours.from_pretrained(path_or_id, subfolder=name)
            continue
        loaded[name] = ours.empty(ours.load_config(path_or_id, subfolder=name), torch_dtype)
        if ours is ChatGLM and quantization is not None:
            loaded[name].quantize_(quantization)
        if with_weights:
            loaded[name].load_weights(path_or_id, subfolder=name, variant=variant, device=device)
    named = _class_named(index, "scheduler", index_file)
    kind = getattr(schedulers, named, None) if named in schedulers.__all__ else None
    if kind is None:
        known = [name for name in schedulers.__all__ if name.endswith("Scheduler") and name != "Scheduler"]
        raise CheckpointError(f"{index_file}: scheduler: expected one of {', '.join(known)}, got {named}")
    loaded["scheduler"] = kind.from_pretrained(path_or_id, subfolder="scheduler")
    for name in ("image_encoder", "feature_extractor"):
        if index.get(name, [None, None])[1] is not None:
            warnings.warn(f"{index_file}: {name} is not loaded, for image prompts are not supported", stacklevel=3)
    loaded["force_zeros_for_empty_prompt"] = bool(index.get("force_zeros_for_empty_prompt", False))
    return loaded


def weights_loader(
    path_or_id: str | os.PathLike[str], variant: str | None, device: torch.device | str | None
) -> Callable[[str, PretrainedModel], None]:
    """What fills an empty component, named as in the folder."""

    def load(name: str, model: PretrainedModel) -> None:
        model.load_weights(_resolved(path_or_id), subfolder=name, variant=variant, device=device)

    return load


def save_components(pipeline: Any, folder: str | os.PathLike[str], variant: str | None) -> None:
    """Write every component, then model_index.json, so that a folder with an index is complete."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"_class_name": "KolorsPipeline", "_diffusers_version": "0.30.0"}
    for name, (library, theirs, _) in COMPONENTS.items():
        component = getattr(pipeline, name)
        weights = {} if name == "tokenizer" else {"variant": variant}
        component.save_pretrained(target / name, **weights)
        index[name] = [library, theirs]
    pipeline.scheduler.save_pretrained(target / "scheduler")
    index["scheduler"] = ["diffusers", type(pipeline.scheduler).__name__]
    index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
    index["force_zeros_for_empty_prompt"] = pipeline.config.force_zeros_for_empty_prompt
    write_file(target / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _resolved(path_or_id: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder of a bundled model, unless there is a folder of that name."""
    is_bundled = str(path_or_id) in BUNDLED and not Path(path_or_id).exists()
    return bundled(str(path_or_id)) if is_bundled else path_or_id


def _class_named(index: dict[str, Any], name: str, index_file: Path) -> str:
    entry = index.get(name)
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise CheckpointError(f"{index_file}: {name}: expected [library, class], got {entry!r}")
    return entry[1]
