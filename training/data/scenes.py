"""What a picture contains: a few objects on a 3 x 3 grid, sometimes a word or a number.

A scene is a record; pixels (`render`) and answers (`questions`) both follow from it alone. The
split a scene belongs to is a hash of its content, so that no test picture, however it was drawn and
from whatever seed, can also be a training picture.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
WORDS = (  # noqa: SIM905, eighty lines otherwise
    "ant arm bag bat bed bee box bus cap car cat cow cup dog ear egg elf eye fan fig fox gas gem "
    "gum hat hen hut ice ink jam jar jet key kid leg lid lip log map mud net nut oak oar owl pan "
    "pen pie pig pin pot rat rug sea sky son sun tax tea toe toy van web wig yak zip"
).split()

TEXT_SHARE = 0.4  # of the scenes carry a word or a number
# Percentiles of the hash.
SPLITS = {"train": range(90), "val": range(90, 94), "test": range(94, 100)}


@dataclass(frozen=True)
class SceneObject:
    """One object: its looks and its cell, counted from the top left."""

    size: str
    color: str
    shape: str
    row: int
    column: int

    @property
    def place(self) -> str:
        """The cell in words, such as ``"top left"``."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """The content of one picture.

    `text` fills the whole row `text_row`. `appearance` seeds everything that changes pixels but no
    answer (offsets, shades, noise) and is no part of the scene's identity; `hard` scenes are
    crowded and noisy.
    """

    objects: tuple[SceneObject, ...]
    text: str | None
    text_row: int | None
    hard: bool
    appearance: int

    def identity(self) -> str:
        """The content as a canonical string: equal for scenes that show the same things."""
        cells = sorted((o.row, o.column, o.size, o.color, o.shape) for o in self.objects)
        return repr((cells, self.text, self.text_row))

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Scene:
        """Rebuild a scene from what `dataclasses.asdict` makes of it."""
        objects = tuple(SceneObject(**entry) for entry in record["objects"])
        return cls(**{**record, "objects": objects})


def split_of(scene: Scene) -> str:
    """The one split a scene may appear in: ``train``, ``val`` or ``test``."""
    digest = hashlib.blake2b(scene.identity().encode(), digest_size=8).digest()
    percentile = int.from_bytes(digest, "big") % 100
    return next(name for name, span in SPLITS.items() if percentile in span)


def draw_scene(split: str, rng: random.Random) -> Scene:
    """A random scene of a split."""
    while True:
        scene = _draw(rng)
        if split_of(scene) == split:
            return scene


def _draw(rng: random.Random) -> Scene:
    hard = rng.random() < 0.5
    text, text_row = None, None
    if rng.random() < TEXT_SHARE:
        text = rng.choice(WORDS) if rng.random() < 0.5 else str(rng.randrange(10, 100))
        text_row = rng.randrange(len(ROWS))
    cells = [(r, c) for r in range(len(ROWS)) if r != text_row for c in range(len(COLUMNS))]
    count = rng.randint(4, 6) if hard else rng.randint(1, 3)
    objects = tuple(
        SceneObject(rng.choice(SIZES), rng.choice(COLORS), rng.choice(SHAPES), row, column)
        for row, column in sorted(rng.sample(cells, count))
    )
    return Scene(objects, text, text_row, hard, rng.getrandbits(32))
