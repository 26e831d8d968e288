"""Pipeline folders in diffusers' layout: model_index.json beside one folder per component."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import schedulers
from ..assets import BUNDLED, bundled
from ..models.checkpoint import CheckpointError, Config, PretrainedModel, model_folder, read_json, write_file
from .text_encoders import (
    TEXT_ENCODERS,
    TOKENIZERS,
    load_text_encoder,
    load_tokenizer,
    save_text_encoder,
    save_tokenizer,
)

INDEX = "model_index.json"


class Part(NamedTuple):
    """A component of a pipeline."""

    library: str  # that model_index.json names
    classes: tuple[str, ...]  # known there; the first is written
    ours: Any = None  # our class; None: transformers' own, by the name in the index
    optional: bool = False  # may be [null, null] there


class Loaded(NamedTuple):
    components: dict[str, Any]  # the constructor's arguments, by name
    options: dict[str, Any]  # model_index.json


def load_index(path_or_id: str | os.PathLike[str]) -> tuple[dict[str, Any], Path]:
    """model_index.json of a folder, a Hub id or a bundled model, and where it lies beside the folders of configs."""
    index_file = model_folder(_resolved(path_or_id), None, [INDEX, "*/config.json"]) / INDEX
    return read_json(index_file), index_file


def load_configs(path_or_id: str | os.PathLike[str], parts: Mapping[str, Part]) -> dict[str, Config]:
    """The configs of our models in a pipeline's folder, by component."""
    path_or_id = _resolved(path_or_id)
    models = {name: part.ours for name, part in parts.items() if _is_model(part)}
    return {name: kind.load_config(path_or_id, subfolder=name) for name, kind in models.items()}


def load_components(
    path_or_id: str | os.PathLike[str],
    parts: Mapping[str, Part],
    torch_dtype: torch.dtype | None,
    variant: str | None,
    device: torch.device | str | None = None,
    *,
    given: Mapping[str, Any] | None = None,
    prepare: Mapping[str, Callable[[Any], Any]] | None = None,
    with_weights: bool = True,
) -> Loaded:
    """The components of a pipeline, from a folder, a Hub id or the name of a bundled model.

    Args:
        given: components taken as they are.
        prepare: what to do to an empty model of ours before its weights are read, by component.
        with_weights: False leaves our models empty, to be filled by `load_weights`.
    """
    path_or_id = _resolved(path_or_id)
    index, index_file = load_index(path_or_id)
    loaded = dict(given or {})
    for name in loaded:
        if name not in parts and name != "scheduler":
            raise ValueError(f"{name}: expected a component, one of {', '.join([*parts, 'scheduler'])}, got no such")
    for name, part in parts.items():
        if name in loaded:
            continue
        if part.optional and index.get(name, [None, None])[1] is None:
            loaded[name] = None
            continue
        named = _class_named(index, name, index_file)
        if named not in part.classes and named != getattr(part.ours, "__name__", None):
            raise CheckpointError(f"{index_file}: {name}: expected the class {part.classes[0]}, got {named}")
        if not _is_model(part):
            loaded[name] = _load_other(part, path_or_id, name, named, torch_dtype, variant, device)
            continue
        loaded[name] = part.ours.empty(part.ours.load_config(path_or_id, subfolder=name), torch_dtype)
        if prepare is not None and name in prepare:
            prepare[name](loaded[name])
        if with_weights:
            loaded[name].load_weights(path_or_id, subfolder=name, variant=variant, device=device)
    if "scheduler" not in loaded:
        loaded["scheduler"] = _load_scheduler(path_or_id, index, index_file)
    for name in ("image_encoder", "feature_extractor"):
        if index.get(name, [None, None])[1] is not None:
            warnings.warn(f"{index_file}: {name} is not loaded, for image prompts are not supported", stacklevel=3)
    return Loaded(loaded, index)


def _load_other(
    part: Part,
    path_or_id: str | os.PathLike[str],
    name: str,
    named: str,
    torch_dtype: torch.dtype | None,
    variant: str | None,
    device: torch.device | str | None,
) -> Any:
    if part.ours is not None:
        return part.ours.from_pretrained(path_or_id, subfolder=name)  # a tokenizer
    if named in TOKENIZERS:
        return load_tokenizer(path_or_id, name, named)
    return load_text_encoder(path_or_id, name, named, torch_dtype, variant, device)


def _load_scheduler(path_or_id: str | os.PathLike[str], index: dict[str, Any], index_file: Path) -> Any:
    named = _class_named(index, "scheduler", index_file)
    kind = getattr(schedulers, named, None) if named in schedulers.__all__ else None
    if kind is None:
        known = [name for name in schedulers.__all__ if name.endswith("Scheduler") and name != "Scheduler"]
        raise CheckpointError(f"{index_file}: scheduler: expected one of {', '.join(known)}, got {named}")
    return kind.from_pretrained(path_or_id, subfolder="scheduler")


def weights_loader(
    path_or_id: str | os.PathLike[str], variant: str | None, device: torch.device | str | None
) -> Callable[[str, PretrainedModel], None]:
    """What fills an empty component, named as in the folder."""

    def load(name: str, model: PretrainedModel) -> None:
        model.load_weights(_resolved(path_or_id), subfolder=name, variant=variant, device=device)

    return load


def save_components(
    folder: str | os.PathLike[str],
    class_name: str,
    parts: Mapping[str, Part],
    components: Mapping[str, Any],
    options: Mapping[str, Any],
    variant: str | None,
) -> None:
    """Write every component, then model_index.json, so that a folder with an index is complete."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": "0.30.0"}
    for name, part in parts.items():
        component = components[name]
        if component is None:
            index[name] = [None, None]
            continue
        index[name] = [part.library, part.classes[0] if part.ours is not None else type(component).__name__]
        if _is_model(part):
            component.save_pretrained(target / name, variant=variant)
        elif part.ours is not None:
            component.save_pretrained(target / name)
        elif index[name][1] in TEXT_ENCODERS:
            save_text_encoder(component, target / name, variant=variant)
        else:
            save_tokenizer(component, target / name)
    components["scheduler"].save_pretrained(target / "scheduler")
    index["scheduler"] = ["diffusers", type(components["scheduler"]).__name__]
    index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
    write_file(target / INDEX, (json.dumps({**index, **options}, indent=2) + "\n").encode())


def _is_model(part: Part) -> bool:
    return isinstance(part.ours, type) and issubclass(part.ours, PretrainedModel)


def _resolved(path_or_id: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder of a bundled model, unless there is a folder of that name."""
    is_bundled = str(path_or_id) in BUNDLED and not Path(path_or_id).exists()
    return bundled(str(path_or_id)) if is_bundled else path_or_id


def _class_named(index: dict[str, Any], name: str, index_file: Path) -> str:
    entry = index.get(name)
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise CheckpointError(f"{index_file}: {name}: expected [library, class], got {entry!r}")
    return entry[1]
