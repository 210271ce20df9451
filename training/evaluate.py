"""Accuracy per question family, of a model as it is and under budgets.

Questions go through stock `generate()` in left-padded batches. It works for any image-text model
with a processor and chat template; `evaluate` calls nothing but `generate`, so a model that runs
under a plan is measured as it is used.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planner.ir.cost import Workload
from planner.ir.structure import tiles
from planner.models.running.skipping import obeying
from planner.models.scheduling import Deciding, Scheduled
from planner.models.tokens.text_tower import question
from planner.plan import Plan, TokenStage
from planner.planning.budgets import Budget
from planner.planning.compiler import plan_graph
from planner.planning.plan_costs import PlanCosts
from planner.planning.request import Request
from planner.planning.selectors import selector_of, stages_of
from planner.progress import Progress
from planner.spread import Here, Spread, in_order
from planner.training.data import Conversation, Turn

# Of a question about a scene and what stands around it, about.
TEXT_TOKENS = 16
MAX_NEW_TOKENS = 128
_OBJECT = re.compile(r"there is a (\w+) (\w+) (\w+) in the (\w+ \w+)\b")
_COUNT = re.compile(r"shows (\d+) objects?\b")
_TEXT = re.compile(r"the text says (\w+)\b")


def evaluate(
    model: Any, processor: Any, samples: Sequence[Conversation], batch_size: int = 64
) -> dict[str, Any]:
    """Ask each sample's first question and score the answers.

    Returns `accuracy` (mean over samples), `families` and `difficulty` (mean per family, and over
    easy and hard scenes), `samples` (their number) and `scores` (of each). A description scores the
    fraction of its facts that are right, every other answer 1 or 0 (see `score`).
    """
    return summarise(samples, predict(model, processor, samples, batch_size))


def predict(
    model: Any, processor: Any, samples: Sequence[Conversation], batch_size: int = 64
) -> list[str]:
    """The model's greedy answers to the samples' first questions, in their order."""
    batches = _Batches(samples, batch_size)
    return batches.in_place([_generate(model, processor, batch) for batch in batches.contents])


class _Batches:
    """Samples in batches of like families: a batch decodes until its longest answer ends."""

    def __init__(self, samples: Iterable[Conversation], size: int) -> None:
        some = list(samples)
        self._order = sorted(range(len(some)), key=lambda i: some[i].turns[0].family or "")
        starts = range(0, len(some), size)
        self.contents = [[some[i] for i in self._order[s : s + size]] for s in starts]

    def in_place(self, answers: Iterable[Sequence[str]]) -> list[str]:
        """The batches' answers, in the order that the samples had."""
        found = dict(zip(self._order, chain.from_iterable(answers), strict=True))
        return [found[i] for i in range(len(found))]


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
    scored = [score(s.turns[0], answer) for s, answer in zip(samples, answers, strict=True)]
    for sample, value in zip(samples, scored, strict=True):
        families[sample.turns[0].family or "other"].append(value)
        if sample.scene is not None:
            difficulty["hard" if sample.scene.hard else "easy"].append(value)
    return {
        "accuracy": _mean(scored),
        "families": {name: _mean(scores) for name, scores in sorted(families.items())},
        "difficulty": {name: _mean(scores) for name, scores in sorted(difficulty.items())},
        "samples": len(scored),
        "scores": scored,
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
    with question([sample.turns[0].question for sample in samples if sample.image is not None]):
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _normal(answer: str) -> str:
    return " ".join(answer.lower().strip().rstrip(".").split())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True, eq=False)
