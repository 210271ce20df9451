"""The record a model is trained on, and datasets of such records: rendered scenes or LLaVA's JSON.

LLaVA's file is a list of `{"id", "image", "conversations": [...]}`, the conversation alternating
`{"from": "human", "value": "<image>\\n..."}` and `{"from": "gpt", "value": ...}`; records without
`image` are text only. `write_llava` writes that form and `LlavaConversations` reads it, the public
LLaVA-1.5 mixture of 665K records included.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from planner.ir.errors import InputError
from planner.training.data.conversation_table import open_records
from planner.training.data.questions import FAMILIES, Turn, ask
from planner.training.data.render import render
from planner.training.data.scenes import Scene, draw_scene

IMAGE_TAG = "<image>"


@dataclass(frozen=True)
class Conversation:
    """Turns about one image, or none; `scene` is the image's content where it was rendered."""

    id: str
    image: Image.Image | None
    turns: tuple[Turn, ...]
    scene: Scene | None = None


FAMILY_WEIGHTS: dict[str, float] = {
    "existence": 2,
    "attribute": 3,
    "count": 3,
    "spatial": 4,
    "text": 3,
}


class SceneConversations(Sequence[Conversation]):
    """Training data made on the fly: scene `i` of a split with several questions about it.

    Random access and deterministic: item `i` depends on the arguments and `i` alone, so workers,
    epochs and resumed runs agree without any file. `description_share` of the crowded scenes get a
    description and `questions_beside_description` short questions, the others get `questions` short
    ones; `family_weights` are the odds of their families (fewer where a scene gives no occasion).
    """

    def __init__(
        self,
        split: str,
        size: int,
        seed: int = 0,
        questions: int = 8,
        questions_beside_description: int = 3,
        description_share: float = 0.4,
        family_weights: Mapping[str, float] = FAMILY_WEIGHTS,
    ):
        if unknown := set(family_weights) - set(FAMILY_WEIGHTS):
            raise InputError(
                f'unknown family "{min(unknown)}"; known: {", ".join(FAMILY_WEIGHTS)}.'
            )
        self.split, self.size, self.seed = split, size, seed
        self.questions = questions
        self.questions_beside_description = questions_beside_description
        self.description_share = description_share
        self.family_weights = dict(family_weights)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]
        name = f"{self.split}-{self.seed}-{range(self.size)[index]}"
        rng = random.Random(name)
        scene = draw_scene(self.split, rng)
        found: list[Turn] = []
        if rng.random() < self.description_share and (long := ask(scene, "describe", rng)):
            found.append(long)
        short = self.questions_beside_description if found else self.questions
        families, odds = list(self.family_weights), list(self.family_weights.values())
        # Twice as many as needed, since some repeat or do not apply; existence always does.
        for family in [*rng.choices(families, odds, k=2 * short), "existence"]:
            turn = ask(scene, family, rng)
            if turn is not None and turn not in found:
                found.append(turn)
        turns = found[: short + (found[0].family == "describe")]
        return Conversation(name, render(scene), tuple(turns), scene)


class SceneQuestions(Sequence[Conversation]):
    """Evaluation data: one question per scene, the families in turn, so equally many of each."""

    def __init__(self, split: str, size: int, seed: int = 0, families: Sequence[str] = FAMILIES):
        self.split, self.size, self.seed, self.families = split, size, seed, tuple(families)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]
        index = range(self.size)[index]
        name = f"{self.split}-question-{self.seed}-{index}"
        rng = random.Random(name)
        family = self.families[index % len(self.families)]
        while True:
            scene = draw_scene(self.split, rng)
            if turn := ask(scene, family, rng):
                return Conversation(name, render(scene), (turn,), scene)


