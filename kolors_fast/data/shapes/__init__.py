"""A small world of coloured shapes to train on: scenes, pictures, bilingual captions, a held-out split."""

from .captions import caption, parse, phrase
from .render import render
from .scene import Asked, Item, Request, Scene, facts, sample_scene
from .split import HeldOutPrompt, held_out_prompts, sample_training

__all__ = [
    "Asked",
    "HeldOutPrompt",
    "Item",
    "Request",
    "Scene",
    "caption",
    "facts",
    "held_out_prompts",
    "parse",
    "phrase",
    "render",
    "sample_scene",
    "sample_training",
]
