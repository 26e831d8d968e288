"""The oracle reads rendered scenes right, damaged or not, and lets nothing wrong pass."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from kolors_fast.data.shapes import Asked, Item, Request, Scene, facts, judge, read, render, sample_scene
from kolors_fast.data.shapes.oracle import UNCLEAR, judge_reading
from kolors_fast.data.shapes.scene import BACKGROUNDS, COLOURS, SHAPES


def blurred(picture, rng):
    radius = min(picture.shape[:2]) / 100
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def noisy(picture, rng):
    return np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)


def compressed(picture, rng):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=50)
    return np.asarray(Image.open(file))


def halved(picture, rng):
    """Drawn at half the resolution, as by a coarse autoencoder."""
    image = Image.fromarray(picture)
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))


def tinted(picture, rng):
    return np.clip(picture * rng.uniform(0.9, 1.05, 3) + rng.uniform(-10, 10, 3), 0, 255).astype(np.uint8)


def specked(picture, rng):
    """A few bright or dark dots of two pixels."""
    picture = picture.copy()
    for _ in range(5):
        row, column = rng.integers(0, np.array(picture.shape[:2]) - 2)
        picture[row : row + 2, column : column + 2] = rng.integers(0, 256, 3)
    return picture


def untouched(picture, rng):
    return picture


@pytest.mark.parametrize(("height", "width"), [(128, 128), (256, 256), (128, 192), (200, 136)])
def test_reads_a_thousand_scenes(height, width):
    rng = np.random.default_rng(height + width)
    right = 0
    for _ in range(1000):
        scene = sample_scene(rng)
        reading = read(render(scene, height, width))
        items = sorted(scene.items, key=lambda item: (item.shape, item.colour))
        found = sorted(reading.objects, key=lambda item: (item.shape, item.colour))
        right += (
            reading.background == scene.background
            and [(o.shape, o.colour, o.size) for o in found] == [(i.shape, i.colour, i.size) for i in items]
            and all(abs(o.x - i.x) < 0.01 and abs(o.y - i.y) < 0.01 for o, i in zip(found, items, strict=True))
            and all(abs(o.radius / i.radius - 1) < 0.06 for o, i in zip(found, items, strict=True))
            and judge_reading(reading, facts(scene), height, width).correct
        )
    assert right >= 995


@pytest.mark.parametrize("damage", [blurred, noisy, compressed, halved, tinted, specked])
@pytest.mark.parametrize(("height", "width"), [(128, 128), (256, 192)])
def test_forgives_what_an_autoencoder_does(damage, height, width):
    rng = np.random.default_rng(17)
    scenes = [sample_scene(rng) for _ in range(200)]
    right = sum(judge(damage(render(scene, height, width), rng), facts(scene)).correct for scene in scenes)
    assert right >= 199


def wrong_scenes(scene):
    """Scenes that differ from `scene` in one way that matters."""
    first, rest = scene.items[0], scene.items[1:]
    taken = {(item.shape, item.colour) for item in scene.items}
    for colour in COLOURS:
        if (first.shape, colour) not in taken:
            yield replace(scene, items=(replace(first, colour=colour), *rest))
    for shape in SHAPES:
        if (shape, first.colour) not in taken:
            yield replace(scene, items=(replace(first, shape=shape), *rest))
    yield replace(scene, items=rest)
    if rest:
        # mirrored, turned by a quarter, colours or shapes exchanged
        yield replace(scene, items=tuple(replace(item, x=1 - item.x, y=1 - item.y) for item in scene.items))
        yield replace(scene, items=tuple(replace(item, x=item.y, y=item.x) for item in scene.items))
        second = rest[0]
        if first.shape != second.shape and first.colour != second.colour:
            swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
            yield replace(scene, items=(*swapped, *rest[1:]))
    else:
        yield replace(scene, items=(replace(first, x=1 - first.x if abs(first.x - 0.5) > 0.12 else 0.25),))
        yield replace(scene, items=(replace(first, radius=0.105 if first.size == "large" else 0.165),))
    for background in BACKGROUNDS:
        if background != scene.background:
            yield replace(scene, background=background)


def test_wrong_pictures_fail():
    rng = np.random.default_rng(23)
    for _ in range(80):
        scene = sample_scene(rng)
        request = facts(scene)
        for wrong in wrong_scenes(scene):
            verdict = judge(render(wrong, 128, 128), request)
            assert not verdict.correct and verdict.reasons, (scene, wrong)


def two(background="white", gap=0.0):
    """A red circle left of a blue square, moved towards each other by `gap`."""
    return Scene(
        background,
        (
            Item("circle", "red", "large", 0.28 + gap, 0.5, 0.165),
            Item("square", "blue", "large", 0.72 - gap, 0.5, 0.165),
        ),
        "row",
    )


ASKED = Request((Asked("circle", "red"), Asked("square", "blue")), "row")


def drawn(paint):
    image = Image.fromarray(render(two(), 128, 128))
    paint(ImageDraw.Draw(image))
    return np.asarray(image)


def test_the_right_picture_passes():
    assert judge(render(two(), 128, 128), ASKED).correct
    assert judge(render(two(), 128, 128), ASKED).reasons == ()


@pytest.mark.parametrize(("across", "right"), [(0.0, True), (0.2, True), (0.5, False)])
def test_a_diagonal_is_no_row(across, right):
    first, second = two().items
    moved = (replace(first, y=0.5 - across / 2), replace(second, y=0.5 + across / 2))
    assert judge(render(Scene("white", moved, "row"), 128, 128), ASKED).correct is right


def test_objects_that_touch_are_told_apart():
    touching = render(two(gap=0.07), 128, 128)
    found = {(o.shape, o.colour) for o in read(touching).objects}
    assert found == {("circle", "red"), ("square", "blue")}
    assert judge(touching, ASKED).correct


@pytest.mark.parametrize(
    "paint",
    [
        lambda draw: draw.ellipse((56, 6, 72, 22), fill=COLOURS["green"]),  # a third object
        lambda draw: draw.ellipse((60, 6, 72, 18), fill=(255, 170, 200)),  # a blob of no known colour
        lambda draw: draw.rectangle((30, 30, 36, 100), fill="white"),  # a cut through the circle
        lambda draw: (
            draw.rectangle((88, 60, 96, 68), fill=COLOURS["yellow"])
            or draw.rectangle((80, 50, 104, 78), fill=COLOURS["green"])
        ),
        lambda draw: draw.rectangle((15, 64, 60, 90), fill=COLOURS["green"]),  # half the circle in another colour
        lambda draw: draw.rectangle((15, 64, 60, 90), fill="white"),  # half a circle
        lambda draw: draw.ellipse((24, 52, 48, 76), fill="white"),  # a ring
        lambda draw: draw.rectangle((64, 0, 128, 128), fill="white"),  # the square is gone
        lambda draw: draw.rectangle((0, 0, 63, 128), fill="grey"),  # two backgrounds
    ],
)
def test_flawed_pictures_fail(paint):
    assert not judge(drawn(paint), ASKED).correct


@pytest.mark.parametrize(
    "draw_it",
    [
        lambda draw: draw.polygon([(64, 34), (94, 64), (64, 94), (34, 64)], fill=COLOURS["red"]),  # a diamond
        lambda draw: draw.rectangle((30, 54, 98, 74), fill=COLOURS["red"]),
        lambda draw: draw.ellipse((30, 50, 98, 78), fill=COLOURS["red"]),
        lambda draw: draw.polygon([(64, 94), (38, 48), (90, 48)], fill=COLOURS["red"]),  # upside down
        lambda draw: (
            draw.rectangle((57, 34, 71, 94), fill=COLOURS["red"])
            or draw.rectangle((34, 57, 94, 71), fill=COLOURS["red"])
        ),
        lambda draw: draw.rectangle((36, 43, 92, 85), fill=COLOURS["red"]),  # nearly a square
        lambda draw: draw.polygon([(64, 40), (28, 88), (100, 88)], fill=COLOURS["red"]),  # a flat triangle
        lambda draw: draw.polygon([(40, 40), (88, 40), (88, 88), (64, 76), (40, 88)], fill=COLOURS["red"]),  # notched
        lambda draw: draw.rounded_rectangle((40, 40, 88, 88), 13, fill=COLOURS["red"]),  # square or circle
    ],
)
def test_other_outlines_are_unclear(draw_it):
    image = Image.new("RGB", (128, 128), "white")
    draw_it(ImageDraw.Draw(image))
    (found,) = read(np.asarray(image)).objects
    assert (found.shape, found.colour) == (UNCLEAR, "red")


@pytest.mark.parametrize("paint", [(255, 170, 200), (110, 70, 40), (60, 220, 220), (96, 96, 96)])
def test_other_colours_are_unclear(paint):
    (found,) = read(drawn_alone(paint)).objects
    assert (found.shape, found.colour) == ("circle", UNCLEAR)
    for colour in COLOURS:
        assert not judge(drawn_alone(paint), Request((Asked("circle", colour),))).correct


def drawn_alone(paint):
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((44, 44, 84, 84), fill=paint)
    return np.asarray(image)


def test_a_border_of_two_colours_or_of_another_colour_is_no_background():
    halves = np.full((128, 128, 3), 252, np.uint8)
    halves[:, :60] = 12
    assert read(halves).background == UNCLEAR
    assert read(np.full((128, 128, 3), (120, 200, 220), np.uint8)).background == UNCLEAR


@pytest.mark.parametrize("height", [64, 131])
def test_empty_and_noise_pictures_fail(height):
    rng = np.random.default_rng(29)
    blank = np.full((height, height, 3), 252, np.uint8)
    assert read(blank).objects == () and read(blank).background == "white"
    for picture in (
        blank,
        rng.integers(0, 256, blank.shape).astype(np.uint8),
        np.repeat(rng.integers(0, 2, (height, height, 1)) * 255, 3, 2).astype(np.uint8),
        np.broadcast_to(np.linspace(0, 255, height)[:, None, None], blank.shape).astype(np.uint8),
    ):
        for request in (ASKED, Request((Asked("circle", "red"),))):
            assert not judge(picture, request).correct


def test_the_parts_of_a_verdict():
    mirrored = Scene("white", (replace(two().items[0], x=0.72), replace(two().items[1], x=0.28)), "row")
    verdict = judge(render(mirrored, 128, 128), ASKED)
    assert (verdict.objects_ok, verdict.colours_ok, verdict.relation_ok) == (True, True, False)
    assert verdict.reasons == ("not in a row in the asked order",)

    other = Scene("white", (replace(two().items[0], colour="green"), two().items[1]), "row")
    verdict = judge(render(other, 128, 128), ASKED)
    assert (verdict.objects_ok, verdict.colours_ok) == (True, False)
    assert verdict.reasons == ("no red circle found: large green circle, large blue square",)

    verdict = judge(render(two(), 128, 128), Request(ASKED.objects, "row", None, "black"))
    assert (verdict.objects_ok, verdict.colours_ok, verdict.relation_ok) == (True, True, True)
    assert verdict.reasons == ("background is white, not black",)


@pytest.mark.parametrize(
    "picture",
    [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32), np.zeros((16, 64, 3), np.uint8)],
)
def test_other_arrays_are_refused(picture):
    with pytest.raises(ValueError, match="picture must be uint8 \\[height, width, 3\\]"):
        read(picture)
