"""Pictures on the disk: whole or not there, and each with the parameters it was drawn with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ... import __version__

KEY = "kolors_fast"  # of the PNG text chunk
_END = b"\0\0\0\0IEND\xaeB\x60\x82"  # the last chunk of every whole PNG


def save(image: Image.Image, path: Path, parameters: dict[str, Any]) -> None:
    """Write beside, then rename.

    Raises:
        ValueError: another file or folder is in the way of this one.
        OSError: nothing can be written, as to a full disk; names the file.
    """
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(parameters, ensure_ascii=False))
    info.add_text("Software", f"kolors_fast {__version__}")
    beside = path.with_name(f".{path.stem}.part.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as file:
                image.save(file, "PNG", pnginfo=info)
                file.flush()
                os.fsync(file.fileno())  # some filesystems tell only here that they are full
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def recorded(path: Path) -> dict[str, Any] | None:
    """The parameters that a picture was drawn with; None where the file is no whole picture written by `save`."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            if file.read() != _END:
                return None
            file.seek(0)
            with Image.open(file, formats=["PNG"]) as image:
                parameters = json.loads(image.info[KEY])
    except (OSError, KeyError, TypeError, ValueError, SyntaxError):
        return None
    return parameters if isinstance(parameters, dict) else None


def difference(path: Path, parameters: dict[str, Any]) -> str | None:
    """How the picture that is there differs from the one asked for; None where it does not."""
    there = recorded(path)
    if there is None:
        return "is no whole picture drawn by this command"
    names = [name for name in there | parameters if there.get(name) != parameters.get(name)]
    told = ", ".join(f"{name} {there.get(name)!r:.40} and not {parameters.get(name)!r:.40}" for name in names)
    return f"was drawn with {told}" if names else None
