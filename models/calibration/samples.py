"""Calibration samples: one prompt with its image, and an answer behind it.

The answer is the user's own (then switches are judged by its loss), or what the base model itself
answers (then by how far the output distribution moves at those tokens).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from planner.documents import parse_json
from planner.files import MEBIBYTE, read_text
from planner.ir.errors import InputError
from planner.loading import load_image, prompt_inputs

DEFAULT_PROMPT = "Describe this image."
# Tokens of the base model's own answer: enough to leave the first word behind, few enough to be
# generated quickly.
OWN_ANSWER_TOKENS = 16
# Of a file of prompts.
_MOST_BYTES = 64 * MEBIBYTE
_T = TypeVar("_T")
_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))


@dataclass(frozen=True)
class Question:
    """A line of a prompts file; `answer` is None where nobody knows it."""

    image: Path
    prompt: str
    answer: str | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt followed by its answer; or several of equal shapes, see `together`."""

    # Arguments of the model, one row each; ``input_ids`` ends with the answer.
    inputs: Mapping[str, Any]
    answer: int  # how many of the last tokens are the answer; at least 1

    @property
    def labels(self) -> Tensor:
        """The answer's tokens, shape (answer,)."""
        ids: Tensor = self.inputs["input_ids"]
        return ids[0, -self.answer :]

    def digest(self) -> str:
        """Equal for samples of equal contents."""
        found = hashlib.sha256(str(self.answer).encode())
        for name, value in sorted(self.inputs.items()):
            found.update(name.encode())
            if isinstance(value, Tensor):
                found.update(value.detach().cpu().float().numpy().tobytes())
        return found.hexdigest()[:16]


def drawn(some: Sequence[_T], count: int, seed: int = 0) -> list[_T]:
    """At most `count` of them at random, in their order: whatever turns they come in."""
    chosen = random.Random(seed).sample(range(len(some)), min(count, len(some)))
    return [some[index] for index in sorted(chosen)]


def together(samples: Sequence[Sample], rows: int) -> Iterator[Sample]:
    """Samples of equal shapes and answers as one, of at most `rows` rows."""
    alike: dict[object, list[Sample]] = {}
    for sample in samples:
        shapes = [(name, getattr(value, "shape", value)) for name, value in sample.inputs.items()]
        alike.setdefault((sample.answer, str(shapes)), []).append(sample)
    for group in alike.values():
        for start in range(0, len(group), rows):
            some = [sample.inputs for sample in group[start : start + rows]]
            # Along the first axis a batch is made of every layout of image arguments: whole
            # images, tiles, or patches with their grids.
            yield Sample(
                {
                    name: torch.cat([one[name] for one in some])
                    if isinstance(value, Tensor)
                    else value
                    for name, value in some[0].items()
                },
                group[0].answer,
            )


def read_questions(images: Path, prompts: Path | None) -> list[Question]:
    """All questions there are: lines of the prompts file, or the default prompt for every image.

    These are JSON lines ``{"image": ..., "prompt": ..., "answer": ...}`` with names relative to the
    folder `images`, and answers in all lines or in none.
    """
    if not images.is_dir():
        raise InputError(f"there is no folder of images '{images}'")
    if prompts is None:
        found = sorted(p for p in images.iterdir() if p.suffix.lower() in _SUFFIXES)
        if not found:
            raise InputError(
                f"the folder '{images}' holds no images ({', '.join(sorted(_SUFFIXES))})"
            )
        return [Question(path, DEFAULT_PROMPT) for path in found]
    lines = read_text(prompts, "prompts file", _MOST_BYTES).splitlines()
    questions = [
        _question(line, f"line {number} of '{prompts}'", images)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not questions:
        raise InputError(f"the prompts file '{prompts}' is empty")
    answered = sum(question.answer is not None for question in questions)
    if answered not in (0, len(questions)):
        raise InputError(
            f"{answered} of {len(questions)} lines of '{prompts}' have an answer: "
            "give one in every line, or in none"
        )
    return questions


def _question(line: str, where: str, images: Path) -> Question:
    record = parse_json(line, where, by_people=True)
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        raise InputError(
            f'{where} is not of the form {{"image": ..., "prompt": ..., "answer": ...}}'
        )
    prompt, answer = record.get("prompt", DEFAULT_PROMPT), record.get("answer")
    if not isinstance(prompt, str) or not (answer is None or isinstance(answer, str)):
        raise InputError(f"prompt and answer in {where} must be text")
    if answer is not None and not answer.strip():
        raise InputError(f"the answer in {where} is empty")
    return Question(images / record["image"], prompt, answer)


def read_samples(
    model: nn.Module, processor: Any, questions: Sequence[Question], count: int, seed: int = 0
) -> list[Sample]:
    """At most `count` of the questions, drawn by the seed, as samples."""
    some = drawn(questions, count, seed)
    return [answered(model, processor, q.prompt, load_image(q.image), q.answer) for q in some]


def answered(
    model: nn.Module, processor: Any, prompt: str, image: Any, answer: str | None
) -> Sample:
    """A question about a picture with its answer, or the model's own, behind it."""
    inputs = prompt_inputs(model, processor, prompt, image)
    if answer is None:
        return sample_of(model, inputs)
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)
    return sample_of(model, inputs, tokens)


@torch.no_grad()
def sample_of(model: Any, inputs: Mapping[str, Any], answer: Sequence[int] | None = None) -> Sample:
    """Put an answer's token ids behind a prompt of one row without padding.

    Where no answer is given, the model's own, greedily.
    """
    ids: Tensor = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise InputError(f"a calibration sample is one prompt, not a batch of {ids.shape[0]}")
    if answer is None:
        output = model.generate(**inputs, max_new_tokens=OWN_ANSWER_TOKENS, do_sample=False)
        new = output[:, ids.shape[1] :]
    else:
        new = torch.tensor([list(answer)], dtype=ids.dtype, device=ids.device)
    if not new.shape[1]:
        raise InputError("a calibration sample needs an answer of at least one token")
    longer = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            # Beside the ids: a mask of ones, and kinds of tokens, where text is 0.
            fill = torch.full_like(new, int(name == "attention_mask"), dtype=value.dtype)
            longer[name] = torch.cat([value, new if name == "input_ids" else fill], 1)
    return Sample(longer, new.shape[1])