class LlavaConversations(Sequence[Conversation]):
    """LLaVA conversation JSON with an image folder, images opened on access.

    Records lie in an Arrow file that all processes share (`open_records`). Every record is checked,
    and whether its image exists, at the start; every image when it is opened. Bad data raises an
    `InputError` that names file and record; with `on_error="skip"` it is left out and counted in
    `skipped` (an image that turns out unreadable gives way to the next good record). With
    `images_only` records without an image are passed over.
    """

    def __init__(
        self,
        path: str | Path,
        image_folder: str | Path,
        on_error: str = "raise",
        images_only: bool = False,
    ):
        if on_error not in ("raise", "skip"):
            raise InputError(f'on_error is "raise" or "skip", not "{on_error}".')
        self.path, self.image_folder, self.on_error = Path(path), Path(image_folder), on_error
        self.records = open_records(self.path)
        self._unreadable: set[int] = set()
        self._good, self.skipped = array("q"), 0
        self.kinds = array("b")  # of the good records: 1 with a picture, 0 without
        for number, (fault, image) in enumerate(self._checked()):
            if fault is None and image is not None and not (self.image_folder / image).is_file():
                fault = (
                    f'{self.path}, record {number} (id "{self.records[number]["id"]}"): '
                    f'image "{self.image_folder / image}" does not exist.'
                )
            if fault is None and (image is not None or not images_only):
                self._good.append(number)
                self.kinds.append(image is not None)
            elif fault is not None and on_error == "raise":
                raise InputError(fault)
            self.skipped += fault is not None

    def _checked(self) -> Iterator[tuple[str | None, str | None]]:
        """Fault and image of every record, a batch at a time."""
        columns = self.records.select_columns(["fault", "image"])
        for batch in columns.iter(batch_size=4096):
            yield from zip(batch["fault"], batch["image"], strict=True)

    def __len__(self) -> int:
        return len(self._good)

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]
        index = range(len(self))[index]
        for step in range(len(self)):
            number = self._good[(index + step) % len(self)]
            if number in self._unreadable:
                continue
            try:
                return self._load(self.records[number])
            except InputError:
                if self.on_error == "raise":
                    raise
                self._unreadable.add(number)
                self.skipped += 1
        raise InputError(f"{self.path}: no record has a readable image.")

    def _load(self, record: dict[str, Any]) -> Conversation:
        image = None
        if record["image"] is not None:
            file = self.image_folder / record["image"]
            try:
                with Image.open(file) as opened:
                    image = opened.convert("RGB")
            # Decoders raise errors of all kinds.
            except Exception as error:
                raise InputError(
                    f'{self.path}, id "{record["id"]}": image "{file}" cannot be read ({error}).'
                ) from error
        # As LLaVA does: texts are as they are, but for those that the picture stands in.
        texts = [
            text.replace(IMAGE_TAG, "").strip() if IMAGE_TAG in text else text
            for text in record["texts"]
        ]
        unknown = [None] * (len(texts) // 2)
        families, kinds = record["families"] or unknown, record["kinds"] or unknown
        turns = zip(texts[::2], texts[1::2], families, kinds, strict=True)
        scene = record["scene"]
        return Conversation(
            record["id"],
            image,
            tuple(Turn(*turn) for turn in turns),
            None if scene is None else Scene.from_record(json.loads(scene)),
        )


def write_llava(conversations: Iterable[Conversation], folder: str | Path) -> Path:
    """Write `conversations.json` and `images/*.png` into a folder; returns the JSON file's path.

    Families, kinds and scenes go into keys of their own, which other readers of LLaVA's form
    ignore.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for conversation in conversations:
        record: dict[str, Any] = {"id": conversation.id}
        if conversation.image is not None:
            record["image"] = f"{conversation.id}.png"
            conversation.image.save(folder / "images" / record["image"])
        record["conversations"] = list(_messages(conversation))
        record["families"] = [turn.family for turn in conversation.turns]
        record["kinds"] = [turn.kind for turn in conversation.turns]
        if conversation.scene is not None:
            record["scene"] = asdict(conversation.scene)
        records.append(record)
    path = folder / "conversations.json"
    path.write_text(json.dumps(records, indent=1))
    return path


def _messages(conversation: Conversation) -> Iterator[dict[str, str]]:
    tag = f"{IMAGE_TAG}\n" if conversation.image is not None else ""
    for turn in conversation.turns:
        yield {"from": "human", "value": tag + turn.question}
        yield {"from": "gpt", "value": turn.answer}
        tag = ""
