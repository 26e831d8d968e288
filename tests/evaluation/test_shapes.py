"""The evaluation counts what the oracle says, per category and language."""

import numpy as np
import pytest
from PIL import Image

from kolors_fast.data.shapes import Item, Scene, held_out_prompts, parse, render
from kolors_fast.data.shapes.scene import PLACES
from kolors_fast.evaluation.shapes import evaluate, grid


def draw(prompt):
    """A painter that reads its prompt: always right."""
    request = parse(prompt)
    count = len(request.objects)
    items = []
    for k, thing in enumerate(request.objects):
        x, y = ((k + 0.5) / count, 0.5) if request.axis == "row" else (0.5, (k + 0.5) / count)
        if request.place is not None:
            y, x = next(
                ((row + 0.5) / 3, (column + 0.5) / 3)
                for row in range(3)
                for column in range(3)
                if PLACES[row][column] == request.place
            )
        radius = 0.165 if thing.size == "large" else 0.105
        items.append(Item(thing.shape, thing.colour, thing.size or "small", x, y, radius))
    scene = Scene(request.background or "grey", tuple(items), request.axis)
    return Image.fromarray(render(scene, 128, 160))


def test_a_perfect_painter_scores_everything():
    prompts = held_out_prompts(60)
    report = evaluate(lambda texts, seed: [draw(text) for text in texts], prompts, batch_size=7)
    assert report.accuracy == 1.0 and report.wrong == ()
    assert report.count("two objects") == (24, 24)
    assert report.count(language="zh") == (30, 30)
    assert [one.asked for one in report.judged] == prompts


def test_a_painter_without_chinese_scores_half():
    def english_only(texts, seed):
        blank = Image.fromarray(np.full((128, 128, 3), 168, np.uint8))
        return [draw(text) if text.isascii() else blank for text in texts]

    report = evaluate(english_only, held_out_prompts(40))
    assert report.accuracy == 0.5
    assert report.count(language="zh") == (0, 20) and report.count("one object", "en") == (4, 4)
    table = str(report).splitlines()
    assert table[0].split() == ["en", "zh", "all"]
    assert table[2].split() == ["two", "objects", "8/8", "100.0", "%", "0/8", "0.0", "%", "8/16", "50.0", "%"]
    assert table[5].split() == ["all", "20/20", "100.0", "%", "0/20", "0.0", "%", "20/40", "50.0", "%"]


def test_batches_and_seeds():
    calls = []

    def painter(texts, seed):
        calls.append((len(texts), seed))
        return [draw(text) for text in texts]

    evaluate(painter, held_out_prompts(10), batch_size=4, seed=100)
    assert calls == [(4, 100), (4, 101), (2, 102)]


def test_bad_input_is_refused():
    prompts = held_out_prompts(3)
    with pytest.raises(ValueError, match="must return 3 pictures, got 0"):
        evaluate(lambda texts, seed: [], prompts)
    with pytest.raises(ValueError, match="prompts must not be empty"):
        evaluate(lambda texts, seed: [], [])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(lambda texts, seed: [], prompts, batch_size=0)
    with pytest.raises(ValueError, match="images must not be empty"):
        grid([], 3)
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        grid([Image.new("RGB", (4, 4))], 0)


def test_grid_places_every_image_in_the_middle_of_its_cell():
    images = [Image.new("RGB", size, colour) for size, colour in (((8, 8), "red"), ((4, 8), "lime"), ((8, 4), "blue"))]
    sheet = grid(images, 2, gap=2)
    assert sheet.size == (18, 18)
    assert sheet.getpixel((0, 0)) == (255, 0, 0)
    assert sheet.getpixel((11, 0)) == (255, 255, 255) and sheet.getpixel((12, 0)) == (0, 255, 0)
    assert sheet.getpixel((0, 11)) == (255, 255, 255) and sheet.getpixel((0, 12)) == (0, 0, 255)
    assert grid(images[:1], 5).size == (8, 8)
