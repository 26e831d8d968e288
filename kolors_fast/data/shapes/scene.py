"""The shapes world: what a picture contains (`Scene`) and what a prompt asserts about one (`Request`).

Coordinates are fractions of the canvas (x of the width, y of the height, y down) and radii are fractions of
its short side, so that one scene renders on a canvas of any size and aspect ratio up to 2:1 without objects
touching or a relation turning over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 44),
    "green": (36, 160, 72),
    "blue": (36, 84, 224),
    "yellow": (252, 216, 20),
    "purple": (148, 48, 180),
    "orange": (248, 128, 16),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (252, 252, 252),
    "black": (12, 12, 12),
    "grey": (168, 168, 168),
}
SIZES = {"small": 0.105, "large": 0.165}  # radius of the circle; the other shapes are drawn about as heavy
SIZE_JITTER = 0.05
# row by row; a place is a cell of a 3 x 3 grid with lines at 0.38 and 0.62
PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
PLACE_LINES = (0.38, 0.62)
AXES = ("row", "column")  # a row reads from left to right, a column from top to bottom

MARGIN = 0.025
GAP = 0.05
OFFSET = 0.05  # how far an object strays from the common line of its row or column
EXTENT = 1.25  # no shape reaches further than this many radii from its centre

# corner points in radii around the area centroid; the circle has none
_SQUARE = 0.886  # half side: the area of the unit circle
POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-_SQUARE, -_SQUARE), (_SQUARE, -_SQUARE), (_SQUARE, _SQUARE), (-_SQUARE, _SQUARE)),
    "triangle": tuple((1.25 * math.sin(turn), -1.25 * math.cos(turn)) for turn in (0, math.tau / 3, 2 * math.tau / 3)),
    "star": tuple(
        (
            (0.6, 1.25)[k % 2 == 0] * math.sin(k * math.pi / 5),
            -(0.6, 1.25)[k % 2 == 0] * math.cos(k * math.pi / 5),
        )
        for k in range(10)
    ),
}


@dataclass(frozen=True)
class Item:
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)


@dataclass(frozen=True)
class Scene:
    """A background and one to three items; two or more stand along `axis`, in order."""

    background: str
    items: tuple[Item, ...]
    axis: str | None = None


@dataclass(frozen=True)
class Asked:
    """One object of a request; an attribute that is None is free."""

    shape: str
    colour: str
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Request:
    """What a prompt asserts: exactly these objects, standing in this order along `axis`; None leaves it free.

    "B right of A" and "A left of B" are the same request: objects (A, B), axis "row".
    `place` belongs to requests for one object.
    """

    objects: tuple[Asked, ...]
    axis: str | None = None
    place: str | None = None
    background: str | None = None


# the parts of a request and what each can say; None: nothing
MOST_OBJECTS = 3
REQUEST_PARTS: tuple[tuple[str | None, ...], ...] = (
    (None, *AXES),
    (None, *(place for row in PLACES for place in row)),
    (None, *BACKGROUNDS),
    *((None, *SIZES), (None, *COLOURS), (None, *SHAPES)) * MOST_OBJECTS,
)


def request_parts(request: Request) -> tuple[int, ...]:
    """The request as one index into each of REQUEST_PARTS."""
    said = [request.axis, request.place, request.background]
    for thing in request.objects:
        said += [thing.size, thing.colour, thing.shape]
    said += [None] * (len(REQUEST_PARTS) - len(said))
    return tuple(part.index(value) for part, value in zip(REQUEST_PARTS, said, strict=True))


def place_of(x: float, y: float) -> str:
    """The cell of the 3 x 3 grid that holds the point; x, y in 0..1."""
    column = sum(x >= line for line in PLACE_LINES)
    row = sum(y >= line for line in PLACE_LINES)
    return PLACES[row][column]


def facts(scene: Scene) -> Request:
    """Everything that is true of the scene."""
    objects = tuple(Asked(item.shape, item.colour, item.size) for item in scene.items)
    place = scene.items[0].place if len(scene.items) == 1 else None
    return Request(objects, scene.axis, place, scene.background)


def sample_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A random scene of `count` items (None: one to three), no two alike in shape and colour."""
    if count is None:
        count = int(rng.choice(3, p=(0.25, 0.45, 0.3))) + 1
    if not 1 <= count <= 3:
        raise ValueError(f"count must be 1, 2 or 3, got {count}")
    background = _pick(rng, tuple(BACKGROUNDS))
    kinds = rng.choice(len(SHAPES) * len(COLOURS), size=count, replace=False)
    # three large ones do not fit beside each other
    sizes = [_pick(rng, tuple(SIZES)) if count < 3 else "small" for _ in range(count)]
    radii = [SIZES[size] * rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER) for size in sizes]
    axis = None if count == 1 else _pick(rng, AXES)
    centres = [_lone_centre(rng)] if count == 1 else _line_up(rng, radii)
    if axis == "column":
        centres = [(across, along) for along, across in centres]
    items = []
    for kind, size, radius, (x, y) in zip(kinds, sizes, radii, centres, strict=True):
        colour, shape = divmod(int(kind), len(SHAPES))
        items.append(Item(SHAPES[shape], tuple(COLOURS)[colour], size, x, y, radius))
    return Scene(background, tuple(items), axis)


def _lone_centre(rng: np.random.Generator) -> tuple[float, float]:
    """A point near the middle of a random cell of the place grid."""
    x, y = (rng.uniform(*((0.24, 0.31), (0.44, 0.56), (0.69, 0.76))[cell]) for cell in rng.integers(3, size=2))
    return float(x), float(y)


def _line_up(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float]]:
    """(along, across) centres of objects in a line with gaps; the spare room is shared at random."""
    extents = [EXTENT * radius for radius in radii]
    spare = 1 - 2 * MARGIN - 2 * sum(extents) - GAP * (len(radii) - 1)
    room = max(extents) + MARGIN + OFFSET
    line = rng.uniform(room, 1 - room)
    centres = []
    start = MARGIN
    for extent, shift in zip(extents, np.sort(rng.uniform(0, spare, len(radii))), strict=True):
        centres.append((float(start + extent + shift), float(line + rng.uniform(-OFFSET, OFFSET))))
        start += 2 * extent + GAP
    return centres


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
