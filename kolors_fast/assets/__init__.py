"""Model folders that ship with the library."""

from __future__ import annotations

from pathlib import Path

BUNDLED = ("kolors-tiny", "sd3-tiny", "pixart-tiny")


def bundled(name: str) -> Path:
    """The folder of a bundled model.

    Raises:
        ValueError: no model of that name is bundled.
    """
    if name not in BUNDLED:
        raise ValueError(f"bundled: name: expected one of {', '.join(BUNDLED)}, got {name!r}")
    return Path(__file__).parent / name
