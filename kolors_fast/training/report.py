"""One page of what a stage's training came to: its curves, the last pictures, and a table of the figures."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from kolors_fast.models.checkpoint import write_file

from .log import NAME

REPORT = "report.png"

# all lengths are pixels of the finished page
_WIDTH, _MARGIN, _GAP, _HEAD = 1240, 48, 44, 82
_COLUMN = (_WIDTH - 2 * _MARGIN - _GAP) // 2
_PLOT, _LINE, _LEFT = 230, 22, 64  # height of a plot, of a line of text; left of a plot are the numbers
_INK, _SOFT, _GRID = "#1f2328", "#6a7178", "#e6e8eb"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5539", "#5b5b5b", "#8338ec")
_LAST = ("learning rate", "seconds per step")  # of the plots
_SMOOTHED = 60  # points, from which on a curve is a running median over a twentieth of them


class Page:
    """A white page, drawn at twice its size so that lines and letters come out smooth."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (2 * width, 2 * height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, *, size: int = 14, colour: str = _INK, anchor: str = "la") -> None:
        self.draw.text((2 * x, 2 * y), text, fill=colour, font=ImageFont.load_default(2 * size), anchor=anchor)

    def line(self, xs: np.ndarray, ys: np.ndarray, colour: str, width: float = 1) -> None:
        points = [(2 * float(x), 2 * float(y)) for x, y in zip(xs, ys, strict=True)]
        self.draw.line(points, fill=colour, width=round(2 * width), joint="curve")

    def dot(self, x: float, y: float, colour: str, radius: float = 2.5) -> None:
        self.draw.ellipse([2 * (x - radius), 2 * (y - radius), 2 * (x + radius), 2 * (y + radius)], fill=colour)

    def paste(self, image: Image.Image, x: int, y: int) -> None:
        self.image.paste(image.resize((2 * image.width, 2 * image.height)), (2 * x, 2 * y))

    def png(self) -> bytes:
        content = io.BytesIO()
        self.image.reduce(2).save(content, "PNG", optimize=True)
        return content.getvalue()


