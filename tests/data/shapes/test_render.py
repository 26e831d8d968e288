"""The picture against areas and centroids known from geometry."""

import math

import numpy as np
import pytest

from kolors_fast.data.shapes import Item, Scene, render
from kolors_fast.data.shapes.scene import BACKGROUNDS, COLOURS

# area of each shape of radius one, from the textbook
AREAS = {
    "circle": math.pi,
    "square": (2 * 0.886) ** 2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.25**2,
    "star": 5 * 1.25 * 0.6 * math.sin(math.pi / 5),
}


@pytest.mark.parametrize("shape", AREAS)
@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160), (201, 131)])
def test_area_and_centroid_and_paint(shape, height, width):
    item = Item(shape, "red", "large", 0.4, 0.6, 0.16)
    picture = render(Scene("black", (item,)), height, width)
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
    ground, paint = np.float64(BACKGROUNDS["black"]), np.float64(COLOURS["red"])
    share = (picture[..., 0] - ground[0]) / (paint - ground)[0]
    rows, columns = np.mgrid[:height, :width] + 0.5
    radius = item.radius * min(height, width)
    assert share.sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.04)
    assert (share * columns).sum() / share.sum() == pytest.approx(item.x * width, abs=0.25)
    assert (share * rows).sum() / share.sum() == pytest.approx(item.y * height, abs=0.25)
    assert tuple(picture[int(item.y * height), int(item.x * width)]) == COLOURS["red"]


def test_edges_are_soft():
    picture = render(Scene("white", (Item("circle", "blue", "large", 0.5, 0.5, 0.16),)), 64, 64)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 6


def test_triangle_and_star_point_up():
    for shape in ("triangle", "star"):
        picture = render(Scene("white", (Item(shape, "blue", "large", 0.5, 0.5, 0.16),)), 128, 128)
        widths = (picture[..., 0] < 128).sum(1)
        rows = np.nonzero(widths)[0]
        assert widths[rows[0]] < 5 and widths[rows[0] : rows[0] + 8].sum() < widths[rows[-1] - 7 : rows[-1]].sum()


def test_tiny_canvas_is_refused():
    with pytest.raises(ValueError, match="at least 8 pixels, got 4 x 64"):
        render(Scene("white", ()), 4, 64)
