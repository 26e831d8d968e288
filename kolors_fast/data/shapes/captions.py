"""Captions in English and Chinese, and back: a prompt in these words is read as the `Request` it states.

Writing and reading share one list of templates per kind of scene, so what can be written can be read.
In a template {a}, {b}, {c} are the objects in the order of the request (left to right, top to bottom).
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from .scene import AXES, BACKGROUNDS, COLOURS, PLACES, SHAPES, Asked, Request, Scene, facts

LANGUAGES = ("en", "zh")

# the first word is the plain one; the others mean the same
_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        **{colour: (colour,) for colour in COLOURS},
        "white": ("white",),
        "black": ("black",),
        "grey": ("grey", "gray"),
        "circle": ("circle", "disc"),
        "square": ("square", "box"),
        "triangle": ("triangle",),
        "star": ("star", "five-pointed star"),
        "small": ("small", "little"),
        "large": ("large", "big"),
        "top left": ("in the top left corner", "at the top left"),
        "top": ("at the top", "in the upper part"),
        "top right": ("in the top right corner", "at the top right"),
        "left": ("on the left", "on the left side"),
        "centre": ("in the centre", "in the center", "in the middle"),
        "right": ("on the right", "on the right side"),
        "bottom left": ("in the bottom left corner", "at the bottom left"),
        "bottom": ("at the bottom", "in the lower part"),
        "bottom right": ("in the bottom right corner", "at the bottom right"),
    },
    "zh": {
        "red": ("红色",),
        "green": ("绿色",),
        "blue": ("蓝色",),
        "yellow": ("黄色",),
        "purple": ("紫色",),
        "orange": ("橙色",),
        "white": ("白色",),
        "black": ("黑色",),
        "grey": ("灰色",),
        "circle": ("圆形", "圆"),
        "square": ("方块", "正方形", "方形"),
        "triangle": ("三角形",),
        "star": ("五角星", "星星", "星形"),
        "small": ("小",),
        "large": ("大",),
        "top left": ("左上角", "左上方"),
        "top": ("上方", "上面"),
        "top right": ("右上角", "右上方"),
        "left": ("左边", "左侧"),
        "centre": ("中间", "中央", "正中间"),
        "right": ("右边", "右侧"),
        "bottom left": ("左下角", "左下方"),
        "bottom": ("下方", "下面"),
        "bottom right": ("右下角", "右下方"),
    },
}

_TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "one": ("{a}", "a picture of {a}", "there is {a}", "draw {a}", "just {a}"),
        "one placed": (
            "{a} {place}",
            "a picture of {a} {place}",
            "there is {a} {place}",
            "{place} there is {a}",
            "{place}, {a}",
        ),
        "two row": (
            "{a} to the left of {b}",
            "{a} left of {b}",
            "{a} on the left of {b}",
            "{b} to the right of {a}",
            "{b} right of {a}",
            "{a} on the left, {b} on the right",
            "{a} with {b} to its right",
            "{b} with {a} to its left",
        ),
        "two column": (
            "{a} above {b}",
            "{a} is above {b}",
            "{a} over {b}",
            "{b} below {a}",
            "{b} under {a}",
            "{a} at the top, {b} at the bottom",
            "{a} with {b} below it",
            "{b} with {a} above it",
        ),
        "three row": (
            "from left to right: {a}, {b}, {c}",
            "{a}, {b} and {c} from left to right",
            "a row of {a}, {b} and {c}",
            "{a} on the left, {b} in the middle, {c} on the right",
            "{b} between {a} on the left and {c} on the right",
            "from right to left: {c}, {b}, {a}",
        ),
        "three column": (
            "from top to bottom: {a}, {b}, {c}",
            "{a}, {b} and {c} from top to bottom",
            "a column of {a}, {b} and {c}",
            "{a} at the top, {b} in the middle, {c} at the bottom",
            "{b} between {a} at the top and {c} at the bottom",
            "from bottom to top: {c}, {b}, {a}",
        ),
        "background": (
            "{scene} on a {background} background",
            "{scene}, {background} background",
            "{scene} against a {background} background",
            "on a {background} background, {scene}",
        ),
    },
    "zh": {
        "one": ("{a}", "画{a}", "图中有{a}", "这是{a}", "只有{a}"),
        "one placed": (
            "{a}在{place}",
            "{place}有{a}",
            "{place}是{a}",
            "{a}位于{place}",
            "画{a}在{place}",
        ),
        "two row": (
            "{a}在{b}左边",
            "{a}在{b}的左边",
            "{a}位于{b}左侧",
            "{b}的左边有{a}",
            "{b}在{a}右边",
            "{b}在{a}的右侧",
            "{a}的右边是{b}",
            "左边是{a}，右边是{b}",
        ),
        "two column": (
            "{a}在{b}上面",
            "{a}在{b}的上方",
            "{a}位于{b}上方",
            "{b}的上面有{a}",
            "{b}在{a}下面",
            "{b}在{a}的下方",
            "{a}的下面是{b}",
            "上面是{a}，下面是{b}",
        ),
        "three row": (
            "从左到右：{a}、{b}、{c}",
            "从左到右依次是{a}、{b}、{c}",
            "左边是{a}，中间是{b}，右边是{c}",
            "{a}在左边，{b}在中间，{c}在右边",
            "{b}在{a}和{c}中间，从左到右",
            "从右到左：{c}、{b}、{a}",
        ),
        "three column": (
            "从上到下：{a}、{b}、{c}",
            "从上到下依次是{a}、{b}、{c}",
            "上面是{a}，中间是{b}，下面是{c}",
            "{a}在上面，{b}在中间，{c}在下面",
            "{b}在{a}和{c}中间，从上到下",
            "从下到上：{c}、{b}、{a}",
        ),
        "background": (
            "{background}背景上，{scene}",
            "{background}背景，{scene}",
            "{scene}，{background}背景",
            "{scene}，背景是{background}",
        ),
    },
}


def caption(
    scene: Scene, rng: np.random.Generator, language: str | None = None, *, complete: bool = False
) -> tuple[str, Request]:
    """A true caption of the scene, in a random language (None) and phrasing, and what it asserts.

    Objects, colours and relations are always named; the background, and size and place of a lone object,
    sometimes (size and place always with `complete`). All randomness comes from `rng`.
    """
    truth = facts(scene)
    alone = len(truth.objects) == 1
    with_size = alone and (complete or rng.random() < 0.5)
    with_place = alone and (complete or rng.random() < 0.6)
    with_background = rng.random() < 0.35
    request = Request(
        objects=tuple(Asked(o.shape, o.colour, o.size if with_size else None) for o in truth.objects),
        axis=truth.axis,
        place=truth.place if with_place else None,
        background=truth.background if with_background else None,
    )
    return phrase(request, rng, language or LANGUAGES[int(rng.integers(2))]), request


def phrase(request: Request, rng: np.random.Generator, language: str) -> str:
    """One of the ways to say the request; `language` is "en" or "zh"."""
    if language not in LANGUAGES:
        raise ValueError(f"language must be 'en' or 'zh', got {language!r}")
    write = _english if language == "en" else _chinese
    with_article = rng.random() < 0.7
    slots = {slot: write(thing, rng, with_article) for slot, thing in zip("abc", request.objects, strict=False)}
    if request.place is not None:
        slots["place"] = _word(request.place, rng, language)
    text = _choose(_TEMPLATES[language][_kind(request)], rng).format(**slots)
    if request.background is not None:
        template = _choose(_TEMPLATES[language]["background"], rng)
        text = template.format(scene=text, background=_word(request.background, rng, language))
    return text


def words(language: str) -> tuple[str, ...]:
    """All words by which captions in "en" or "zh" name colours, shapes, sizes and places."""
    return tuple(dict.fromkeys(word for words in _WORDS[language].values() for word in words))


def parse(prompt: str) -> Request | None:
    """What a prompt in the words of these captions asserts; None where it is not understood."""
    text = prompt.strip().rstrip(".。").lower()
    for language in LANGUAGES:
        for frame in (None, *_frames(language)):
            match = frame.fullmatch(text) if frame else None
            if frame and not match:
                continue
            background = _meaning(match["background"], language) if match else None
            request = _parse_scene(match["scene"] if match else text, language, background)
            if request is not None:
                return request
    return None


def _kind(request: Request) -> str:
    count = len(request.objects)
    if count == 1:
        return "one" if request.place is None else "one placed"
    return f"{('two', 'three')[count - 2]} {request.axis}"


def _choose(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _word(meaning: str, rng: np.random.Generator, language: str) -> str:
    """The plain word about half the time, else any."""
    words = _WORDS[language][meaning]
    return words[0] if rng.random() < 0.4 else _choose(words, rng)


def _english(thing: Asked, rng: np.random.Generator, with_article: bool) -> str:
    meanings = [word for word in (thing.size, thing.colour, thing.shape) if word]
    text = " ".join(_word(meaning, rng, "en") for meaning in meanings)
    article = "an" if text[0] in "aeiou" else "a"
    return f"{article} {text}" if with_article else text


def _chinese(thing: Asked, rng: np.random.Generator, with_article: bool) -> str:
    colour, shape = _word(thing.colour, rng, "zh"), _word(thing.shape, rng, "zh")
    of = "的" if rng.random() < 0.35 else ""
    if thing.size is None:
        text = f"{colour}{of}{shape}"
    else:
        size = _WORDS["zh"][thing.size][0]
        text = f"{size}的{colour}{shape}" if rng.random() < 0.4 else f"{colour}{of}{size}{shape}"
    return f"一个{text}" if with_article else text


def _one_of(meanings: tuple[str, ...], language: str) -> str:
    words = [word for meaning in meanings for word in _WORDS[language][meaning]]
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def _meaning(word: str, language: str) -> str:
    return next(meaning for meaning, words in _WORDS[language].items() if word in words)


@cache
def _object_pattern(language: str) -> re.Pattern[str]:
    size, colour = _one_of(("small", "large"), language), _one_of(tuple(COLOURS), language)
    shape = _one_of(SHAPES, language)
    if language == "en":
        return re.compile(rf"(?:(?:an?|the) )?(?:(?P<size>{size}) )?(?P<colour>{colour}) (?P<shape>{shape})")
    return re.compile(
        rf"(?:一个)?(?:(?P<size>{size})的?)?(?P<colour>{colour})的?(?P<late_size>{size})?(?P<shape>{shape})"
    )


def _compile(template: str, slots: dict[str, str]) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(f"(?P<{part}>{slots[part]})" if k % 2 else re.escape(part) for k, part in enumerate(parts))
    )


@cache
def _frames(language: str) -> tuple[re.Pattern[str], ...]:
    slots = {"scene": ".+", "background": _one_of(tuple(BACKGROUNDS), language)}
    return tuple(_compile(template, slots) for template in _TEMPLATES[language]["background"])


@cache
def _patterns(language: str) -> tuple[tuple[str, re.Pattern[str]], ...]:
    thing = re.sub(r"\?P<\w+>", "?:", _object_pattern(language).pattern)
    places = tuple(place for row in PLACES for place in row)
    slots = {"a": thing, "b": thing, "c": thing, "place": _one_of(places, language)}
    return tuple(
        (kind, _compile(template, slots))
        for kind, group in _TEMPLATES[language].items()
        if kind != "background"
        for template in group
    )


def _parse_scene(text: str, language: str, background: str | None) -> Request | None:
    for kind, pattern in _patterns(language):
        match = pattern.fullmatch(text)
        if match:
            found = match.groupdict()
            objects = tuple(_parse_object(found[slot], language) for slot in "abc" if slot in found)
            axis = next((axis for axis in AXES if kind.endswith(axis)), None)
            place = _meaning(found["place"], language) if "place" in found else None
            return Request(objects, axis, place, background)
    return None


def _parse_object(text: str, language: str) -> Asked:
    match = _object_pattern(language).fullmatch(text)
    assert match is not None  # the slot was matched by the same pattern
    found = match.groupdict()
    size = found["size"] or found.get("late_size")
    return Asked(
        _meaning(found["shape"], language),
        _meaning(found["colour"], language),
        _meaning(size, language) if size else None,
    )
