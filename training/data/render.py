"""A scene as pixels."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from planner.training.data.scenes import COLUMNS, ROWS, Scene

IMAGE_SIZE = 56  # pixels; three cells of 18 and a margin of one
_CELL, _MARGIN, _OVERSAMPLE = 18, 1, 8
_RADIUS = {"small": 4.5, "large": 8.0}
_RGB = {
    "red": (215, 45, 45),
    "green": (45, 175, 65),
    "blue": (55, 95, 235),
    "yellow": (235, 215, 55),
    "purple": (170, 65, 205),
    "cyan": (60, 210, 215),
}


def render(scene: Scene) -> Image.Image:
    """Draw a scene: an RGB image of 56 x 56 pixels, the same for the same scene."""
    rng = np.random.default_rng(scene.appearance)
    spread, noise = (18, 14.0) if scene.hard else (6, 0.0)
    background = tuple(int(v) for v in rng.integers(15, 70, size=3))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), background)
    for thing in scene.objects:
        slack = _CELL / 2 - _RADIUS[thing.size] - 1
        dx, dy = np.rint(rng.uniform(-slack, slack, size=2)).astype(int) if slack > 0 else (0, 0)
        shade = np.clip(
            np.array(_RGB[thing.color]) + rng.integers(-spread, spread + 1, size=3), 0, 255
        )
        corner = (_MARGIN + _CELL * thing.column + int(dx), _MARGIN + _CELL * thing.row + int(dy))
        image.paste(tuple(int(v) for v in shade), corner, _stencil(thing.shape, thing.size))
    if scene.text is not None and scene.text_row is not None:
        center = (IMAGE_SIZE / 2, _MARGIN + _CELL * (scene.text_row + 0.5))
        ink = ImageDraw.Draw(image)
        ink.text(center, scene.text.upper(), font=_font(), fill=(245, 245, 245), anchor="mm")
    if noise:
        pixels = np.asarray(image) + rng.normal(0.0, noise, size=(IMAGE_SIZE, IMAGE_SIZE, 3))
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=20)  # Pillow's own font: the same picture on every machine


@cache
def _stencil(shape: str, size: str) -> Image.Image:
    """One cell's coverage mask, antialiased by drawing it larger."""
    side = _CELL * _OVERSAMPLE
    middle, radius = side / 2, _RADIUS[size] * _OVERSAMPLE
    low, high, arm = middle - radius, middle + radius, radius / 3
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=255)
    elif shape == "square":
        inset = radius * 0.12  # closer to the circle's area, so that area alone tells little
        draw.rectangle((low + inset, low + inset, high - inset, high - inset), fill=255)
    elif shape == "triangle":
        draw.polygon([(middle, low), (low, high), (high, high)], fill=255)
    else:
        draw.rectangle((middle - arm, low, middle + arm, high), fill=255)
        draw.rectangle((low, middle - arm, high, middle + arm), fill=255)
    return mask.resize((_CELL, _CELL), Image.Resampling.BOX)


assert _MARGIN * 2 + _CELL * max(len(ROWS), len(COLUMNS)) == IMAGE_SIZE
