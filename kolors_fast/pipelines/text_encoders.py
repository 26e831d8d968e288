"""CLIP and T5 text encoders with their tokenizers: transformers' classes, imported when a model first needs them."""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import (
    CheckpointError,
    PretrainedModel,
    _find_weights,
    _move_into_place,
    _read_weights,
    _remove_stale,
    _some,
    model_folder,
    read_json,
)

# class -> the model_type that its config.json names
TEXT_ENCODERS = {
    "CLIPTextModel": "clip_text_model",
    "CLIPTextModelWithProjection": "clip_text_model",
    "T5EncoderModel": "t5",
}
_CLIP_VOCABULARY = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_T5_VOCABULARY = (("tokenizer.json",), ("spiece.model",))
# class -> the files that hold its vocabulary, in one of two ways; without any, transformers makes an empty one
TOKENIZERS = {
    "CLIPTokenizer": _CLIP_VOCABULARY,
    "CLIPTokenizerFast": _CLIP_VOCABULARY,
    "T5Tokenizer": _T5_VOCABULARY,
    "T5TokenizerFast": _T5_VOCABULARY,
}
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class _Files(PretrainedModel):
    """The names of transformers' files."""

    weights_name = "model.safetensors"
    bin_weights_name = "pytorch_model.bin"


def load_text_encoder(
    path_or_id: str | os.PathLike[str],
    subfolder: str,
    class_name: str,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """A text encoder in eval mode, as transformers' own class.

    Args:
        path_or_id: folder, or "owner/name" of a hub repository (only when no such folder exists).
        subfolder: folder inside it, such as "text_encoder_2".
        class_name: a key of `TEXT_ENCODERS`; others are refused. No code of a checkpoint ever runs:
            weights are safetensors or, unpickled as plain tensors alone, .bin files.
        torch_dtype: dtype of the weights; None is float32, as in diffusers. In float16, transformers keeps T5's `wo`
            in float32.
        variant: middle part of the weight files' names, such as "fp16" in `model.fp16.safetensors`.
        device: where the weights go; None is the CPU.

    Raises:
        CheckpointError: the class is unknown, or a file is missing, broken, of another class or lacks weights.
        ImportError: transformers is not installed.
    """
    kind, version = _from_transformers(path_or_id, subfolder, class_name, TEXT_ENCODERS)
    folder, files = _find_weights(_Files, path_or_id, subfolder, variant)
    config_file = folder / _Files.config_name
    named = read_json(config_file).get("model_type")
    if named != TEXT_ENCODERS[class_name]:
        raise CheckpointError(f"{config_file}: model_type: expected {TEXT_ENCODERS[class_name]}, got {named}")
    dtype_name = "dtype" if version >= 5 else "torch_dtype"
    _read_weights(files)  # maps them, and says in a sentence what transformers would at length
    try:
        model, report = kind.from_pretrained(
            str(folder),
            variant=variant,
            use_safetensors=files[0].suffix == ".safetensors",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **{dtype_name: torch_dtype or torch.float32},
        )
    except Exception as error:  # values of the config, in whatever way they break the model
        raise CheckpointError(f"{folder} does not load as a {class_name}: {_first_line(error)}") from error
    if report["missing_keys"]:  # which transformers would fill at random, as those of another shape
        missing = _some(sorted(report["missing_keys"]))
        raise CheckpointError(f"the weights in {folder} lack {missing}, which {class_name} needs")
    if report["mismatched_keys"]:
        wrong = [
            f"{key} (expected {tuple(expected)}, got {tuple(got)})" for key, got, expected in report["mismatched_keys"]
        ]
        fit = f"the weights in {folder} do not fit the config of {class_name}"
        raise CheckpointError(f"{fit}: {_some(sorted(wrong), quote='')}")
    return model.eval().to(device or "cpu")


def load_tokenizer(path_or_id: str | os.PathLike[str], subfolder: str, class_name: str) -> Any:
    """A tokenizer, as transformers' own class.

    Args:
        path_or_id: as in `load_text_encoder`.
        subfolder: folder inside it, such as "tokenizer_2".
        class_name: a key of `TOKENIZERS`; others are refused.

    Raises:
        CheckpointError: the class is unknown, or a file is missing or broken.
        ImportError: transformers is not installed, or protobuf, by which it reads T5's `spiece.model`.
    """
    kind, _ = _from_transformers(path_or_id, subfolder, class_name, TOKENIZERS)
    ways = TOKENIZERS[class_name]
    folder = model_folder(path_or_id, subfolder, [*_TOKENIZER_SETTINGS, *(name for way in ways for name in way)])
    if not any(all((folder / name).is_file() for name in way) for way in ways):
        expected = ", or ".join(" and ".join(way) for way in ways)
        raise CheckpointError(f"{folder} has no vocabulary for a {class_name}: expected {expected}")
    if (folder / "spiece.model").is_file():  # which transformers reads by protobuf, and without it blames another
        _import("google.protobuf", path_or_id, subfolder, class_name)
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of transformers, tokenizers, sentencepiece or json
        raise CheckpointError(f"{folder} does not load as a {class_name}: {_first_line(error)}") from error


def save_text_encoder(encoder: Any, folder: str | os.PathLike[str], *, variant: str | None = None) -> None:
    """Write config and safetensors weights, beside and renamed; other variants that lie there are kept."""
    names = _save(encoder, folder, variant=variant)
    _remove_stale(Path(folder), _Files.weights_name, variant, keep=names)


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write the tokenizer's files, beside and renamed."""
    _save(tokenizer, folder)


def tokenize(tokenizer: Any, prompts: list[str], max_length: int, name: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts, int64 [B, max_length] each, padded on the right by the tokenizer's own pad.

    Longer prompts are cut before their end token, with a warning that begins with `name` and shows what is lost.
    """
    # transformers' own note on long texts would say less
    for ids in tokenizer(prompts, verbose=False)["input_ids"]:
        if len(ids) > max_length:
            lost = tokenizer.decode(ids[max_length - 1 : -1])
            found = f"the prompt has {len(ids)} tokens, but the limit is {max_length}"
            warnings.warn(f"{name}: {found}; lost at its end: '{lost}'", stacklevel=3)
    tokens = tokenizer(prompts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def distinct(prompts: list[str]) -> tuple[list[str], Tensor]:
    """Each different prompt once, and int64 [B]: the place of every prompt among them."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    return list(places), torch.tensor([places[prompt] for prompt in prompts])


def _from_transformers(
    path: str | os.PathLike[str], subfolder: str, class_name: str, known: Iterable[str]
) -> tuple[Any, int]:
    """The class, and transformers' major version."""
    if class_name not in known:
        raise CheckpointError(f"{subfolder} of '{path}': expected one of {', '.join(known)}, got {class_name}")
    transformers = _import("transformers", path, subfolder, class_name)
    return getattr(transformers, class_name), int(transformers.__version__.split(".")[0])


def _import(module: str, path: str | os.PathLike[str], subfolder: str, class_name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        needs = f"{subfolder} of '{path}' is a {class_name}, which needs {module}"
        raise ImportError(f"{needs}: pip install 'kolors-fast[text]'") from error


def _save(component: Any, folder: str | os.PathLike[str], **options: Any) -> list[str]:
    """Names of the files that transformers' `save_pretrained` has written."""
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"cannot save into '{target}': it is a file, not a folder")
    scratch = (target if target.exists() else target.parent) / f".{target.name}.{secrets.token_hex(4)}.tmp"
    scratch.mkdir(parents=True)
    try:
        component.save_pretrained(scratch, **options)
        names = sorted(path.name for path in scratch.iterdir())
        _move_into_place(scratch, target, names)
        return names
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
