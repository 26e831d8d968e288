"""Model folders in diffusers' layout: a JSON config beside safetensors (or .bin) weights, single or sharded.

Every model of this package derives from `PretrainedModel`, which loads and saves such folders. Nothing is
ever unpickled freely: .bin files go through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import secrets
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# the folder layout written here is the one diffusers has used since this version
_LAYOUT_VERSION = "0.30.0"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

ModelT = TypeVar("ModelT", bound="PretrainedModel")


class CheckpointError(OSError):
    """A model folder or one of its files is missing, broken, or made for another model."""


class Config(dict[str, Any]):
    """A model's configuration: a dict whose values are attributes too (`config.in_channels`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no value named '{name}'") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class PretrainedModel(nn.Module):
    """A module that carries its config and loads and saves folders in diffusers' layout.

    A subclass takes its config values as keyword arguments and records them with `register_config`. While
    loading, the module is built on the meta device, so a table that is not part of the state dict must be
    created with `device="cpu"`, or on first use.
    """

    config_name: ClassVar[str] = "config.json"
    weights_name: ClassVar[str] = "diffusion_pytorch_model.safetensors"
    bin_weights_name: ClassVar[str] = "diffusion_pytorch_model.bin"
    # the name of this class in diffusers' config files; None: our own class name
    diffusers_name: ClassVar[str | None] = None
    # further names under which released config files know this model
    _other_names: ClassVar[tuple[str, ...]] = ()
    # state-dict entries (or whole modules) of released files that this model has no use for
    _unused_keys: ClassVar[tuple[str, ...]] = ()

    config: Config

    def register_config(self, **values: Any) -> None:
        """Record config values; called by the constructor of a subclass, and again to change some of them."""
        config = self.__dict__.setdefault("config", Config())
        config.update(values)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the first floating-point parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @classmethod
    def load_config(cls, path_or_id: str | os.PathLike[str], *, subfolder: str | None = None) -> Config:
        """Read and check the config file of a model folder or hub repository."""
        folder = model_folder(path_or_id, subfolder, [cls.config_name])
        config = Config(read_json(folder / cls.config_name))
        cls._check_class(config, folder / cls.config_name)
        return config

    @classmethod
    def from_config(cls: type[ModelT], config: Mapping[str, Any], **overrides: Any) -> ModelT:
        """Build a freshly initialised model from config values; unknown names are dropped with a warning."""
        values = {**config, **overrides}
        parameters = inspect.signature(cls.__init__).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            unknown = [k for k in values if k not in parameters and not k.startswith("_")]
            if unknown:
                warnings.warn(f"{cls.__name__} has no use for the config values {_some(unknown)}", stacklevel=2)
            values = {k: v for k, v in values.items() if k in parameters}
        return cls(**{k: v for k, v in values.items() if not k.startswith("_")})

    @classmethod
    def empty(cls: type[ModelT], config: Mapping[str, Any], torch_dtype: torch.dtype | None = None) -> ModelT:
        """A model in eval mode whose weights are on the meta device: shapes and dtypes without memory."""
        with torch.device("meta"):
            model = cls.from_config(config)
        dtype = torch_dtype or torch.float32
        # not model.to, which would cast tables outside the state dict, too
        model._apply(lambda value: value.to(dtype) if value.is_meta and value.is_floating_point() else value)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls: type[ModelT],
        path_or_id: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        device: torch.device | str | None = None,
    ) -> ModelT:
        """Load a model, in eval mode, from a folder or a Hugging Face Hub id.

        Args:
            path_or_id: folder, or "owner/name" of a hub repository (only when no such folder exists).
            subfolder: folder inside it, such as "unet".
            torch_dtype: dtype of the floating-point weights; None is float32, as in diffusers.
            variant: middle part of the weight files' names, such as "fp16" in `...model.fp16.safetensors`.
            device: where the weights go, see `load_weights`.

        Raises:
            CheckpointError: a file is missing, truncated, of another class, or has other keys or shapes.
        """
        model = cls.empty(cls.load_config(path_or_id, subfolder=subfolder), torch_dtype)
        model.load_weights(path_or_id, subfolder=subfolder, variant=variant, device=device)
        return model

    def load_weights(
        self,
        path_or_id: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Fill the model from its files, keeping its dtypes.

        The files are mapped, and each tensor goes from there to the device by itself, cast on the way: the host holds
        one tensor at a time. On a CPU a tensor that needs no cast stays in the mapped file, and is read at first use.

        Args:
            device: None is the CPU. The others as in `from_pretrained`.
        """
        folder, files = _find_weights(type(self), path_or_id, subfolder, variant)
        stored = self._convert_state_dict(_read_weights(files))
        wanted = self._stored_state()
        stored = {k: v for k, v in stored.items() if k in wanted or not self._is_unused(k)}
        _check_state(stored, wanted, type(self).__name__, folder)
        device = torch.device(device or "cpu")
        state: dict[str, Tensor] = {}
        for key in list(stored):  # taken out, so that a file is unmapped as soon as it has been read
            state.update(self._load_tensor(key, stored.pop(key), wanted[key].dtype, device))
        self.load_state_dict(state, assign=True)
        _check_tables(self)
        self.to(device)  # tables that no file holds

    def release_weights(self) -> None:
        """Drop the weights, leaving their shapes and dtypes, until the next `load_weights`."""
        self.load_state_dict({key: value.to("meta") for key, value in self.state_dict().items()}, assign=True)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write config and safetensors weights, beside and renamed, so that no reader sees half a file.

        Args:
            folder: created if missing; other variants of the weights that lie there are kept.
            variant: middle part of the weight files' names.
            max_shard_size: bytes, or text such as "5GB"; larger weights are split, with an index file.
        """
        target = Path(folder)
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"cannot save into '{target}': it is a file, not a folder")
        # inside an existing folder, which may be a link or a mount, so that renaming stays on one file system
        scratch = (target if target.exists() else target.parent) / f".{target.name}.{secrets.token_hex(4)}.tmp"
        scratch.mkdir(parents=True)
        try:
            (scratch / self.config_name).write_text(
                json.dumps(self._config_to_save(), indent=2, sort_keys=True, ensure_ascii=False) + "\n",
                encoding="utf-8",
            )
            names = _write_weights(self.state_dict(), scratch, self.weights_name, variant, _bytes(max_shard_size))
            _move_into_place(scratch, target, [*names, self.config_name])
            _remove_stale(target, self.weights_name, variant, keep=names)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hook: map the keys of older files to today's names."""
        return state

    def _stored_state(self) -> dict[str, Tensor]:
        """Hook: keys, shapes and dtypes of the tensors that a file must hold."""
        return self.state_dict()

    def _load_tensor(self, key: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Hook: state-dict entries on the device from a tensor of the file; `dtype` is that of `_stored_state`."""
        return {key: value.to(device, dtype if value.is_floating_point() else value.dtype)}

    def _config_to_save(self) -> dict[str, Any]:
        """Hook: the content of the config file."""
        name = self.diffusers_name or type(self).__name__
        return {**self.config, "_class_name": name, "_diffusers_version": _LAYOUT_VERSION}

    def _is_unused(self, key: str) -> bool:
        return any(key == unused or key.startswith(f"{unused}.") for unused in self._unused_keys)

    @classmethod
    def _check_class(cls, config: Mapping[str, Any], path: Path) -> None:
        named = config.get("_class_name") or config.get("architectures")
        names = [named] if isinstance(named, str) else list(named or [])
        if names and not {cls.__name__, cls.diffusers_name, *cls._other_names}.intersection(names):
            expected = cls.diffusers_name or cls.__name__
            raise CheckpointError(f"{path} describes a {names[0]}, but {cls.__name__} needs the config of a {expected}")


def model_folder(path_or_id: str | os.PathLike[str], subfolder: str | None, patterns: Iterable[str]) -> Path:
    """The local folder of a model: the path, or the cache of files fetched from the hub by `patterns`."""
    root = Path(path_or_id)
    if root.is_dir():
        folder = root / (subfolder or "")
        if not folder.is_dir():
            raise CheckpointError(f"the model folder '{root}' has no subfolder '{subfolder}'")
        return folder
    name = str(path_or_id)
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"no model folder '{name}' exists, and that is not a hub id of the form owner/name")
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(name, allow_patterns=[prefix + pattern for pattern in patterns])
    except Exception as error:  # the hub client raises errors of several libraries, none of them ours
        reason = type(error).__name__
        raise CheckpointError(
            f"'{name}' is no folder here and could not be fetched from the Hugging Face Hub ({reason})"
        ) from error
    return Path(found) / (subfolder or "")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise a CheckpointError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"the file {path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def write_file(path: Path, content: bytes) -> None:
    """Write a file beside and rename it, so that no reader ever sees half of it."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _with_variant(name: str, variant: str | None) -> str:
    stem, extension = name.rsplit(".", 1)
    return f"{stem}.{variant}.{extension}" if variant else name


def _index_names(weights_name: str, variant: str | None) -> list[str]:
    """Names an index may have: today's in diffusers and transformers, then diffusers' older one."""
    names = [_with_variant(f"{weights_name}.index.json", variant)]
    return [*names, f"{weights_name}.{variant}.index.json"] if variant else names


def _weight_patterns(weights_name: str, variant: str | None) -> list[str]:
    stem, extension = weights_name.rsplit(".", 1)
    middle = f".{variant}" if variant else ""
    shards = [f"{stem}{middle}-?????-of-?????.{extension}", f"{stem}-?????-of-?????{middle}.{extension}"]
    return [_with_variant(weights_name, variant), *_index_names(weights_name, variant), *shards]


def _find_weights(
    cls: type[PretrainedModel], path_or_id: str | os.PathLike[str], subfolder: str | None, variant: str | None
) -> tuple[Path, list[Path]]:
    """The model's folder and weight files: safetensors before .bin, an index before a single file."""
    for name in (cls.weights_name, cls.bin_weights_name):
        folder = model_folder(path_or_id, subfolder, [cls.config_name, *_weight_patterns(name, variant)])
        for index in _index_names(name, variant):
            if (folder / index).is_file():
                return folder, _shards(folder / index)
        single = folder / _with_variant(name, variant)
        if single.is_file():
            return folder, [single]
    expected = _with_variant(cls.weights_name, variant)
    raise CheckpointError(f"{folder} has no weights: expected {expected}, its index.json with shards, or a .bin file")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from keys to file names")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != index.parent or file.name == "..":
            raise CheckpointError(f"{index} names the shard '{file}', which lies outside its folder")
        if not file.is_file():
            raise CheckpointError(f"the shard {file} is missing, although {index.name} names it")
    return files


def _read_weights(files: list[Path]) -> dict[str, Tensor]:
    """Tensors of all files; they are mapped from disk, so nothing is read before it is used."""
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(_read_safetensors(file) if file.suffix == ".safetensors" else _read_bin(file))
    return state


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as content:
            return {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error


def _read_bin(file: Path) -> dict[str, Tensor]:
    content = load_plain(file)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file} must hold a dict of tensors")
    return dict(content)


def load_plain(file: Path) -> Any:
    """Content of a file that torch.save wrote, mapped where it can be; no object but plain ones is made."""
    if not file.is_file():
        raise CheckpointError(f"the file {file} is missing")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except Exception as error:  # torch.load raises whatever its zip and pickle readers stumble over
        first_line = str(error).split("\n", 1)[0]
        raise CheckpointError(f"{file} is truncated or not a file of plain tensors: {first_line}") from error


def _check_state(state: dict[str, Tensor], wanted: dict[str, Tensor], name: str, folder: Path) -> None:
    missing = [key for key in wanted if key not in state]
    if missing:
        raise CheckpointError(f"the weights in {folder} lack {_some(missing)}, which {name} needs")
    unexpected = [key for key in state if key not in wanted]
    if unexpected:
        raise CheckpointError(f"the weights in {folder} hold {_some(unexpected)}, unknown to {name}")
    wrong = [
        f"{key} (expected {tuple(wanted[key].shape)}, got {tuple(value.shape)})"
        for key, value in state.items()
        if value.shape != wanted[key].shape
    ]
    if wrong:
        raise CheckpointError(f"the weights in {folder} do not fit the config of {name}: {_some(wrong, quote='')}")


def _check_tables(model: nn.Module) -> None:
    """No file holds the tables outside the state dict."""
    held = model.state_dict()
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in held]
    if left:
        raise RuntimeError(f"{type(model).__name__} must create {_some(left)} with device='cpu': no file holds it")


