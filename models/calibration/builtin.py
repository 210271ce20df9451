"""Inputs for models whose user gives none: text that a model writes itself, and drawn pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from planner.ir.errors import InputError
from planner.models.calibration.samples import DEFAULT_PROMPT, Sample, answered
from planner.models.calibration.text import written_samples


class NoProcessor(InputError):
    """An image-text model's inputs cannot be made."""


# About a minute for a model of a hundred million parameters on two cores.
BUILTIN_SAMPLES = 8


def builtin_samples(
    model: Any, processor: Any | None, count: int = BUILTIN_SAMPLES
) -> list[Sample]:
    """Samples for a model, its own words in all of them.

    `model`: with weights. `processor`: of an image-text model, by default the one beside its
    weights; a language model needs none.

    Raises NoProcessor: an image-text model has none.
    """
    if not takes_pictures(model):
        return written_samples(model, count)
    processor = processor or _own_processor(model)
    return [
        answered(model, processor, DEFAULT_PROMPT, drawn_picture(seed), None)
        for seed in range(count)
    ]


def folder_of(model: Any) -> Path | None:
    """The local folder that a model was loaded from."""
    name = str(getattr(model.config, "name_or_path", "") or "")
    return Path(name) if name and Path(name).is_dir() else None


def takes_pictures(model: Any) -> bool:
    """Whether this is an image-text model."""
    return any(hasattr(type(module), "get_image_features") for module in model.modules())


def _own_processor(model: Any) -> Any:
    from transformers import AutoProcessor

    folder = folder_of(model)
    if folder is None:
        raise NoProcessor(
            "built-in pictures take the model's processor: give processor=..., or inputs=..."
        )
    return AutoProcessor.from_pretrained(folder)


def drawn_picture(seed: int, size: int = 336) -> Any:
    """A picture of a few coloured boxes and discs on a background that changes smoothly."""
    from PIL import Image, ImageDraw

    random = np.random.default_rng(seed)
    corners = Image.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    picture = corners.resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(random.integers(2, 7))):
        left, top = (int(x) for x in random.integers(0, size, 2))
        width, height = (int(x) for x in random.integers(size // 10, size // 2, 2))
        shape = draw.ellipse if random.integers(2) else draw.rectangle
        colour = tuple(int(x) for x in random.integers(0, 256, 3))
        shape((left, top, left + width, top + height), fill=colour)
    return picture
