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


# every phrasing of "A before B (before C)", written by hand: writing and reading share their templates, so reading
# back alone would not notice one that says the opposite; A is a red circle, B a blue square, C a green triangle
ORDERED = {
    "row": """
        A to the left of B | A left of B | A on the left of B | B to the right of A | B right of A
        | A on the left, B on the right | A with B to its right | B with A to its left
        | A在B左边 | A在B的左边 | A位于B左侧 | B的左边有A | B在A右边 | B在A的右侧 | A的右边是B | 左边是A，右边是B
        | from left to right: A, B, C | A, B and C from left to right | a row of A, B and C
        | A on the left, B in the middle, C on the right | B between A on the left and C on the right
        | from right to left: C, B, A
        | 从左到右：A、B、C | 从左到右依次是A、B、C | 左边是A，中间是B，右边是C | A在左边，B在中间，C在右边
        | B在A和C中间，从左到右 | 从右到左：C、B、A""",
    "column": """
        A above B | A is above B | A over B | B below A | B under A | A at the top, B at the bottom
        | A with B below it | B with A above it
        | A在B上面 | A在B的上方 | A位于B上方 | B的上面有A | B在A下面 | B在A的下方 | A的下面是B | 上面是A，下面是B
        | from top to bottom: A, B, C | A, B and C from top to bottom | a column of A, B and C
        | A at the top, B in the middle, C at the bottom | B between A at the top and C at the bottom
        | from bottom to top: C, B, A
        | 从上到下：A、B、C | 从上到下依次是A、B、C | 上面是A，中间是B，下面是C | A在上面，B在中间，C在下面
        | B在A和C中间，从上到下 | 从下到上：C、B、A""",
}
MEANINGS = {
    "colour": "红色 red 绿色 green 蓝色 blue 黄色 yellow 紫色 purple 橙色 orange",
    "shape": "圆 circle 圆形 circle 方块 square 正方形 square 方形 square 三角形 triangle"
    " 五角星 star 星星 star 星形 star",
    "place": "左上角 top-left 左上方 top-left 上方 top 上面 top 右上角 top-right 右上方 top-right 左边 left 左侧 left"
    " 中间 centre 中央 centre 正中间 centre 右边 right 右侧 right 左下角 bottom-left 左下方 bottom-left 下方 bottom"
    " 下面 bottom 右下角 bottom-right 右下方 bottom-right",
    "background": "白色 white 黑色 black 灰色 grey",
    "size": "小 small 大 large",
}
SENTENCES = {
    "colour": "一个{}圆形",
    "shape": "一个红色{}",
    "place": "红色圆形在{}",
    "background": "红色圆形，{}背景",
    "size": "红色{}圆形",
}


@pytest.mark.parametrize("axis", ["row", "column"])
def test_every_order_phrasing_means_what_it_says(axis):
    things = (Asked("circle", "red"), Asked("square", "blue"), Asked("triangle", "green"))
    written = set()
    rng = np.random.default_rng(2)
    for _ in range(1500):
        for count in (2, 3):
            for language in ("en", "zh"):
                text = phrase(Request(things[:count], axis), rng, language)
                text = re.sub("(a )?red (circle|disc)|(一个)?红色的?圆形?", "A", text)
                text = re.sub("(a )?blue (square|box)|(一个)?蓝色的?(方块|正方形|方形)", "B", text)
                written.add(re.sub("(a )?green triangle|(一个)?绿色的?三角形", "C", text))
    assert written == {sentence.strip() for sentence in ORDERED[axis].split("|")}


@pytest.mark.parametrize("kind", MEANINGS)
def test_chinese_words_mean_what_they_say(kind):
    words = MEANINGS[kind].split()
    for word, meaning in zip(words[::2], words[1::2], strict=True):
        request = parse(SENTENCES[kind].format(word))
        stated = request.objects[0] if kind in ("colour", "shape", "size") else request
        assert getattr(stated, kind) == meaning.replace("-", " "), word


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
