"""Pictures with captions and metadata, from folders, tar shards (as of WebDataset) or Parquet shards.

Whatever the source, the fields `caption` (the original one) and `synthetic_caption` (a model's) are captions, of which
a sample needs one; all other fields are metadata. Samples come in an order that depends on names alone.
"""

from __future__ import annotations

import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from .pictures import PictureError, open_picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # of pictures
TARS = (".tar", ".tar.gz", ".tgz")
_LISTS = ("metadata.jsonl", "metadata.parquet")
_BROKEN = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)
_ROWS = 64  # of a Parquet file in memory


@dataclass(frozen=True)
class Sample:
    """A picture that is not yet read, with what is said of it."""

    key: str  # its name within the source
    caption: str | None
    synthetic_caption: str | None
    metadata: dict[str, Any]
    read: Callable[[], bytes]  # the picture's file

    def picture(self) -> Image.Image:
        """The picture as `open_picture` gives it; to be asked for before the next sample is taken from the source.

        Raises:
            PictureError: it cannot be read or used.
        """
        try:
            data = self.read()
        except _BROKEN as error:
            raise PictureError(f"not readable: {error}") from error
        return open_picture(data)


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used, and why."""

    key: str
    reason: str


Source = Iterator[Sample | Skipped]


def read_source(path: str | os.PathLike[str]) -> Source:
    """All samples of a source; broken ones, and what is left of a broken file, come as `Skipped`.

    - a folder with metadata.jsonl or metadata.parquet: one picture a row, whose `file_name` is relative to the folder;
    - a .tar file (or .tar.gz), or a folder of them: files that follow each other and share their name up to the first
      dot are one sample: a picture, .json with fields, .txt with a caption;
    - a .parquet file, or a folder of them: one picture a row, its file in the column `image` (bytes, or a struct with
      `bytes` as of Hugging Face's datasets), optionally named by the column `key`;
    - any other folder: its pictures, at any depth, each with .json (fields) and .txt (a caption) of its name beside.

    Raises:
        ValueError: there is nothing of the kind.
        ImportError: pyarrow is needed and not installed.
    """
    root = Path(path)
    for name in _LISTS:
        if (root / name).is_file():
            return _listed(root, name)
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.is_file() and not file.name.startswith("."))
    else:
        files, root = [root] * root.is_file(), root.parent
    for kind, suffixes in ((_tar, TARS), (_parquet, (".parquet",)), (_picture, SUFFIXES)):
        chosen = [file for file in files if file.name.lower().endswith(suffixes)]
        if chosen:
            return (sample for file in chosen for sample in kind(file, file.relative_to(root).as_posix()))
    raise ValueError(
        f"data: expected pictures ({', '.join(SUFFIXES)}), .tar or .parquet files, or a folder with any of them or "
        f"with {' or '.join(_LISTS)}, got '{path}'"
    )


def _sample(key: str, fields: dict[str, Any], read: Callable[[], bytes]) -> Sample | Skipped:
    captions = [fields.pop(name, None) for name in ("caption", "synthetic_caption")]
    for name, text in zip(("caption", "synthetic_caption"), captions, strict=True):
        if not isinstance(text, str | None):
            return Skipped(key, f"{name}: expected a string, got a {type(text).__name__}")
    original, synthetic = (text.strip() or None if text else None for text in captions)
    if original is None and synthetic is None:
        return Skipped(key, "no caption")
    return Sample(key, original, synthetic, fields, read)


def _fields(described: bytes | None, caption: bytes | None) -> dict[str, Any]:
    """The fields of a JSON object, and a text as their `caption` where they have none.

    Raises:
        ValueError: no JSON object, or no UTF-8.
    """
    fields = {} if described is None else json.loads(described)
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got a {type(fields).__name__}")
    return fields if caption is None else {"caption": caption.decode(), **fields}


def _picture(path: Path, name: str) -> Source:
    texts = [path.with_suffix(suffix) for suffix in (".json", ".txt")]
    try:
        fields = _fields(*(text.read_bytes() if text.is_file() else None for text in texts))
    except (OSError, ValueError) as error:
        yield Skipped(name, f"metadata: {error}")
    else:
        yield _sample(name, fields, path.read_bytes)


def _listed(root: Path, name: str) -> Source:
    rows = _parquet_rows(root / name) if name.endswith(".parquet") else _json_rows(root / name)
    for number, row in rows:
        if isinstance(row, str):
            yield Skipped(f"{name}:{number}", row)
        elif not isinstance(row.get("file_name"), str):
            yield Skipped(f"{name}:{number}", f"file_name: expected a string, got {row.get('file_name')!r}")
        else:
            file = row.pop("file_name")
            yield _sample(file, row, (root / file).read_bytes)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Number and fields of each line, or what is wrong with it."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, _fields(line, None)
                except ValueError as error:
                    yield number, f"metadata: {error}"


def _parquet(path: Path, name: str) -> Source:
    for number, row in _parquet_rows(path):
        if isinstance(row, str):
            yield Skipped(f"{name}/{number}", row)
            continue
        key = f"{name}/{row.pop('key', number)}"
        image = row.pop("image", None)
        data = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(data, bytes):
            yield _sample(key, row, lambda data=data: data)  # type: ignore[misc]
        else:
            yield Skipped(key, "no picture in the column 'image'")


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Number and fields of each row, or what is wrong with the file from there on."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path} is a Parquet file, which needs pyarrow: pip install 'kolors-fast[data]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        yield number, f"not readable from here on: {_first_line(error)}"


def _tar(path: Path, name: str) -> Source:
    stem = ""  # of the sample that is being gathered
    members: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                file = PurePosixPath(member.name)
                first, _, suffix = file.name.partition(".")
                if (here := (file.parent / first).as_posix()) != stem:
                    if members:
                        yield _of_members(archive, f"{name}/{stem}", members)
                    stem, members = here, {}
                members[f".{suffix.lower()}"] = member
            if members:
                yield _of_members(archive, f"{name}/{stem}", members)
    except _BROKEN as error:
        yield Skipped(f"{name}/{stem}" if stem else name, f"not readable from here on: {_first_line(error)}")


def _of_members(archive: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> Sample | Skipped:
    def content(suffix: str) -> bytes | None:
        file = archive.extractfile(members[suffix]) if suffix in members else None
        return None if file is None else file.read()

    pictures = [suffix for suffix in SUFFIXES if suffix in members]
    if not pictures:
        return Skipped(key, f"no picture among {', '.join(sorted(members))}")
    try:
        fields = _fields(content(".json"), content(".txt"))
    except ValueError as error:
        return Skipped(key, f"metadata: {error}")
    return _sample(key, fields, lambda: content(pictures[0]) or b"")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
