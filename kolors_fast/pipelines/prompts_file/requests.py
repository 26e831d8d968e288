"""The lines of a prompts file: pictures to draw, or the reasons why not."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import check_size, expect, whole

KEYS = ("prompt", "negative_prompt", "seed", "guidance_scale", "height", "width", "steps", "output")
MAX_NAME = 240  # bytes; filesystems take 255, and a name beside it is longer


class Defaults(NamedTuple):
    """What a line that does not say so is drawn with."""

    negative_prompt: str | None
    seeds: list[int]  # one picture each
    guidance_scale: float
    height: int
    width: int
    steps: int


@dataclass(frozen=True)
class Request:
    """One picture to draw."""

    line: int
    path: Path
    prompt: str
    negative_prompt: str | None
    seed: int
    guidance_scale: float
    height: int
    width: int
    steps: int

    @property
    def parameters(self) -> dict[str, Any]:
        """What makes the picture, wherever it stands."""
        return {name: value for name, value in asdict(self).items() if name not in ("line", "path")}


class Refusal(NamedTuple):
    """A line, or one seed of it, that cannot be drawn."""

    line: int
    reason: str


def read_requests(
    lines: Iterable[bytes], folder: Path, defaults: Defaults, factor: int, *, as_json: bool
) -> Iterator[Request | Refusal]:
    """What each line asks for, in order, as soon as the line is there.

    Args:
        lines: UTF-8. Text: one prompt a line; blank lines and those starting with # are skipped. JSON Lines: one object
            a line with a "prompt" and any of KEYS; blank lines are skipped.
        folder: of the pictures, an existing one; "output" is a name inside it, of this line alone. Without one the
            name is the line's number and the seed.
        factor: the autoencoder's, which sizes must be multiples of.

    Raises:
        ValueError: defaults that no picture can be drawn with.
    """
    for seed in defaults.seeds:
        _check({**defaults._asdict(), "prompt": "any", "seed": seed}, factor)
    taken: dict[Path, int] = {}  # by line
    for number, raw in enumerate(lines, start=1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield Refusal(number, f"expected UTF-8, got the byte {raw[error.start]:#x} at column {error.start + 1}")
            continue
        if not text or (text.startswith("#") and not as_json):
            continue
        try:
            given = _object(text) if as_json else {"prompt": text}
            seeds: list[Any] = [given["seed"]] if "seed" in given else defaults.seeds
        except ValueError as error:
            yield Refusal(number, str(error))
            continue
        for seed in seeds:
            try:
                yield _request(number, given | {"seed": seed}, folder, defaults, factor, taken)
            except ValueError as error:
                yield Refusal(number, str(error))


def _object(text: str) -> dict[str, Any]:
    """The keys and values of a line of JSON Lines."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON object, got {text!r:.80} ({error})") from None
    if not isinstance(given, dict):
        raise ValueError(f"expected a JSON object, got {text!r:.80}")
    for key in given:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            expected = f"did you mean {near[0]!r}?" if near else f"the known ones are {', '.join(KEYS)}"
            raise ValueError(f"unknown key {key!r:.80}: {expected}")
    return given


def _request(
    line: int, given: dict[str, Any], folder: Path, defaults: Defaults, factor: int, taken: dict[Path, int]
) -> Request:
    values: dict[str, Any] = {
        name: given.get(name, value) for name, value in defaults._asdict().items() if name != "seeds"
    }
    values |= {name: given[name] for name in ("prompt", "seed") if name in given}
    expect("prompt" in values, "prompt", "a text", "none")
    _check(values, factor)
    values["guidance_scale"] = float(values["guidance_scale"])
    path = _path(given.get("output", f"{line:06d}-{values['seed']}.png"), folder)
    own = path.resolve()
    expect(own not in taken, "output", "a name of its own", f"{path.name!r}, which line {taken.get(own)} has")
    taken[own] = line
    return Request(line=line, path=path, **values)


def _check(values: dict[str, Any], factor: int) -> None:
    prompt, negative, seed = values["prompt"], values["negative_prompt"], values["seed"]
    expect(_text(prompt) and bool(prompt.strip()), "prompt", "a text that is not empty", f"{prompt!r:.80}")
    expect(negative is None or _text(negative), "negative_prompt", "a text", f"{negative!r:.80}")
    expect(whole(seed) and -(2**63) <= seed < 2**64, "seed", "a whole number of 64 bits", f"{seed!r:.80}")
    scale, steps = values["guidance_scale"], values["steps"]
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    expect(number and math.isfinite(scale), "guidance_scale", "a finite number", f"{scale!r:.80}")
    expect(whole(steps) and steps >= 1, "steps", "a whole number from 1", f"{steps!r:.80}")
    check_size(values["height"], values["width"], factor)


def _text(value: Any) -> bool:
    """JSON can spell half of a UTF-16 pair, which is no character."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _path(output: Any, folder: Path) -> Path:
    png = _text(output) and "\0" not in output and output.lower().endswith(".png")
    expect(png, "output", "a name that ends in .png", f"{output!r:.80}")
    path, parts = folder / output, Path(output).parts
    inside = ".." not in parts and path.resolve().is_relative_to(folder.resolve())
    expect(inside, "output", f"a name inside {folder}", f"{output!r:.80}")
    longest = max(len(os.fsencode(part)) for part in parts)
    expect(longest <= MAX_NAME, "output", f"names of at most {MAX_NAME} bytes", f"{output!r:.80}")
    return path
