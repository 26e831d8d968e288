"""Captions are true, varied, and read back as what they state."""

import re
from collections import defaultdict

import numpy as np
import pytest

from kolors_fast.data.shapes import Asked, Request, caption, facts, parse, phrase, sample_scene

RED_LEFT_OF_BLUE = Request((Asked("circle", "red"), Asked("square", "blue")), "row")
RED_ABOVE_BLUE = Request((Asked("circle", "red"), Asked("square", "blue")), "column")


@pytest.mark.parametrize(
    ("prompt", "request_"),
    [
        ("a red circle to the left of a blue square", RED_LEFT_OF_BLUE),
        ("a blue square to the right of a red circle", RED_LEFT_OF_BLUE),
        ("A blue box with a red disc to its left.", RED_LEFT_OF_BLUE),
        ("红色圆形在蓝色方块左边", RED_LEFT_OF_BLUE),
        ("蓝色方块的左边有一个红色圆形", RED_LEFT_OF_BLUE),
        ("一个蓝色的正方形在一个红色的圆的右侧。", RED_LEFT_OF_BLUE),
        ("red circle above blue square", RED_ABOVE_BLUE),
        ("a blue square under a red circle", RED_ABOVE_BLUE),
        ("蓝色方块在红色圆形下面", RED_ABOVE_BLUE),
        (
            "from right to left: a green star, a red circle, an orange box",
            Request((Asked("square", "orange"), Asked("circle", "red"), Asked("star", "green")), "row"),
        ),
        (
            "红色圆形在橙色方块和绿色星星中间，从上到下",
            Request((Asked("square", "orange"), Asked("circle", "red"), Asked("star", "green")), "column"),
        ),
        (
            "on a grey background, a little purple triangle in the top right corner",
            Request((Asked("triangle", "purple", "small"),), None, "top right", "grey"),
        ),
        (
            "左下角有一个黄色的大五角星，背景是黑色",
            Request((Asked("star", "yellow", "large"),), None, "bottom left", "black"),
        ),
    ],
)
def test_reads_prompts_written_by_hand(prompt, request_):
    assert parse(prompt) == request_


@pytest.mark.parametrize("prompt", ["", "a cat", "a red circle left of", "a pink circle", "红色圆形在左边在右边"])
def test_other_prompts_are_not_understood(prompt):
    assert parse(prompt) is None


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_is_written_reads_back_as_stated_and_is_true(language):
    rng = np.random.default_rng(3)
    for _ in range(1500):
        scene = sample_scene(rng)
        text, request = caption(scene, rng, language)
        assert parse(text) == request, text
        truth = facts(scene)
        assert request.axis == truth.axis
        assert request.place in (None, truth.place) and request.background in (None, truth.background)
        for stated, true in zip(request.objects, truth.objects, strict=True):
            assert (stated.shape, stated.colour) == (true.shape, true.colour)
            assert stated.size in (None, true.size)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_at_least_four_phrasings_of_every_kind(language):
    """Phrasings that differ in more than the names of the objects."""
    rng = np.random.default_rng(4)
    names = re.compile(
        r"(?:an? )?red (?:circle|disc)|(?:an? )?blue (?:square|box)|(?:an? )?green triangle"
        r"|(?:一个)?红色的?圆形?|(?:一个)?蓝色的?(?:方块|正方形|方形)|(?:一个)?绿色的?三角形"
    )
    things = (Asked("circle", "red"), Asked("square", "blue"), Asked("triangle", "green"))
    requests = [
        Request(things[:1]),
        Request(things[:1], None, "centre"),
        *(Request(things[:count], axis) for count in (2, 3) for axis in ("row", "column")),
    ]
    phrasings = defaultdict(set)
    for request in requests:
        for _ in range(200):
            phrasings[request].add(names.sub("_", phrase(request, rng, language)))
    assert all(len(phrasings[request]) >= 4 for request in requests)


def test_the_example_prompt_is_one_of_the_phrasings():
    rng = np.random.default_rng(5)
    assert "红色圆形在蓝色方块左边" in {phrase(RED_LEFT_OF_BLUE, rng, "zh") for _ in range(3000)}


def test_same_seed_same_caption_and_both_languages_occur():
    scene = sample_scene(np.random.default_rng(0))
    texts = [caption(scene, np.random.default_rng(seed))[0] for seed in range(50)]
    assert texts == [caption(scene, np.random.default_rng(seed))[0] for seed in range(50)]
    assert 10 < sum(text.isascii() for text in texts) < 40


def test_complete_captions_state_size_and_place():
    rng = np.random.default_rng(6)
    for _ in range(100):
        _, request = caption(sample_scene(rng, 1), rng, complete=True)
        assert request.place is not None and request.objects[0].size is not None


def test_unknown_language_is_refused():
    with pytest.raises(ValueError, match="language must be 'en' or 'zh', got 'de'"):
        phrase(RED_LEFT_OF_BLUE, np.random.default_rng(0), "de")
