"""Samples by name: the questions that labels are about, and how they are found again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from planner.ir.errors import InputError, check_known
from planner.loading import load_image
from planner.models.calibration import Sample, answered, read_questions, read_samples
from planner.models.calibration.samples import Question
from planner.training.data import SPLITS, SceneQuestions

_SCENE = re.compile(rf"({'|'.join(SPLITS)})-question-(\d+)-(\d+)")


def scene_samples(
    model: Any, processor: Any, split: str, count: int, seed: int
) -> list[tuple[str, Sample]]:
    """Questions about drawn scenes, by the scene's id."""
    check_known("split", split, SPLITS)
    questions = SceneQuestions(split, count, seed)
    return [(q.id, _scene_sample(model, processor, q)) for q in questions]


def picture_samples(
    model: Any, processor: Any, images: Path, prompts: Path | None, count: int, seed: int
) -> list[tuple[str, Sample]]:
    """A user's own questions; a sample's name is its number and a digest of its contents."""
    found = read_samples(model, processor, read_questions(images, prompts), count, seed)
    return [(f"{index}-{sample.digest()}", sample) for index, sample in enumerate(found)]


def prompt_of(sample: Sample, rows: int = 1) -> dict[str, Any]:
    """A sample's inputs without its answer, the same on so many rows."""
    length = sample.inputs["input_ids"].shape
    prompt: dict[str, Any] = {}
    for name, value in sample.inputs.items():
        if isinstance(value, Tensor):
            if value.shape == length:
                value = value[:, : -sample.answer]
            value = value.repeat(rows, *[1] * (value.ndim - 1))
        prompt[name] = value
    return prompt


class Asked:
    """Samples from the names that `scene_samples` and `picture_samples` gave them.

    Args:
        model: answers itself where a picture's question has no answer.
        images: folder of the user's pictures, where names are of those.
        prompts: JSON lines for them.

    Raises InputError: a name is neither a drawn scene's nor that of one of the user's questions.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        names: Iterable[str],
        images: Path | None = None,
        prompts: Path | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self._questions: dict[str, Question] = {}
        for question in [] if images is None else read_questions(images, prompts):
            self._questions[self._picture(question).digest()] = question
        for name in names:
            if _SCENE.fullmatch(name) or _digest(name) in self._questions:
                continue
            where = "no drawn scene has" if images is None else f"no question of '{images}' has"
            raise InputError(f"the labels are about a sample '{name}', a name that {where}")

    def __call__(self, name: str) -> Sample:
        """The sample of one of the names."""
        if scene := _SCENE.fullmatch(name):
            split, seed, index = scene[1], int(scene[2]), int(scene[3])
            question = SceneQuestions(split, index + 1, seed)[index]
            return _scene_sample(self.model, self.processor, question)
        return self._picture(self._questions[_digest(name)])

    def _picture(self, question: Question) -> Sample:
        image = load_image(question.image)
        return answered(self.model, self.processor, question.prompt, image, question.answer)


def _digest(name: str) -> str:
    return name.partition("-")[2]


def _scene_sample(model: Any, processor: Any, question: Any) -> Sample:
    turn = question.turns[0]
    return answered(model, processor, turn.question, question.image, turn.answer)
