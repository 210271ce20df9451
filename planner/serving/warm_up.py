"""Before a server opens: its plans are made, every one runs, and its times are taken."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from typing import Any

from planner.loading import noise_image
from planner.progress import Say
from planner.serving.chat_format import ImagePart, ImageUrl, Message, TextPart
from planner.serving.chat_prompts import Prompt, PromptReader
from planner.serving.governor import RungTimes
from planner.serving.ladder import Ladder, Rung
from planner.serving.running_batch import RunningBatch, Sampler

# Answers that decode together, in the second of two measurements.
_TOGETHER = 4
_STEPS = 4


def make_ladder(
    model: Any,
    processor: Any,
    budgets: Sequence[float],
    kernels: str,
    options: dict[str, Any],
    progress: Say,
) -> Ladder:
    """Compile a model, whose weights stay as they are, for fractions of the base model's FLOPs.

    `kernels` and `options` are as for `planner.compile`; InputError where there is no plan for
    some budget.
    """
    from planner.api import budget as under
    from planner.api import compile as compile_model

    rungs: list[Rung] = []
    for budget in sorted(set(budgets)):
        progress(f"compile for {budget:g}")
        if not rungs:
            compile_model(
                model, budget, freeze=True, kernels=kernels, processor=processor, **options
            )
        with under(model, budget) as plan:
            rungs.append(Rung(budget, plan))
    return Ladder(tuple(rungs))


def measure_rungs(
    batch: RunningBatch, ladder: Ladder, reader: PromptReader, progress: Say
) -> list[RungTimes]:
    """What every rung takes for a short and a long prompt, and for few and many answers."""
    # A few words alone may be too little for a scheduler, which is paid for by the prompt.
    short, long = _prompt(reader, 1, batch.is_scheduled), _prompt(reader, 64, True)
    times = []
    for rung in ladder.rungs:
        progress(f"warm up {rung.budget:g}")
        low, high = (_prompt_seconds(batch, prompt, rung) for prompt in (short, long))
        per_token = max(0.0, high - low) / (long.tokens - short.tokens)
        fixed = max(low - per_token * short.tokens, 0.0)
        alone = _step_seconds(batch, [short], rung)
        per_answer = alone / _TOGETHER
        if batch.can_join:
            together = _step_seconds(batch, [short] * _TOGETHER, rung)
            per_answer = max(0.0, together - alone) / (_TOGETHER - 1)
        times.append(RungTimes(fixed, per_token, max(alone - per_answer, 1e-6), per_answer))
    return times


def _prompt(reader: PromptReader, words: int, with_image: bool) -> Prompt:
    parts: list[Any] = [TextPart(type="text", text=" ".join(["how"] * words))]
    if with_image and reader.takes_images:
        contents = io.BytesIO()
        noise_image().save(contents, "PNG")
        url = "data:image/png;base64," + base64.b64encode(contents.getvalue()).decode()
        parts.append(ImagePart(type="image_url", image_url=ImageUrl(url=url)))
    return reader.read([Message(role="user", content=parts)])


def _prompt_seconds(batch: RunningBatch, prompt: Prompt, rung: Rung) -> float:
    """The second time, once everything is warm."""
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        _read(batch, prompt, rung)
        seconds = time.perf_counter() - begun
        _clear(batch)
    return seconds


def _step_seconds(batch: RunningBatch, prompts: Sequence[Prompt], rung: Rung) -> float:
    """Of a later step: the first one joins."""
    for prompt in prompts:
        _read(batch, prompt, rung)
    batch.step()
    begun = time.perf_counter()
    for _ in range(_STEPS):
        batch.step()
    seconds = (time.perf_counter() - begun) / _STEPS
    _clear(batch)
    return seconds


def _read(batch: RunningBatch, prompt: Prompt, rung: Rung) -> None:
    batch.read([prompt.inputs], [rung], [Sampler(0.0)], [prompt.asked])


def _clear(batch: RunningBatch) -> None:
    for answer in list(batch.answers):
        batch.drop(answer)
