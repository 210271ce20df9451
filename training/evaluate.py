"""Accuracy per question family, of a model as it is and under budgets.

Questions go through stock `generate()` in left-padded batches. It works for any image-text model
with a processor and chat template; `evaluate` calls nothing but `generate`, so a model that runs
under a plan is measured as it is used.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from planner.ir.cost import Workload
from planner.ir.graph import Graph
from planner.ir.structure import tiles
from planner.models.running.skipping import obeying
from planner.models.scheduling import Scheduled
from planner.models.tokens.text_tower import question
from planner.plan import TokenStage
from planner.planning.budgets import Budget
from planner.planning.compiler import plan_graph
from planner.planning.plan_costs import PlanCosts
from planner.planning.request import Request
from planner.planning.selectors import stages_of
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

    model: Any  # a stock image-text model
    processor: Any
    graph: Graph
    samples: Sequence[Conversation]  # what is asked; the first turn of each
    scheduled: Scheduled | None = None  # decides sample by sample; None for static plans
    # The token selector in front of everything, the workload that costs are of, and how static
    # plans are made.
    request: Request = field(default_factory=lambda: Request("model", text_tokens=TEXT_TOKENS))
    batch_size: int = 64  # questions asked together

    @cached_property
    def workload(self) -> Workload:
        """Of one question."""
        return self.request.workload(self.graph)

    @cached_property
    def stages(self) -> tuple[TokenStage, ...]:
        """Of the token selector."""
        load, text = self.workload, self.request.tokens or ""
        return stages_of(text, load.image_tokens, load.image_tokens_per_run, tiles(self.graph))

    def measure(self, budget: float) -> dict[str, Any]:
        """What `evaluate` measures, and how the plans kept to the budget.

        `cost_fraction` is the mean FLOPs of a prefill under the plans, over the base model's, the
        language model alone. `violations` is how many plans were beyond the budget, `utilisation`
        the mean share of it that they used, both in the unit of the scheduler's limits. Raises
        InputError: the budget cannot be met.
        """
        measured = self._scheduled(budget) if self.scheduled else self._static(budget)
        return {"budget": budget, **measured}

    def _evaluate(self) -> dict[str, Any]:
        return evaluate(self.model, self.processor, self.samples, self.batch_size)

    def _scheduled(self, budget: float) -> dict[str, Any]:
        assert self.scheduled is not None
        with self.scheduled.using(budget, self.stages, self.workload):
            measured = self._evaluate()
            layout = self.scheduled.layout
            decisions = [row for taken in self.scheduled.decisions for row in taken]
        base = self.scheduled.base(self.stages)
        costs = PlanCosts(self.graph, self.workload, "llm")
        rows, times = torch.stack(decisions).unique(dim=0, return_counts=True)
        fractions = [layout.flops_fraction(row, base, costs) for row in rows]
        limit = layout.limit(Budget.of(budget))
        spent = [layout.spent(row) for row in decisions]
        return {
            **measured,
            "cost_fraction": float(np.average(fractions, weights=times)),
            "plans": len(rows),
            "violations": sum(used > limit for used in spent),
            "utilisation": layout.utilisation(spent, limit),
        }

    def _static(self, budget: float) -> dict[str, Any]:
        plan = plan_graph(self.graph, replace(self.request, budget=budget, scope="llm")).plan
        with obeying(self.model, self.graph, plan, freeze=True):
            measured = self._evaluate()
        return {
            **measured,
            "cost_fraction": plan.cost["flops"]["fraction"],
            "plans": 1,
            "violations": 0,
            "utilisation": min(plan.utilisation.values(), default=1.0),
        }