@dataclass(frozen=True)
class Curve:
    """The values of a figure, finite or not, and the steps they are of."""

    steps: np.ndarray
    values: np.ndarray

    def finite(self) -> Curve:
        kept = np.isfinite(self.values)
        return Curve(self.steps[kept], self.values[kept])

    def smoothed(self) -> Curve:
        """The median of each value and its neighbours, as many on both sides, which keeps what only rises or falls;
        few values as they are."""
        count = len(self.values)
        if count < _SMOOTHED:
            return self
        reach = [min(i, count - 1 - i, count // 40) for i in range(count)]
        medians = [np.median(self.values[i - r : i + r + 1]) for i, r in enumerate(reach)]
        return Curve(self.steps, np.array(medians))


Cell = tuple[int, Callable[[Page, int, int], None]]  # of a page: its height, and what draws it at (left, top)


def write_report(folder: str | Path) -> Path:
    """Draw `report.png` into a stage's folder, from its log and the last of its sample pictures.

    Figures called "a/b" share a plot, the loss and the validation loss share one, and so do all that stay between 0 and
    1; each of the others has its own.

    Raises:
        ValueError: the folder has no log, or nothing is in it.
    """
    folder = Path(folder)
    curves = read_curves(folder)
    plots = arrange({name: curve.finite() for name, curve in curves.items()})
    cells: list[Cell] = [
        (_plot_height(lines), partial(_draw_plot, title=title, lines=lines)) for title, lines in plots.items()
    ]
    table = _table(curves)
    cells.append((_LINE * (len(table) + 1), partial(_draw_table, rows=table)))
    if (samples := _last_samples(folder)) is not None:
        cells.append((30 + samples.height, partial(_draw_samples, samples=samples)))
    rows = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    heights = [max(height for height, _ in row) for row in rows]
    page = Page(_WIDTH, 2 * _MARGIN + _HEAD + sum(heights) + _GAP * (len(rows) - 1))
    page.text(_MARGIN, _MARGIN, f"{folder.resolve().parent.name} / {folder.resolve().name}", size=28)
    page.text(_MARGIN, _MARGIN + 38, _summary(curves), colour=_SOFT)
    top = _MARGIN + _HEAD
    for row, height in zip(rows, heights, strict=True):
        for number, (_, draw) in enumerate(row):
            draw(page, _MARGIN + number * (_COLUMN + _GAP), top)
        top += height + _GAP
    write_file(folder / REPORT, page.png())
    return folder / REPORT


def read_curves(folder: Path) -> dict[str, Curve]:
    """Every figure of a stage's log, in the order they come in."""
    path, points = folder / NAME, dict[str, list[tuple[float, float]]]()
    if not path.is_file():
        raise ValueError(f"folder: expected that of a stage, with a {NAME}, got '{folder}'")
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # else it is being written
            figures = json.loads(line)
            step = figures.pop("step")
            for name, value in figures.items():
                points.setdefault(name, []).append((step, value))
    if not points:
        raise ValueError(f"folder: expected figures in {path}, got none")
    return {name: Curve(*np.array(pairs, dtype=float).T) for name, pairs in points.items()}


def arrange(curves: dict[str, Curve]) -> dict[str, dict[str, Curve]]:
    """The plots by title, each with its lines by label."""
    plots: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        if _is_error(name, curves) or len(curve.values) == 0:
            continue
        group, slash, label = name.rpartition("/")
        if slash:
            title = f"{group} by timestep" if label.startswith("t ") else group
        elif name in ("loss", "validation loss"):
            title = "loss"
        elif name in _LAST or curve.values.min() < 0 or curve.values.max() > 1:
            title = name
        else:
            title = "shares"
        plots.setdefault(title, {})[label] = curve
    if len(plots.get("shares", ())) == 1:
        only = plots.pop("shares")
        plots[next(iter(only))] = only  # there is no legend of a single line
    return {title: plots[title] for title in sorted(plots, key=lambda title: title in _LAST)}


def _is_error(name: str, others: dict[str, Curve]) -> bool:
    """Whether a figure is another one's standard error, which the table tells beside that one."""
    return name.endswith(" error") and name.removesuffix(" error") in others


class Axis:
    """Where values lie between 0 and 1, with a little room around them: linear, or logarithmic where they span much."""

    def __init__(self, values: np.ndarray, *, logarithmic: bool = False, room: float = 0.04) -> None:
        low, high = float(values.min()), float(values.max())
        self.logarithmic = logarithmic and low > 0 and high / low > 8
        if low == high:
            low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
        self.low, self.high = (math.log10(low), math.log10(high)) if self.logarithmic else (low, high)
        spare = room * (self.high - self.low)
        self.low, self.high = self.low - spare, self.high + spare

    def place(self, values: np.ndarray) -> np.ndarray:
        placed = np.log10(values) if self.logarithmic else np.asarray(values)
        return cast(np.ndarray, (placed - self.low) / (self.high - self.low))

    def ticks(self) -> list[float]:
        """Three to about seven round values."""
        if self.logarithmic:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5)):
                found = [
                    s * 10.0**d for d in decades for s in steps if self.low <= math.log10(s * 10.0**d) <= self.high
                ]
                if len(found) >= 3:
                    break
            return found
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)]


def _text_width(text: str, size: int = 14) -> float:
    return float(ImageFont.load_default(2 * size).getlength(text)) / 2


def _legend(lines: dict[str, Curve]) -> list[list[tuple[float, str]]]:
    """Where each label of several lines begins, row by row."""
    if len(lines) == 1:
        return []
    rows: list[list[tuple[float, str]]] = [[]]
    x = 0.0
    for label in lines:
        width = _text_width(label) + 40
        if rows[-1] and x + width > _COLUMN - _LEFT:
            rows.append([])
            x = 0.0
        rows[-1].append((x, label))
        x += width
    return rows


def _plot_height(lines: dict[str, Curve]) -> int:
    return 30 + _PLOT + 30 + _LINE * len(_legend(lines))


