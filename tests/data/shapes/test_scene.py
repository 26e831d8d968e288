"""Scenes hold what they promise: distinct objects inside the canvas, apart, in order."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest

from kolors_fast.data.shapes import facts, sample_scene
from kolors_fast.data.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    EXTENT,
    POLYGONS,
    REQUEST_PARTS,
    SIZES,
    Asked,
    Request,
    place_of,
    request_parts,
)

CANVASES = ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0))  # width, height in short sides


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(1)
    return [sample_scene(rng) for _ in range(3000)]


def test_objects_lie_inside_and_apart_at_any_aspect_ratio(scenes):
    for scene in scenes:
        for width, height in CANVASES:
            centres = [(item.x * width, item.y * height) for item in scene.items]
            reach = [item.radius * EXTENT for item in scene.items]
            for (x, y), r in zip(centres, reach, strict=True):
                assert r < x < width - r and r < y < height - r
            for (a, ra), (b, rb) in combinations(zip(centres, reach, strict=True), 2):
                assert math.dist(a, b) > ra + rb


def test_order_follows_the_axis_and_dominates_it(scenes):
    for scene in scenes:
        assert (scene.axis is None) == (len(scene.items) == 1)
        for first, second in pairwise(scene.items):
            for width, height in CANVASES:
                right, down = (second.x - first.x) * width, (second.y - first.y) * height
                along, across = (right, down) if scene.axis == "row" else (down, right)
                assert along > abs(across)


def test_kinds_are_distinct_and_everything_occurs(scenes):
    for scene in scenes:
        assert len({(item.shape, item.colour) for item in scene.items}) == len(scene.items)
    assert {len(scene.items) for scene in scenes} == {1, 2, 3}
    assert {(item.shape, item.colour) for scene in scenes for item in scene.items} == {
        (shape, colour) for shape in ("circle", *POLYGONS) for colour in COLOURS
    }
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.items[0].place for scene in scenes if len(scene.items) == 1} == {
        place_of(x, y) for x in (0.1, 0.5, 0.9) for y in (0.1, 0.5, 0.9)
    }


def test_sizes_are_far_from_the_line_between_them(scenes):
    line = math.sqrt(SIZES["small"] * SIZES["large"])
    for scene in scenes:
        for item in scene.items:
            assert (item.radius < line) == (item.size == "small")
            assert abs(item.radius / line - 1) > 0.15


def test_palette_is_well_separated():
    paints = [*COLOURS.values(), *BACKGROUNDS.values()]
    assert min(math.dist(a, b) for a, b in combinations(paints, 2)) > 80


def test_polygons_are_drawn_around_their_centroid():
    for points in POLYGONS.values():
        assert max(math.hypot(x, y) for x, y in points) <= 1.26
        assert np.allclose(np.mean(points, 0), 0, atol=1e-9)


def test_facts_state_everything():
    scene = sample_scene(np.random.default_rng(0), 1)
    request = facts(scene)
    assert request.background == scene.background
    assert request.place == scene.items[0].place
    assert [(o.shape, o.colour, o.size) for o in request.objects] == [
        (item.shape, item.colour, item.size) for item in scene.items
    ]


def test_request_parts_name_what_is_asked():
    request = Request((Asked("star", "red", "large"), Asked("circle", "blue")), "row", None, "grey")
    said = [part[index] for part, index in zip(REQUEST_PARTS, request_parts(request), strict=True)]
    assert said == ["row", None, "grey", "large", "red", "star", None, "blue", "circle", None, None, None]
    assert request_parts(Request((Asked("circle", "red"),))) != request_parts(Request((Asked("circle", "green"),)))


def test_same_seed_same_scene():
    assert sample_scene(np.random.default_rng(7)) == sample_scene(np.random.default_rng(7))


@pytest.mark.parametrize("count", [0, 4])
def test_count_out_of_range_is_refused(count):
    with pytest.raises(ValueError, match="count must be 1, 2 or 3, got"):
        sample_scene(np.random.default_rng(0), count)