def _some(names: list[str], quote: str = "'") -> str:
    shown = ", ".join(f"{quote}{name}{quote}" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size.strip())
    if not match:
        raise ValueError(f"max_shard_size must be bytes or text such as '5GB', got '{size}'")
    return int(float(match[1]) * _SIZE_UNITS[match[2].upper()])


def _split(state: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Keys in order, a new shard whenever the next tensor would pass the limit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, value in state.items():
        if shards[-1] and filled + value.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += value.nbytes
    return shards


def _write_weights(
    state: dict[str, Tensor], folder: Path, weights_name: str, variant: str | None, limit: int
) -> list[str]:
    """Write the files and return their names in the order in which they may become visible."""
    shards = _split(state, limit)
    name = _with_variant(weights_name, variant)
    stem, extension = name.rsplit(".", 1)
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{extension}" for i in range(len(shards))]
    if len(shards) == 1:
        names = [name]
    for file, keys in zip(names, shards, strict=True):
        tensors = {key: state[key].detach().cpu().contiguous() for key in keys}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) == 1:
        return names
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in state.values())},
        "weight_map": {key: file for file, keys in zip(names, shards, strict=True) for key in keys},
    }
    index_name = _index_names(weights_name, variant)[0]
    (folder / index_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*names, index_name]


def _move_into_place(scratch: Path, target: Path, names: list[str]) -> None:
    if not target.exists():
        os.replace(scratch, target)
        return
    for name in names:
        os.replace(scratch / name, target / name)


def _remove_stale(folder: Path, weights_name: str, variant: str | None, keep: list[str]) -> None:
    """Remove what an earlier save of the same variant left, the index first: it is what a reader follows."""
    patterns = _weight_patterns(weights_name, variant)
    indices = _index_names(weights_name, variant)
    for pattern in [*indices, *patterns]:
        for file in folder.glob(pattern):
            if file.name not in keep:
                file.unlink(missing_ok=True)
