"""A running batch whose prompts a scheduler plans: the budget is the rung's, the plan the prompt's.

A prompt is read under the scheduler, by itself, since others would have other costs. What follows
is an answer like any other: it runs the plan that its prompt was given, on a cache that holds the
latency token too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from typing_extensions import override

from planner.ir.cost import Workload
from planner.ir.structure import tiles
from planner.loading import count_image_tokens
from planner.models.running.joined_cache import CachedAnswer
from planner.models.scheduling import Scheduled
from planner.models.tokens.text_tower import question
from planner.plan import TokenStage
from planner.planning.selectors import stages_of
from planner.serving.ladder import Ladder, Rung
from planner.serving.running_batch import Answer, RunningBatch, Sampler


class ScheduledBatch(RunningBatch):
    """Reads prompts under a scheduler, and decodes all answers together.

    Args:
        scheduled: a model, not attached.
        tokens: a token selector in front of the scheduler's switches, "" for none.
    """

    is_scheduled: ClassVar[bool] = True

    def __init__(self, scheduled: Scheduled, tokens: str = "") -> None:
        super().__init__(scheduled.model)
        self._scheduled, self._tokens = scheduled, tokens

    @override
    @torch.no_grad()
    def read(
        self,
        prompts: Sequence[Mapping[str, Tensor]],
        rungs: Sequence[Rung],
        samplers: Sequence[Sampler],
        asked: Sequence[Sequence[str]] = (),
    ) -> list[Answer]:
        of_pictures = asked or [()] * len(prompts)
        answers, distributions = [], []
        for prompt, rung, sampler, questions in zip(
            prompts, rungs, samplers, of_pictures, strict=True
        ):
            with question(questions):
                answer, distribution = self._one(prompt, rung, sampler)
            answers.append(answer)
            distributions.append(distribution)
        return self._begin(answers, distributions)

    def _one(
        self, prompt: Mapping[str, Tensor], rung: Rung, sampler: Sampler
    ) -> tuple[Answer, Tensor]:
        """An answer without a token, and the distribution of its first."""
        scheduled = self._scheduled
        inputs = {name: value.to(self.model.device) for name, value in prompt.items()}
        length = inputs["input_ids"].shape[1]
        image = count_image_tokens(self.model, inputs)
        load = Workload.default(scheduled.graph, image, length - image, 0)
        cache = DynamicCache(config=self.model.config)
        with scheduled.using(rung.budget, _stages(scheduled, self._tokens, load), load):
            logits = self._run(cache, inputs).logits
            kept = {layer: counts[0] for layer, counts in scheduled.kept_image_tokens.items()}
            (plan,) = scheduled.plans()
            scheduled.release(cache)
        answer = Answer(plan, sampler, CachedAnswer(cache, 0, length + 1), [], kept)
        return answer, sampler.distribution(logits[:1, -1])


def scheduled_ladder(scheduled: Scheduled, budgets: Sequence[float], tokens: str = "") -> Ladder:
    """A rung for each budget, with the plan of a typical prompt; `tokens` as for `ScheduledBatch`.

    InputError where the scheduler cannot keep to one.
    """
    load = Workload.default(scheduled.graph, new_tokens=0)
    stages = _stages(scheduled, tokens, load)
    rungs = []
    for budget in sorted(set(budgets)):
        with scheduled.using(budget, stages, load):
            rungs.append(Rung(budget, scheduled.layout.example(int(scheduled.limits[0]), stages)))
    return Ladder(tuple(rungs))


def _stages(scheduled: Scheduled, tokens: str, load: Workload) -> tuple[TokenStage, ...]:
    """In front of the switches, on a prompt."""
    if not load.image_tokens:
        return ()
    graph = scheduled.graph
    return stages_of(tokens, load.image_tokens, load.image_tokens_per_run, tiles(graph))
