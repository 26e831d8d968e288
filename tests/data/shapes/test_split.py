"""Held-out combinations never reach training."""

from collections import Counter

import numpy as np
import pytest

from kolors_fast.data.shapes import Asked, Request, facts, held_out_prompts, parse, sample_scene, sample_training
from kolors_fast.data.shapes.split import CATEGORIES, NEW_PAIRS, category, combination, is_held_out


@pytest.fixture(scope="module")
def training():
    rng = np.random.default_rng(11)
    return [sample_training(rng) for _ in range(20000)]


def test_no_training_scene_carries_a_held_out_combination(training):
    trained = {combination(facts(scene)) for scene, _ in training}
    prompts = held_out_prompts(500, seed=3)
    for one in prompts:
        if one.category != "new pair":  # those need not state a size and place
            assert combination(one.request) not in trained, one.prompt
    kinds = {(item.shape, item.colour) for scene, _ in training for item in scene.items}
    assert not kinds & set(NEW_PAIRS)
    for one in prompts:
        has_new = any((thing.shape, thing.colour) in NEW_PAIRS for thing in one.request.objects)
        assert has_new == (one.category == "new pair")


def test_training_captions_name_no_held_out_combination_either(training):
    for _, text in training[:3000]:
        request = parse(text)
        assert category(request) != "new pair"


def test_about_a_tenth_is_held_out_of_each_count():
    rng = np.random.default_rng(12)
    for count in (1, 2, 3):
        scenes = [sample_scene(rng, count) for _ in range(4000)]
        held = {combination(facts(one)): is_held_out(one) for one in scenes if category(facts(one)) != "new pair"}
        assert len(held) > 380
        assert 0.06 < np.mean(list(held.values())) < 0.14


def test_inverted_wording_is_the_same_combination():
    assert combination(parse("a red circle left of a blue square")) == combination(parse("蓝色方块在红色圆形右边"))


def test_prompts_are_different_half_chinese_and_read_back():
    prompts = held_out_prompts(200)
    assert len({one.prompt for one in prompts}) == 200
    assert Counter(one.language for one in prompts) == {"en": 100, "zh": 100}
    assert Counter(one.category for one in prompts) == dict(zip(CATEGORIES, (40, 80, 40, 40), strict=True))
    for one in prompts:
        assert parse(one.prompt) == one.request
        assert one.prompt.isascii() == (one.language == "en")
    assert prompts == held_out_prompts(200)
    assert prompts != held_out_prompts(200, seed=1)


def test_the_split_is_pinned():
    """The bundled model was trained on this split: a change of the hash or the keys would leak its test set."""
    rng = np.random.default_rng(0)
    bits = "".join(str(int(is_held_out(sample_scene(rng)))) for _ in range(64))
    assert bits == "1100001011000101000100100000101000000110001001000010000000000000"


def test_bad_arguments_are_refused():
    for n in (0, 5000):
        with pytest.raises(ValueError, match=f"n must be 1 to 2000, got {n}"):
            held_out_prompts(n)
    with pytest.raises(ValueError, match="size and place"):
        combination(Request((Asked("circle", "red"),)))
