"""Which combinations are trained on and which are held out for evaluation.

A combination is what makes a scene a different task: for one object its kind (shape and colour), size and
place; for several their kinds in order and the axis they stand along. About one combination in ten is held
out, chosen by a stable hash, and two kinds appear in no training scene at all ("new pair").
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from .captions import LANGUAGES, caption
from .scene import Request, Scene, facts, sample_scene

NEW_PAIRS = (("triangle", "purple"), ("star", "green"))
CATEGORIES = ("one object", "two objects", "three objects", "new pair")
_SHARES = (0.2, 0.4, 0.2, 0.2)  # of the held-out prompts
_MOST = 2000  # beyond this, different phrasings of the few combinations of one object become rare


class HeldOutPrompt(NamedTuple):
    """A prompt never trained on, what it asserts, and where it counts in a report."""

    prompt: str
    request: Request
    category: str
    language: str


def combination(request: Request) -> str:
    """The canonical key of a request's combination; a lone object must have its size and place stated."""
    kinds = " > ".join(f"{thing.colour} {thing.shape}" for thing in request.objects)
    if len(request.objects) > 1:
        return f"{request.axis}: {kinds}"
    if request.objects[0].size is None or request.place is None:
        raise ValueError("a request for one object has a combination only with its size and place stated")
    return f"{request.objects[0].size} {kinds} at {request.place}"


def category(request: Request) -> str:
    """The row of the report that a request counts in."""
    if any((thing.shape, thing.colour) in NEW_PAIRS for thing in request.objects):
        return "new pair"
    return CATEGORIES[len(request.objects) - 1]


def is_held_out(scene: Scene) -> bool:
    """Whether a scene is kept from training."""
    request = facts(scene)
    if category(request) == "new pair":
        return True
    digest = hashlib.sha256(combination(request).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def sample_training(
    rng: np.random.Generator, language: str | None = None, count: int | None = None
) -> tuple[Scene, str]:
    """A random training scene of `count` items (None: one to three) and a true caption of it, half of them Chinese
    where `language` is None."""
    while True:
        scene = sample_scene(rng, count)
        if not is_held_out(scene):
            return scene, caption(scene, rng, language)[0]


def held_out_prompts(n: int = 200, seed: int = 0) -> list[HeldOutPrompt]:
    """`n` different prompts of held-out combinations, every second one Chinese, in fixed shares."""
    if not 1 <= n <= _MOST:
        raise ValueError(f"n must be 1 to {_MOST}, got {n}")
    rng = np.random.default_rng(seed)
    bounds = np.cumsum(_SHARES)
    prompts: list[HeldOutPrompt] = []
    seen: set[str] = set()
    while len(prompts) < n:
        wanted = CATEGORIES[int(np.searchsorted(bounds, (len(prompts) + 0.5) / n))]
        language = LANGUAGES[len(prompts) % 2]
        scene = _held_out_scene(rng, wanted)
        text, request = caption(scene, rng, language, complete=wanted != "new pair")
        if text not in seen:
            seen.add(text)
            prompts.append(HeldOutPrompt(text, request, wanted, language))
    return prompts


def _held_out_scene(rng: np.random.Generator, wanted: str) -> Scene:
    count = int(rng.integers(1, 3)) if wanted == "new pair" else CATEGORIES.index(wanted) + 1
    while True:
        scene = sample_scene(rng, count)
        if is_held_out(scene) and category(facts(scene)) == wanted:
            return scene
