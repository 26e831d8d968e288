"""How often a model draws what it was asked: held-out prompts of the shapes world, judged by its oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from kolors_fast.data.shapes import HeldOutPrompt, Verdict, judge
from kolors_fast.data.shapes.captions import LANGUAGES
from kolors_fast.data.shapes.split import CATEGORIES

from .statistics import Share, gather_over_workers

Generate = Callable[[list[str], int], Sequence[Image.Image]]


@dataclass(frozen=True)
class Judged:
    """One prompt, the picture drawn for it, and the oracle's verdict."""

    asked: HeldOutPrompt
    picture: Image.Image | None  # None: another worker drew it
    verdict: Verdict


@dataclass(frozen=True)
class Report:
    """Every judged prompt; `str(report)` is the table of right over asked, per category and language."""

    judged: tuple[Judged, ...]

    def count(self, category: str | None = None, language: str | None = None) -> tuple[int, int]:
        """(right, asked) among the prompts of a category and a language; None means any."""
        chosen = [
            one.verdict.correct
            for one in self.judged
            if category in (None, one.asked.category) and language in (None, one.asked.language)
        ]
        return sum(chosen), len(chosen)

    @property
    def accuracy(self) -> float:
        """Share of the prompts drawn right, 0 to 1."""
        right, asked = self.count()
        return right / asked

    @property
    def wrong(self) -> tuple[Judged, ...]:
        return tuple(one for one in self.judged if not one.verdict.correct)

    def __str__(self) -> str:
        columns: tuple[str | None, ...] = (*LANGUAGES, None)
        lines = [f"{'':<14}" + "".join(f"{column or 'all':>20}" for column in columns)]
        for category in (*CATEGORIES, None):
            cells = (_share(*self.count(category, column)) for column in columns)
            lines.append(f"{category or 'all':<14}" + "".join(f"{cell:>20}" for cell in cells))
        for part in ("objects_ok", "colours_ok", "relation_ok"):
            right = sum(getattr(one.verdict, part) for one in self.judged)
            name = f"{part.removesuffix('_ok')} alone"
            lines.append(f"{name:<54}{_share(right, len(self.judged)):>20}")
        return "\n".join(lines)


def evaluate(
    generate: Generate,
    prompts: Sequence[HeldOutPrompt],
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    share: Share | None = None,
) -> Report:
    """Draws every prompt and judges the pictures.

    `generate(prompts, seed)` returns one picture per prompt; it is called with up to `batch_size` prompts at
    a time and with `seed`, `seed + 1`, ... for the successive batches.

    Args:
        share: takes this worker's batches of all; then every worker calls this, and each gets the whole report.
    """
    if not prompts:
        raise ValueError("prompts must not be empty")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    pictures: dict[int, Image.Image] = {}  # by the prompt's number
    verdicts: dict[int, Verdict] = {}
    starts = list((share or iter)(enumerate(range(0, len(prompts), batch_size))))
    for number, start in tqdm(starts, desc="evaluate", disable=not progress):
        batch = prompts[start : start + batch_size]
        drawn = generate([one.prompt for one in batch], seed + number)
        if len(drawn) != len(batch):
            raise ValueError(f"generate must return {len(batch)} pictures, got {len(drawn)}")
        for index, (asked, picture) in enumerate(zip(batch, drawn, strict=True), start):
            pictures[index] = picture.convert("RGB")
            verdicts[index] = judge(np.asarray(pictures[index]), asked.request)
    if share is not None:
        verdicts = {index: one for part in gather_over_workers(verdicts) for index, one in part.items()}
    judged = (Judged(asked, pictures.get(index), verdicts[index]) for index, asked in enumerate(prompts))
    return Report(tuple(judged))


def grid(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """The images in rows of `columns` on white, `gap` pixels apart, each in the middle of an equal cell."""
    if not images:
        raise ValueError("images must not be empty")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        left = column * (width + gap) + (width - image.width) // 2
        top = row * (height + gap) + (height - image.height) // 2
        sheet.paste(image.convert("RGB"), (left, top))
    return sheet


def _share(right: int, asked: int) -> str:
    return f"{right}/{asked} {100 * right / asked:5.1f} %" if asked else "-"
