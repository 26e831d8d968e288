"""Which samples to keep, by their metadata.

A filter is a table of fields, each with one or several conditions that must all hold:

    quality = {min = 4}              # a number, at least; Kolors' levels are 1 (unsafe) to 5 (of high aesthetics)
    width = {min = 512, max = 8192}  # width and height are the picture's own, turned upright
    language = {in = ["zh", "en"]}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OF_PICTURES = ("width", "height")  # fields that are measured, whatever the metadata say


class Filter:
    """Conditions by field, as in the module's docstring; an empty table keeps everything.

    Raises:
        ValueError: a field that is no table, an unknown condition, or a bound of the wrong type.
    """

    def __init__(self, table: Mapping[str, Any]) -> None:
        for field, conditions in table.items():
            if not isinstance(conditions, Mapping) or not conditions:
                raise ValueError(f"filter: {field}: expected a table such as {{min = 4}}, got {conditions!r}")
            for name, bound in conditions.items():
                if name not in ("min", "max", "in"):
                    raise ValueError(f"filter: {field}: expected min, max or in, got '{name}'")
                if name == "in" and not isinstance(bound, list):
                    raise ValueError(f"filter: {field}: in: expected a list, got {bound!r}")
                if name != "in" and not _is_number(bound):
                    raise ValueError(f"filter: {field}: {name}: expected a number, got {bound!r}")
        self.table = {field: dict(conditions) for field, conditions in table.items()}

    @classmethod
    def load(cls, path: str | Path) -> Filter:
        """Read a .toml or .json file.

        Raises:
            ValueError: the file is neither, or says something that no filter may.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except ValueError as error:  # of either format, or of UTF-8
            raise ValueError(f"filter {path}: expected TOML, or JSON in a .json file: {error}") from error
        if not isinstance(table, dict):
            raise ValueError(f"filter {path}: expected a table of fields, got a {type(table).__name__}")
        return cls(table)

    def split(self) -> tuple[Filter, Filter]:
        """The conditions on metadata, and those on the picture, which must be opened for them."""
        of_pictures = {field: table for field, table in self.table.items() if field in OF_PICTURES}
        return Filter({field: t for field, t in self.table.items() if field not in OF_PICTURES}), Filter(of_pictures)

    def refusal(self, metadata: Mapping[str, Any]) -> str | None:
        """Why a sample is dropped, in words that many samples share; None keeps it."""
        for field, conditions in self.table.items():
            value = metadata.get(field)
            if value is None:
                return f"{field} missing"
            for name, bound in conditions.items():
                if name != "in" and not _is_number(value):
                    return f"{field} no number"
                if name == "in" and value not in bound:
                    return f"{field} not in the list"
                # written so that NaN fails both
                if (name == "min" and not value >= bound) or (name == "max" and not value <= bound):
                    return f"{field} {'below' if name == 'min' else 'above'} {bound}"
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
