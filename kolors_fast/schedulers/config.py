"""Scheduler configuration: recorded from the constructor, read from and written to scheduler_config.json."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download

Self = TypeVar("Self", bound="Configured")
DEFAULTED = "_use_default_values"  # diffusers' key: names the constructor filled in itself
METADATA = ("_class_name", "_diffusers_version", DEFAULTED)


class Config(dict[str, Any]):
    """Configuration values, readable as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config has no key {name!r}; it has {sorted(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"config key {name!r} is read-only; build a new object with from_config(config, {name}=...)"
        )


def records_config(init: Callable[..., None]) -> Callable[..., None]:
    """Decorate `__init__` so that its arguments, defaults included, become `self.config`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Configured, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        values = {name: value for name, value in bound.arguments.items() if name != "self"}
        self.config = Config(values, **{DEFAULTED: [name for name in values if name not in given]})
        init(self, *args, **kwargs)

    return wrapped


class Configured:
    """An object described by its constructor arguments, in diffusers' file format."""

    config_name = "scheduler_config.json"
    config: Config

    @classmethod
    def from_config(cls: type[Self], config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from the `config` of this or of another scheduler class, or of a file.

        Keys of other classes are kept in `config` unused, so that switching to the other class finds them; values that
        were only the other class's defaults are dropped in favour of this class's. This is diffusers' behaviour.

        Raises ValueError for an override that this class does not take.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"config: expected a mapping of scheduler settings, got {type(config).__name__}")
        accepted = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for name in overrides:
            if name not in accepted:
                raise ValueError(f"{name}: expected one of {cls.__name__}'s keys {accepted}, got an unknown key")
        skipped = {*config.get(DEFAULTED, ()), *METADATA}
        values = {name: value for name, value in config.items() if name not in skipped} | overrides
        made = cls(**{name: value for name, value in values.items() if name in accepted})
        foreign = {name: value for name, value in values.items() if name not in accepted}
        version = {name: config[name] for name in ("_diffusers_version",) if name in config}
        made.config = Config({**made.config, **foreign, **version})
        return made

    @classmethod
    def from_pretrained(
        cls: type[Self], path_or_id: str | os.PathLike[str], *, subfolder: str | None = None, **overrides: Any
    ) -> Self:
        """Build from `scheduler_config.json` in a local folder or a Hub repository."""
        return cls.from_config(read_json(path_or_id, cls.config_name, subfolder), **overrides)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `scheduler_config.json` into `folder`, beside and then renamed."""
        target = Path(folder) / self.config_name
        target.parent.mkdir(parents=True, exist_ok=True)
        values = {"_class_name": type(self).__name__, **self.config}
        values.pop(DEFAULTED, None)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(partial, target)


def read_json(path_or_id: str | os.PathLike[str], name: str, subfolder: str | None = None) -> dict[str, Any]:
    """Read a JSON object from `[subfolder/]name` of a local folder or a Hub repository."""
    root = Path(path_or_id)
    if root.exists():
        path = root / (subfolder or "") / name
        if not path.is_file():
            raise OSError(f"path_or_id: expected a folder holding {subfolder or '.'}/{name}, got {str(path_or_id)!r}")
    else:
        try:
            path = Path(hf_hub_download(str(path_or_id), name, subfolder=subfolder))
        except Exception as error:  # the hub client raises errors of several libraries
            reason = type(error).__name__
            raise OSError(
                f"path_or_id: expected a folder or a reachable Hub repository, got {str(path_or_id)!r} ({reason})"
            ) from error
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path}: expected a JSON object, got unreadable text ({error})") from None
    if not isinstance(values, dict):
        raise OSError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
