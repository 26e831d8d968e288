"""A small world of coloured shapes to train on: scenes, pictures, bilingual captions, a held-out split, an oracle."""

from .captions import caption, parse, phrase
from .oracle import Found, Reading, Verdict, judge, read
from .render import render
from .scene import Asked, Item, Request, Scene, facts, sample_scene
from .split import HeldOutPrompt, held_out_prompts, sample_training

__all__ = [
    "Asked",
    "Found",
    "HeldOutPrompt",
    "Item",
    "Reading",
    "Request",
    "Scene",
    "Verdict",
    "caption",
    "facts",
    "held_out_prompts",
    "judge",
    "parse",
    "phrase",
    "read",
    "render",
    "sample_scene",
    "sample_training",
]
