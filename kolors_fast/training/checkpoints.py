"""The checkpoints of a stage: a folder for each, written beside and renamed, the last two kept.

    <stage>/checkpoints/00000500/    .metadata, __0_0.distcp ...   tensors, by torch.distributed.checkpoint
                                     manifest.json                 numbers, settings, size and sha256 of every file

A folder that has its final name is whole: the manifest comes last, the name after it. What a disk has lost since is
found by sizes and sums, and the checkpoint before is taken. Every process writes what it holds, and any number of them
reads it again, sharded or not.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from kolors_fast.data.precompute import file_sha256

from .checkpoint import TrainingStateError
from .parallel import World

FOLDER, MANIFEST = "checkpoints", "manifest.json"
KEPT = 2

Tensors = Mapping[str, Mapping[str, Tensor]]  # part -> name -> tensor


@dataclass(frozen=True)
class Checkpoint:
    """A whole one on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def names(self, part: str) -> list[str]:
        """Of the tensors in a part."""
        known = _Reader(self.path).read_metadata().state_dict_metadata
        return [name.removeprefix(f"{part}.") for name in known if name.startswith(f"{part}.")]

    def load_into(self, tensors: Tensors, world: World) -> None:
        """Fill tensors, which may be sharded otherwise than those that were saved.

        Raises:
            TrainingStateError: a tensor is missing or has another shape.
        """
        flat = {f"{part}.{name}": tensor for part, named in tensors.items() for name, tensor in named.items()}
        try:
            with _quiet():
                dcp.load(flat, storage_reader=_Reader(self.path), no_dist=world.size == 1)
        except (CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
            raise TrainingStateError(f"{self.path} does not fit: {_first_line(error)}") from error


def save(folder: Path, tensors: Tensors, manifest: dict[str, Any], world: World) -> Path:
    """Write the checkpoint of `manifest["step"]`; all processes do, each its part.

    Raises:
        OSError: a process could not write; what was there before is as it was.
    """
    folder = folder / FOLDER
    final = folder / f"{manifest['step']:08d}"
    scratch = folder / f".{final.name}.tmp"
    if world.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    world.wait()
    flat = {f"{part}.{name}": tensor for part, named in tensors.items() for name, tensor in named.items()}
    try:
        with _quiet():
            dcp.save(flat, storage_writer=FileSystemWriter(scratch), no_dist=world.size == 1)
    except (CheckpointException, RuntimeError, OSError) as error:
        if world.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"{final} was not written: {_first_line(error)}") from error
    mine = [path for path in sorted(scratch.iterdir()) if path.name.startswith(f"__{world.rank}_")]
    mine += [scratch / ".metadata"] if world.is_main else []
    files = {name: found for part in world.gather_objects(_sums(mine)) for name, found in part.items()}
    if world.is_main:
        try:
            _write_manifest(scratch / MANIFEST, {**manifest, "files": files})
            if final.exists():
                shutil.rmtree(final)
            os.replace(scratch, final)
            _sync(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for old in _numbered(folder)[:-KEPT]:
            shutil.rmtree(old)
    world.wait()
    return final


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a manifest gives them back."""
    return dict(json.loads(json.dumps(settings)))


def latest(folder: Path, world: World) -> Checkpoint | None:
    """The newest whole checkpoint, or None where there is none; each newer one that is broken is told in a warning.

    Raises:
        TrainingStateError: there are some, and all are broken.
    """
    found = [_find(folder / FOLDER)] if world.is_main else [None]
    choice = world.broadcast_object(found[0])
    if isinstance(choice, TrainingStateError):
        raise choice
    return choice


def _find(folder: Path) -> Checkpoint | TrainingStateError | None:
    broken = []
    for path in reversed(_numbered(folder)):
        try:
            return Checkpoint(path, _read_manifest(path))
        except TrainingStateError as error:
            broken.append(str(error))
            warnings.warn(f"{error}; taking the checkpoint before it", stacklevel=2)
    return TrainingStateError(broken[0]) if broken else None


def _numbered(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what it says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, list[Any]] = manifest["files"]
        int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingStateError(f"{path} is not a readable training checkpoint: {_first_line(error)}") from error
    for name, (size, digest) in files.items():
        file = path / name
        length = file.stat().st_size if file.is_file() else 0
        if length != size:
            raise TrainingStateError(f"{path} is broken: {name} has {length} bytes, expected {size}")
        if file_sha256(file) != digest:
            raise TrainingStateError(f"{path} is broken: {name} has another checksum than it was written with")
    return dict(manifest)


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sums(paths: list[Path]) -> dict[str, tuple[int, str]]:
    return {path.name: (path.stat().st_size, file_sha256(path)) for path in paths}


def _sync(folder: Path) -> None:
    """Let the rename be on disk before older checkpoints are deleted."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    """What happened: of errors of several processes, the first one's."""
    if isinstance(error, CheckpointException) and error.failures:
        failure: Any = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch warns that one process is one process, although it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Reader(FileSystemReader):
    """torch's, but for the pickled table of tensors, in which nothing but torch's own descriptions is looked up."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata = _Unpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise TrainingStateError(f"{self.path} is not a readable checkpoint: {_first_line(error)}") from error
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch", "device"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        of_torch = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module in self._MODULES or (module, name) in self._NAMES or of_torch:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
