"""Draws a scene."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .scene import BACKGROUNDS, COLOURS, POLYGONS, Scene

_SUPERSAMPLING = 4


def render(scene: Scene, height: int, width: int) -> np.ndarray:
    """The anti-aliased picture of a scene: uint8 [height, width, 3], RGB."""
    if height < 8 or width < 8:
        raise ValueError(f"height and width must be at least 8 pixels, got {height} x {width}")
    scale = _SUPERSAMPLING
    canvas = Image.new("RGB", (width * scale, height * scale), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(canvas)
    for item in scene.items:
        # -0.5: pillow's coordinates name pixel centres
        x, y = item.x * width * scale - 0.5, item.y * height * scale - 0.5
        radius = item.radius * min(height, width) * scale
        fill = COLOURS[item.colour]
        if item.shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            draw.polygon([(x + radius * px, y + radius * py) for px, py in POLYGONS[item.shape]], fill=fill)
    return np.asarray(canvas.reduce(scale))
