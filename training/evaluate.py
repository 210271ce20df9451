"""Accuracy per question family, through stock `generate()` in left-padded batches.

    python -m planner.training.evaluate --model models/tiny_llava --samples 3000 [--split test]
    [--json]

Works for any image-text model with a processor and chat template; `evaluate` calls nothing but
`generate`, so a model that runs under a plan is measured as it is used.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from planner.ir.errors import InputError
from planner.loading import load_model
from planner.training.data import Conversation, SceneQuestions, Turn

MAX_NEW_TOKENS = 128
_OBJECT = re.compile(r"there is a (\w+) (\w+) (\w+) in the (\w+ \w+)\b")
_COUNT = re.compile(r"shows (\d+) objects?\b")
_TEXT = re.compile(r"the text says (\w+)\b")


def evaluate(
    model: Any, processor: Any, samples: Sequence[Conversation], batch_size: int = 64
) -> dict[str, Any]:
    """Ask each sample's first question and score the answers.

    Returns `accuracy` (mean over samples), `families` and `difficulty` (mean per family, and over
    easy and hard scenes) and `samples` (their number). A description scores the fraction of its
    facts that are right, every other answer 1 or 0 (see `score`).
    """
    return summarise(samples, predict(model, processor, samples, batch_size))


def predict(
    model: Any, processor: Any, samples: Sequence[Conversation], batch_size: int = 64
) -> list[str]:
    """The model's greedy answers to the samples' first questions, in their order."""
    samples = list(samples)
    # Like families together: a batch decodes until its longest answer ends.
    order = sorted(range(len(samples)), key=lambda i: samples[i].turns[0].family or "")
    answers = [""] * len(samples)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, answer in zip(chosen, _generate(model, processor, [samples[i] for i in chosen])):
            answers[i] = answer
    return answers


def score(turn: Turn, answer: str) -> float:
    """How right an answer is, from 0 to 1.

    Descriptions: facts are the number of objects, each object's size, colour and shape at its
    place, and the text; the score is right facts over the larger number of stated and true facts.
    All others: 1 when equal to the reference but for case, spaces and a final full stop.
    """
    if turn.family != "describe":
        return float(_normal(answer) == _normal(turn.answer))
    truth, stated = facts(turn.answer), facts(answer)
    return sum((truth & stated).values()) / max(truth.total(), stated.total(), 1)


def facts(description: str) -> Counter[tuple[str, str]]:
    """A description's statements as (subject, value) pairs; a repeated one counts again."""
    found: Counter[tuple[str, str]] = Counter()
    text = description.lower()
    for size, color, shape, place in _OBJECT.findall(text):
        found.update(
            [(f"size {place}", size), (f"color {place}", color), (f"shape {place}", shape)]
        )
    found.update(("count", count) for count in _COUNT.findall(text))
    found.update(("text", word) for word in _TEXT.findall(text))
    return found


def language_prior(
    training: Iterable[Conversation], samples: Sequence[Conversation]
) -> dict[str, Any]:
    """The trivial answer's score: the best guess from the training questions, without the image.

    Each question gets the most common answer to the same question, an unseen one its family's.
    """
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    by_family: dict[str | None, Counter[str]] = defaultdict(Counter)
    for turn in (turn for conversation in training for turn in conversation.turns):
        by_question[turn.question][turn.answer] += 1
        by_family[turn.family][turn.answer] += 1
    guesses = []
    for turn in (sample.turns[0] for sample in samples):
        counts = by_question.get(turn.question) or by_family.get(turn.family) or Counter([""])
        guesses.append(counts.most_common(1)[0][0])
    return summarise(samples, guesses)


def summarise(samples: Sequence[Conversation], answers: Sequence[str]) -> dict[str, Any]:
    """Mean scores of answers: overall, per family, per difficulty."""
    families: dict[str, list[float]] = defaultdict(list)
    difficulty: dict[str, list[float]] = defaultdict(list)
    for sample, answer in zip(samples, answers, strict=True):
        value = score(sample.turns[0], answer)
        families[sample.turns[0].family or "other"].append(value)
        if sample.scene is not None:
            difficulty["hard" if sample.scene.hard else "easy"].append(value)
    values = [value for scores in families.values() for value in scores]
    return {
        "accuracy": _mean(values),
        "families": {name: _mean(scores) for name, scores in sorted(families.items())},
        "difficulty": {name: _mean(scores) for name, scores in sorted(difficulty.items())},
        "samples": len(values),
    }


@torch.inference_mode()
def _generate(model: Any, processor: Any, samples: Sequence[Conversation]) -> list[str]:
    prompts, images = [], []
    for sample in samples:
        content: list[dict[str, str]] = [{"type": "text", "text": sample.turns[0].question}]
        if sample.image is not None:
            content.insert(0, {"type": "image"})
            images.append(sample.image)
        message = {"role": "user", "content": content}
        prompts.append(processor.apply_chat_template([message], add_generation_prompt=True))
    inputs = processor(
        images=images or None, text=prompts, padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _normal(answer: str) -> str:
    return " ".join(answer.lower().strip().rstrip(".").split())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Accuracy per family on rendered scenes.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if min(options.samples, options.batch_size) < 1:
        parser.error("--samples and --batch-size must be at least 1")
    samples = SceneQuestions(options.split, options.samples, options.seed)
    try:
        model, processor, _ = load_model(options.model)
    except InputError as error:
        parser.error(str(error))
    measured = evaluate(model, processor, samples, options.batch_size)
    prior = language_prior(SceneQuestions("train", 10 * options.samples, options.seed), samples)
    if options.json:
        print(json.dumps({"model": measured, "language_prior": prior}, indent=1))
        return
    print(f"{'':12}{'model':>8}{'prior':>8}")
    rows = {"all": (measured["accuracy"], prior["accuracy"])}
    for group in ("families", "difficulty"):
        rows |= {name: (value, prior[group][name]) for name, value in measured[group].items()}
    for name, (value, guess) in rows.items():
        print(f"{name:12}{value:8.3f}{guess:8.3f}")


if __name__ == "__main__":
    main()
