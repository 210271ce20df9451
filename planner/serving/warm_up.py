"""Before a server opens: its plans are made, every one runs, and its times are taken."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from planner.ir.errors import InputError
from planner.loading import noise_image
from planner.progress import Say
from planner.serving.chat_format import ImagePart, ImageUrl, Message, TextPart
from planner.serving.chat_prompts import Prompt, PromptReader
from planner.serving.governor import RungTimes
from planner.serving.ladder import Ladder, Rung
from planner.serving.running_batch import RunningBatch, Sampler

# Answers that decode together, in the second of two measurements.
_TOGETHER = 4
# Words of a longer prompt.
_LONG = 64
# Times that something is measured, and seconds after which once is enough.
_TIMES, _SECONDS = 9, 0.5


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
    """What every rung takes for prompts with more or less text and image, and for few and many
    answers.

    InputError where the reader's limits leave no room for a prompt of one word and an answer.
    """
    # A few words alone may be too little for a scheduler, which is paid for by the prompt.
    short = _prompt(reader, 1, batch.is_scheduled)
    if short.tokens >= (most := reader.limits.tokens):
        raise InputError(
            f"{most} tokens are too few for prompts with their answers: one word takes "
            f"{short.tokens} in the model's chat template"
        )
    long = _prompt(reader, min(_LONG, most), batch.is_scheduled)
    picture = _prompt(reader, 1, True)
    times = []
    for rung in ladder.rungs:
        progress(f"warm up {rung.budget:g}")
        low, high, seeing = (_prompt_seconds(batch, p, rung) for p in (short, long, picture))
        per_text = max(0.0, high - low) / (long.tokens - short.tokens)
        per_image = per_text
        if more := picture.image_tokens - short.image_tokens:
            text = per_text * (picture.size.text - short.size.text)
            per_image = max(0.0, seeing - low - text) / more
        own = per_text * short.size.text + per_image * short.size.image
        alone = _step_seconds(batch, [short], rung)
        per_answer = alone / _TOGETHER
        if batch.can_join:
            together = _step_seconds(batch, [short] * _TOGETHER, rung)
            per_answer = max(0.0, together - alone) / (_TOGETHER - 1)
        times.append(
            RungTimes(
                max(low - own, 0.0), per_text, per_image, max(alone - per_answer, 1e-6), per_answer
            )
        )
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
    """Median, once everything is warm."""

    def read() -> None:
        _read(batch, prompt, rung)
        _clear(batch)

    read()
    return _median_seconds(read)


def _step_seconds(batch: RunningBatch, prompts: Sequence[Prompt], rung: Rung) -> float:
    """Median of later steps: the first one joins."""
    for prompt in prompts:
        _read(batch, prompt, rung)
    batch.step()
    seconds = _median_seconds(batch.step)
    _clear(batch)
    return seconds


def _median_seconds(run: Callable[[], None]) -> float:
    """Of several times, of fewer where it takes long."""
    times: list[float] = []
    while len(times) < _TIMES and sum(times) < _SECONDS:
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return median(times)


def _read(batch: RunningBatch, prompt: Prompt, rung: Rung) -> None:
    batch.read([prompt.inputs], [rung], [Sampler(0.0)], [prompt.asked])


def _clear(batch: RunningBatch) -> None:
    for answer in list(batch.answers):
        batch.drop(answer)