def _draw_plot(page: Page, left: int, top: int, title: str, lines: dict[str, Curve]) -> None:
    page.text(left, top, title, size=17)
    left, right, top = left + _LEFT, left + _COLUMN, top + 30
    bottom = top + _PLOT
    across = Axis(np.concatenate([[0.0], *(curve.steps for curve in lines.values())]), room=0.0)
    drawn = [curve.smoothed() if len(lines) > 1 else curve for curve in lines.values()]
    upward = Axis(np.concatenate([curve.values for curve in drawn]), logarithmic="loss" in title or title in _LAST)

    def place(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
        return left + across.place(curve.steps) * (right - left), bottom - upward.place(curve.values) * _PLOT

    for value in upward.ticks():
        y = bottom - float(upward.place(np.array(value))) * _PLOT
        page.line(np.array([left, right]), np.array([y, y]), _GRID)
        page.text(left - 8, y, f"{value:.6g}", colour=_SOFT, anchor="rm")
    for value in across.ticks():
        x = left + float(across.place(np.array(value))) * (right - left)
        page.line(np.array([x, x]), np.array([bottom, bottom + 4]), _SOFT)
        page.text(x, bottom + 8, f"{value:,.6g}", colour=_SOFT, anchor="ma" if x < right - 20 else "ra")
    page.line(np.array([left, right]), np.array([bottom, bottom]), _SOFT)
    colours = dict(zip(lines, _COLOURS * len(lines), strict=False))
    for (label, curve), smooth in zip(lines.items(), drawn, strict=True):
        if len(lines) == 1 and len(curve.values) >= _SMOOTHED:
            page.line(*place(curve), "#b8d4e6", 1)
            smooth = curve.smoothed()
        page.line(*place(smooth), colours[label], 2)
        if len(smooth.values) <= 24:
            for x, y in zip(*place(smooth), strict=True):
                page.dot(x, y, colours[label])
    for number, row in enumerate(_legend(lines)):
        y = bottom + 30 + _LINE * number + 9
        for x, label in row:
            page.line(np.array([left + x, left + x + 16]), np.array([y, y]), colours[label], 3)
            page.text(left + x + 22, y, label, anchor="lm")


def _table(curves: dict[str, Curve]) -> list[tuple[str, str, str, str]]:
    """Each figure: its name, the last value, the lowest and the highest with their steps."""
    rows = []
    for name, whole in curves.items():
        if _is_error(name, curves):
            continue
        last, curve = f"{whole.values[-1]:.4g}", whole.finite()
        if f"{name} error" in curves:
            last += f" ± {curves[f'{name} error'].values[-1]:.2g}"
        ends = [
            f"{curve.values[i]:.3g} at {curve.steps[i]:,.0f}" if len(curve.values) else "-"
            for i in (int(pick(curve.values)) if len(curve.values) else 0 for pick in (np.argmin, np.argmax))
        ]
        rows.append((name, last, ends[0], ends[1]))
    return rows


def _draw_table(page: Page, left: int, top: int, rows: list[tuple[str, str, str, str]]) -> None:
    page.text(left, top, "figures", size=17)
    columns = [left, left + 300, left + 426, left + _COLUMN]  # the first begins there, the others end
    for number, row in enumerate([("", "last", "lowest", "highest"), *rows]):
        y = top + 4 + _LINE * number
        if number > 0:
            page.line(np.array([left, left + _COLUMN]), np.array([y + 22, y + 22]), _GRID)
        for column, (x, cell) in enumerate(zip(columns, row, strict=True)):
            colour = _INK if number > 0 and column < 2 else _SOFT
            page.text(x, y + 2, cell, size=13, colour=colour, anchor="la" if column == 0 else "ra")


def _draw_samples(page: Page, left: int, top: int, samples: Image.Image) -> None:
    page.text(left, top, "last pictures", size=17)
    page.paste(samples, left, top + 30)


def _summary(curves: dict[str, Curve]) -> str:
    steps = max(float(curve.steps[-1]) for curve in curves.values())
    summary = f"{steps:,.0f} steps"
    if "seconds per step" in curves:
        curve = curves["seconds per step"]
        seconds = float((np.diff(curve.steps, prepend=0) * curve.values).sum())
        summary += f" in {seconds / 3600:.1f} hours" if seconds >= 3600 else f" in {seconds / 60:.1f} minutes"
    return summary


def _last_samples(folder: Path) -> Image.Image | None:
    """The newest sheet of sample pictures, as wide as a column."""
    sheets = sorted((folder / "samples").glob("[!.]*.png"))
    if not sheets:
        return None
    with Image.open(sheets[-1]) as sheet:
        return sheet.convert("RGB").resize((_COLUMN, round(sheet.height * _COLUMN / sheet.width)))


if __name__ == "__main__":
    tqdm.write(str(write_report(sys.argv[1])))
