"""Reads a picture of the shapes world back, and judges it against a request.

The reader knows nothing of how the picture was made: it finds the background from the border, takes what
differs from it as connected regions, and names each region's colour by its core and its shape by overlap with
the four outlines. It forgives what an autoencoder does (soft edges, slightly wrong colours, specks) and
nothing else: an outline or a colour that is not clearly one of the known ones is "unclear", and no request
asks for that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from .scene import BACKGROUNDS, COLOURS, POLYGONS, SHAPES, SIZES, Request, place_of

UNCLEAR = "unclear"

_FOREGROUND = 48.0  # RGB distance from the background
_COLOUR_REACH = 75.0  # RGB distance at which a colour still counts as a known one
_PURITY = 0.85  # least share of a region's core in the colour of the region
_SPECK = 0.0025  # of the squared short side: a region below it is a blemish; a small star has 0.022
# least intersection over union with the outline, and its lead over the next: 0.05 and 0.03 under the worst that
# blur, JPEG, noise and a colour cast together left of a good outline at 128 pixels
_LEAST_OVERLAP = {"circle": 0.90, "square": 0.88, "triangle": 0.85, "star": 0.80}
_LEAST_LEAD = 0.04
_GRID = 96  # cells across the frame in which outlines are compared
_FINE = 64  # least square root of an object's area in the pixels that its outline is read in
_FRAME = 2.5  # width of that frame in square roots of the area


@dataclass(frozen=True)
class Found:
    """One object read from a picture; x, y as fractions of width and height, radius of the short side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Reading:
    """What stands in a picture: the background's name or "unclear", and every object."""

    background: str
    objects: tuple[Found, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what was asked, part by part; `reasons` name what is wrong.

    objects_ok: the shapes are the asked ones, no more and no fewer. colours_ok: so are the colours.
    relation_ok: the objects stand in the asked order (true where no order was asked).
    correct: all of these for the same objects, and size, place and background where they were asked.
    """

    correct: bool
    objects_ok: bool
    colours_ok: bool
    relation_ok: bool
    reasons: tuple[str, ...]


def read(picture: np.ndarray) -> Reading:
    """Everything the reader sees in a picture: uint8 [height, width, 3], RGB, at least 32 pixels on a side."""
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or min(picture.shape[:2]) < 32:
        raise ValueError(
            f"picture must be uint8 [height, width, 3], 32 pixels or more, got {picture.dtype} {picture.shape}"
        )
    pixels = picture.astype(np.float32)
    ground, background = _read_background(pixels)
    different = _distance(pixels, ground) > _FOREGROUND
    short = min(picture.shape[:2])
    objects = []
    for region in _regions(different, _SPECK * short * short):
        objects.extend(_read_region(pixels, region, ground, short))
    return Reading(background, tuple(objects))


def judge(picture: np.ndarray, request: Request) -> Verdict:
    """Whether the picture shows exactly what the request asserts."""
    return judge_reading(read(picture), request, picture.shape[0], picture.shape[1])


def judge_reading(reading: Reading, request: Request, height: int, width: int) -> Verdict:
    """As `judge`, from a reading of a picture of that size."""
    reasons: list[str] = []
    asked, found = request.objects, reading.objects
    objects_ok = sorted(o.shape for o in asked) == sorted(o.shape for o in found)
    colours_ok = sorted(o.colour for o in asked) == sorted(o.colour for o in found)
    relation_ok = request.axis is None
    # no two asked objects are alike, so that kinds identify them
    matched = [next((o for o in found if (o.shape, o.colour) == (a.shape, a.colour)), None) for a in asked]
    seen = ", ".join(map(str, found)) or "nothing"
    if len(found) != len(asked):
        reasons.append(f"{len(asked)} objects were asked and {len(found)} found: {seen}")
    reasons.extend(f"no {a.colour} {a.shape} found: {seen}" for a, o in zip(asked, matched, strict=True) if o is None)
    present = [o for o in matched if o is not None]
    if request.axis is not None and len(present) == len(asked):
        relation_ok = all(_precedes(first, second, request.axis, height, width) for first, second in pairwise(present))
        if not relation_ok:
            reasons.append(f"not in a {request.axis} in the asked order")
    for a, o in zip(asked, matched, strict=True):
        if o is not None and a.size is not None and o.size != a.size:
            reasons.append(f"{a.colour} {a.shape} is {o.size}, not {a.size}")
    if request.place is not None and present:
        place = place_of(present[0].x, present[0].y)
        if place != request.place:
            reasons.append(f"stands at {place}, not at {request.place}")
    if request.background is not None and reading.background != request.background:
        reasons.append(f"background is {reading.background}, not {request.background}")
    return Verdict(not reasons, objects_ok, colours_ok, relation_ok, tuple(reasons))


def _precedes(first: Found, second: Found, axis: str, height: int, width: int) -> bool:
    """Clearly left of (row) or above (column): the step along the axis exceeds the one across it."""
    right, down = (second.x - first.x) * width, (second.y - first.y) * height
    along, across = (right, down) if axis == "row" else (down, right)
    return along > abs(across) and along > 0.1 * min(height, width)


def _distance(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    step = pixels - colour
    return np.sqrt(np.einsum("...c,...c->...", step, step))  # [..., 3] -> [...]


def _nearest(colours: np.ndarray, known: dict[str, tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Index of the nearest known colour and the distance to it: [..., 3] -> [...], [...]."""
    distances = np.stack([_distance(colours, np.array(value, np.float32)) for value in known.values()], -1)
    return distances.argmin(-1), distances.min(-1)


def _read_background(pixels: np.ndarray) -> tuple[np.ndarray, str]:
    """RGB of the background and its name; "unclear" where the border is not of one known colour."""
    edge = max(1, min(pixels.shape[:2]) // 64)
    sides = (pixels[:edge], pixels[-edge:], pixels[:, :edge], pixels[:, -edge:])
    border = np.concatenate([side.reshape(-1, 3) for side in sides])
    ground = np.median(border, 0)
    even = (_distance(border, ground) < _FOREGROUND).mean() > 0.75
    index, distance = _nearest(ground, BACKGROUNDS)
    clear = even and distance < _COLOUR_REACH
    return ground, tuple(BACKGROUNDS)[int(index)] if clear else UNCLEAR


def _read_region(pixels: np.ndarray, region: np.ndarray, ground: np.ndarray, short: int) -> list[Found]:
    """The objects of one connected region: one, or its differently coloured parts where objects touch."""
    core = _core(region)
    index, _ = _nearest(pixels[core], COLOURS)
    counts = np.bincount(index, minlength=len(COLOURS))
    if counts.max() >= _PURITY * counts.sum():
        return [_describe(pixels, region, core, ground, short)]
    parts = []
    names, _ = _nearest(pixels, COLOURS)
    for colour in range(len(COLOURS)):
        # two erosions: the mixed colours along an edge are no part of their own
        for part in _regions(region & (names == colour), _SPECK * short * short):
            if _eroded(_eroded(part)).sum() > _SPECK * short * short / 2:
                parts.append(_describe(pixels, part, _core(part), ground, short))
    return parts or [_describe(pixels, region, core, ground, short)]


def _describe(pixels: np.ndarray, region: np.ndarray, core: np.ndarray, ground: np.ndarray, short: int) -> Found:
    paint = np.median(pixels[core], 0)
    index, distance = _nearest(paint, COLOURS)
    colour = tuple(COLOURS)[int(index)] if distance < _COLOUR_REACH else UNCLEAR
    rows, columns, step = _outline(pixels, region, paint, ground)
    shape = _match(rows, columns)
    unit_area = _unit_area(shape) if shape != UNCLEAR else math.pi
    radius = math.sqrt(len(rows) * step * step / unit_area) / short
    size = "small" if radius < math.sqrt(SIZES["small"] * SIZES["large"]) else "large"
    height, width = pixels.shape[:2]
    x, y = (float(columns.mean()) + 0.5) * step / width, (float(rows.mean()) + 0.5) * step / height
    return Found(shape, colour, size, x, y, radius)


def _outline(
    pixels: np.ndarray, region: np.ndarray, paint: np.ndarray, ground: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Where a region is at least half paint: row and column indices on a finer raster, and its step in pixels.

    The finer raster follows the soft edge between pixels, which tells a small square from a small circle.
    """
    rows, columns = np.nonzero(region)
    top, left = max(rows.min() - 2, 0), max(columns.min() - 2, 0)
    window = np.s_[top : rows.max() + 3, left : columns.max() + 3]
    change = paint - ground
    share = np.clip((pixels[window] - ground) @ change / max(float(change @ change), 1.0), 0, 1)
    share *= _dilated(region[window])  # one ring more, for the soft edge
    factor = math.ceil(_FINE / math.sqrt(len(rows)))
    height, width = share.shape
    fine = Image.fromarray(share).resize((width * factor, height * factor), Image.Resampling.BILINEAR)
    fine_rows, fine_columns = np.nonzero(np.asarray(fine) >= 0.5)
    if not len(fine_rows):  # no pixel is like the median one: noise
        fine_rows, fine_columns = (rows - top) * factor, (columns - left) * factor
    return fine_rows + top * factor, fine_columns + left * factor, 1 / factor


def _core(region: np.ndarray) -> np.ndarray:
    """The region without its soft edge: eroded while two fifths of it are left, four times at most."""
    core, least = region, 0.4 * region.sum()
    for _ in range(4):
        smaller = _eroded(core)
        if smaller.sum() < least:
            break
        core = smaller
    return core


def _eroded(mask: np.ndarray) -> np.ndarray:
    return ~_dilated(~mask)


def _dilated(mask: np.ndarray) -> np.ndarray:
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _regions(mask: np.ndarray, least: float) -> list[np.ndarray]:
    """4-connected regions of at least `least` pixels, as masks: horizontal runs joined by union-find."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    bounds = np.searchsorted(rows, np.arange(mask.shape[0] + 1))
    for row in range(1, mask.shape[0]):
        above, here = int(bounds[row - 1]), int(bounds[row])
        while above < bounds[row] and here < bounds[row + 1]:
            if starts[above] < stops[here] and starts[here] < stops[above]:
                parents[root(here)] = root(above)
            if stops[above] < stops[here]:
                above += 1
            else:
                here += 1
    roots = np.array([root(run) for run in range(len(rows))], dtype=np.int64)
    areas = np.bincount(roots, weights=stops - starts, minlength=1)
    regions = []
    for label in np.nonzero(areas >= max(least, 1))[0]:
        region = np.zeros_like(mask)
        for run in np.nonzero(roots == label)[0]:
            region[rows[run], starts[run] : stops[run]] = True
        regions.append(region)
    return regions


@cache
def _template(shape: str) -> np.ndarray:
    """The outline of a shape, its centroid in the middle and its area one unit, as bool [_GRID, _GRID]."""
    fine = 8
    canvas = Image.new("L", (_GRID * fine, _GRID * fine))
    scale = _GRID * fine / _FRAME / math.sqrt(_unit_area(shape))
    middle = _GRID * fine / 2 - 0.5
    draw = ImageDraw.Draw(canvas)
    if shape == "circle":
        draw.ellipse((middle - scale, middle - scale, middle + scale, middle + scale), fill=255)
    else:
        draw.polygon([(middle + scale * x, middle + scale * y) for x, y in POLYGONS[shape]], fill=255)
    return np.asarray(canvas.reduce(fine)) >= 128


@cache
def _unit_area(shape: str) -> float:
    """Area of a shape of radius one."""
    if shape == "circle":
        return math.pi
    points = POLYGONS[shape]
    turned = zip(points, (*points[1:], points[0]), strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in turned)) / 2


def _match(rows: np.ndarray, columns: np.ndarray) -> str:
    """The shape whose outline overlaps clearly best with these pixels, position and area aside, or "unclear"."""
    side = math.sqrt(len(rows))
    span = (np.arange(_GRID) + 0.5) / _GRID * _FRAME - _FRAME / 2
    down = np.floor(rows.mean() + 0.5 + span * side).astype(int)
    right = np.floor(columns.mean() + 0.5 + span * side).astype(int)
    # a frame of the pixels' own, because parts of it may lie outside the picture
    top, left = min(down.min(), rows.min()), min(right.min(), columns.min())
    frame = np.zeros((max(down.max(), rows.max()) - top + 1, max(right.max(), columns.max()) - left + 1), bool)
    frame[rows - top, columns - left] = True
    mask = frame[np.ix_(down - top, right - left)]
    overlaps = sorted(
        (float((mask & _template(shape)).sum() / (mask | _template(shape)).sum()), shape) for shape in SHAPES
    )
    (runner_up, _), (overlap, shape) = overlaps[-2:]
    return shape if overlap >= _LEAST_OVERLAP[shape] and overlap - runner_up >= _LEAST_LEAD else UNCLEAR