class UnderBudgets:
    """One model to be measured under one budget after the other."""

    loaded: Deciding  # without a scheduler, plans are static
    samples: Sequence[Conversation]  # what is asked; the first turn of each
    # The token selector in front of everything, the workload that costs are of, and how static
    # plans are made.
    request: Request = field(default_factory=lambda: Request("model", text_tokens=TEXT_TOKENS))
    batch_size: int = 64  # questions asked together
    spread: Spread[Deciding] | None = None  # has loaded the same; None asks here

    @cached_property
    def workload(self) -> Workload:
        """Of one question."""
        return self.request.workload(self.loaded.graph)

    @cached_property
    def stages(self) -> tuple[TokenStage, ...]:
        """Of the token selector."""
        load, text = self.workload, self.request.tokens or ""
        per_run = load.image_tokens_per_run
        return stages_of(text, load.image_tokens, per_run, tiles(self.loaded.graph))

    @cached_property
    def _batches(self) -> _Batches:
        return _Batches(self.samples, self.batch_size)

    def measure(
        self, budget: float, progress: Progress = lambda done, total: None
    ) -> dict[str, Any]:
        """What `evaluate` measures, and how the plans kept to the budget.

        `cost_fraction` is the mean FLOPs of a prefill under the plans, over the base model's, the
        language model alone. `violations` is how many plans were beyond the budget, `utilisation`
        the mean share of it that they used, both in the unit of the scheduler's limits. `progress`
        is told the batches done. Raises InputError: the budget cannot be met.
        """
        scheduled = self.loaded.scheduled
        if scheduled is None:
            measured = self._static(budget, progress)
        else:
            measured = self._scheduled(scheduled, budget, progress)
        return {"budget": budget, **measured}

    def under(
        self, plan: Plan, progress: Progress = lambda done, total: None
    ) -> tuple[dict[str, Any], float]:
        """What `evaluate` measures under one plan, and the mean FLOPs, as of `measure`."""
        measured, asked = self._ask(partial(_ask_under, plan), progress)
        kept = Counter(kept for batch in asked for kept in batch.kept)
        costs = PlanCosts(self.loaded.graph, self.workload, "llm")
        fractions = [costs.of(plan, dict(left))["flops"]["fraction"] for left in kept]
        return measured, float(np.average(fractions, weights=list(kept.values())))

    def _ask(
        self, make: Callable[[Deciding], _Ask], progress: Progress
    ) -> tuple[dict[str, Any], list[_Asked]]:
        """What `evaluate` measures, and what became of every batch."""
        spread = self.spread or Here(self.loaded)
        asked = in_order(spread, make, self._batches.contents, progress)
        answers = self._batches.in_place(batch.answers for batch in asked)
        return summarise(self.samples, answers), asked

    def _scheduled(self, scheduled: Scheduled, budget: float, progress: Progress) -> dict[str, Any]:
        using = budget, self.stages, self.workload
        with scheduled.using(*using):
            layout = scheduled.layout
        measured, asked = self._ask(partial(_ask_scheduled, using), progress)
        decisions = [row for batch in asked for row in batch.decided]
        base = scheduled.base(self.stages)
        costs = PlanCosts(self.loaded.graph, self.workload, "llm")
        rows, numbers = torch.stack(decisions).unique(dim=0, return_inverse=True)
        kept = [left for batch in asked for left in batch.kept]
        prompts = Counter(zip(numbers.tolist(), kept, strict=True))
        fractions = [
            layout.flops_fraction(rows[number], base, costs, dict(left)) for number, left in prompts
        ]
        limit = layout.limit(Budget.of(budget))
        spent = [layout.spent(row) for row in decisions]
        return {
            **measured,
            "cost_fraction": float(np.average(fractions, weights=list(prompts.values()))),
            "plans": len(rows),
            "violations": sum(used > limit for used in spent),
            "utilisation": layout.utilisation(spent, limit),
        }

    def _static(self, budget: float, progress: Progress) -> dict[str, Any]:
        request = replace(self.request, budget=budget, scope="llm")
        plan = plan_graph(self.loaded.graph, request).plan
        measured, share = self.under(plan, progress)
        return {
            **measured,
            "cost_fraction": share,
            "plans": 1,
            "violations": 0,
            "utilisation": min(plan.utilisation.values(), default=1.0),
        }


# What an adaptive selector left of a prompt: layers of its stages, each with image tokens.
_Kept = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Asked:
    """What became of a batch, a prompt each."""

    answers: list[str]
    kept: list[_Kept]
    decided: list[Tensor] = field(default_factory=list)  # by a scheduler


_Ask = Callable[[Sequence[Conversation]], _Asked]


def _ask_under(plan: Plan, loaded: Deciding) -> _Ask:
    def ask(batch: Sequence[Conversation]) -> _Asked:
        with obeying(loaded.model, loaded.graph, plan, freeze=True) as session:
            answers = _generate(loaded.model, loaded.processor, batch)
            found = session.implementation.kept_image_tokens
        return _Asked(answers, _kept(batch, plan.tokens, found))

    return ask


def _ask_scheduled(using: tuple[Any, ...], loaded: Deciding) -> _Ask:
    scheduled, stages = loaded.scheduled, using[1]
    assert scheduled is not None

    def ask(batch: Sequence[Conversation]) -> _Asked:
        with scheduled.using(*using):
            answers = _generate(loaded.model, loaded.processor, batch)
            decided = [row.cpu() for taken in scheduled.decisions for row in taken]
            return _Asked(answers, _kept(batch, stages, scheduled.kept_image_tokens), decided)

    return ask


def _kept(
    batch: Sequence[Conversation], stages: Sequence[TokenStage], found: Mapping[int, Sequence[int]]
) -> list[_Kept]:
    """For each prompt of a batch, given what was found at the layers of token stages.

    Other selectors keep what their stages say. So do prompts without a picture, which have nothing
    to keep, and are counted as if they had one.
    """
    adaptive = [s for s in stages if s.layer in found and selector_of(s).is_adaptive]
    return [
        tuple(
            (s.layer, min(s.keep, found[s.layer][row]))
            for s in adaptive
            if sample.image is not None
        )
        for row, sample in enumerate(batch)
    ]
