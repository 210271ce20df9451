"""The running batch: answers under different plans, each of which gets one token a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad
from transformers import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicCache

from planner.loading import refuse_nan
from planner.models.running.joined_cache import CachedAnswer, can_be_joined, join
from planner.models.running.kv_cache import cache_argument
from planner.models.running.session import Setting
from planner.models.running.skipping import session_on
from planner.models.tokens.text_tower import question
from planner.plan import Plan
from planner.serving.ladder import Rung

# As vLLM has it.
_LEAST_TEMPERATURE = 1e-5


class Sampler:
    """Picks tokens by a temperature, 0 for the likeliest, from the `top_p` share of the
    distribution; equal seeds draw equally.

    A temperature so low that only rounding would tell two tokens apart is taken for 0.
    """

    def __init__(self, temperature: float, top_p: float = 1.0, seed: int | None = None) -> None:
        self._temperature = temperature if temperature >= _LEAST_TEMPERATURE else 0.0
        self._warpers = []
        if self._temperature:
            self._warpers.append(TemperatureLogitsWarper(self._temperature))
            if top_p < 1:
                self._warpers.append(TopPLogitsWarper(top_p))
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities of tokens by their logits, both of shape (1, vocabulary); nothing is drawn.

        PlannerError where the logits are no numbers.
        """
        scores: Tensor = refuse_nan(None, logits.float().cpu())
        if not self._temperature:
            return one_hot(scores.argmax(-1), scores.shape[-1]).float()
        # No quotient of what is at most 0 is too large a number.
        scores = scores - scores.max()
        for warper in self._warpers:
            scores = warper(None, scores)
        return scores.softmax(-1)

    def draw(self, distribution: Tensor) -> int:
        """A token from what `distribution` gave; the next one drawn is another."""
        if not self._temperature:
            return int(distribution.argmax())
        return int(torch.multinomial(distribution, 1, generator=self._generator))


@dataclass(eq=False)
class Answer:
    """An answer that is being generated."""

    plan: Plan  # that it is made under
    sampler: Sampler
    cached: CachedAnswer  # its prompt, and its tokens but for the last
    tokens: list[int]  # so far
    # Layer of a token stage -> image tokens left of its prompt.
    kept: Mapping[int, int] = field(default_factory=dict)
    failure: Exception | None = None  # what went wrong with it alone


def alike(prompt: Mapping[str, Tensor]) -> object:
    """Prompts of which this is equal can be read together: they differ in their tokens alone."""
    by_token = prompt["input_ids"].shape
    return tuple(
        (name, value.dtype, None if value.shape == by_token else value.shape)
        for name, value in sorted(prompt.items())
    )


def _padded(
    prompts: Sequence[Mapping[str, Tensor]], longest: int, device: torch.device
) -> dict[str, Tensor]:
    """One batch of prompts; in front of shorter ones stands padding, which the mask hides."""
    joined = {}
    for name in prompts[0]:
        tensors = [
            pad(prompt[name], (longest - prompt[name].shape[1], 0))
            if prompt[name].shape == prompt["input_ids"].shape
            else prompt[name]
            for prompt in prompts
        ]
        joined[name] = torch.cat(tensors).to(device)
    return joined


class RunningBatch:
    """Reads prompts, and decodes all answers together, for a model that was compiled."""

    is_scheduled: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.answers: list[Answer] = []  # that run now
        self.can_join = can_be_joined(model)
        self._session = session_on(model)
        self._cache_argument = cache_argument(model.forward)
        self._joined: list[Answer] = []
        self._cache: Any = None

    @torch.no_grad()
    def read(
        self,
        prompts: Sequence[Mapping[str, Tensor]],
        rungs: Sequence[Rung],
        samplers: Sequence[Sampler],
        asked: Sequence[Sequence[str]] = (),
    ) -> list[Answer]:
        """Read prompts, whose answers join the batch with their first tokens.

        `prompts` are inputs of the model, a batch of one each, that `alike` says go together;
        `asked` has the questions about the pictures of each. PlannerError where there is no answer
        to some prompt: no sampler has drawn then, so the others can be read again.
        """
        plans = [rung.plan for rung in rungs]
        cache = DynamicCache(config=self.model.config)
        lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
        inputs = _padded(prompts, max(lengths), self.model.device)
        if len(prompts) > 1:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with self._session.under(plans), question(list(chain(*asked))):
            output = self._run(cache, inputs)
            kept = self._session.implementation.kept_image_tokens
        distributions = [
            sampler.distribution(output.logits[row : row + 1, -1])
            for row, sampler in enumerate(samplers)
        ]
        answers = [
            Answer(
                plan,
                sampler,
                CachedAnswer(cache, row, length),
                [],
                {stage.layer: kept[stage.layer][row] for stage in plan.tokens if kept},
            )
            for row, (plan, sampler, length) in enumerate(
                zip(plans, samplers, lengths, strict=True)
            )
        ]
        return self._begin(answers, distributions)

    def _begin(self, answers: list[Answer], distributions: Sequence[Tensor]) -> list[Answer]:
        """Draw the first tokens of answers, which join the batch."""
        for answer, distribution in zip(answers, distributions, strict=True):
            answer.tokens.append(answer.sampler.draw(distribution))
        self.answers += answers
        return answers

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every answer; one that cannot go on notes why."""
        if not self.can_join:
            assert len(self.answers) == 1
            (answer,) = self._joined = self.answers
            self._cache = answer.cached.cache
        elif self._joined != self.answers:
            self._join()
        plans = [answer.plan for answer in self._joined]
        lengths = [answer.cached.length for answer in self._joined]
        device = self.model.device
        last = torch.tensor([[answer.tokens[-1]] for answer in self._joined], device=device)
        inputs = {"input_ids": last}
        if self.can_join:
            total = max(lengths) + 1
            begins = total - 1 - torch.tensor(lengths, device=device)[:, None]
            inputs["attention_mask"] = (torch.arange(total, device=device) >= begins).long()
            inputs["position_ids"] = torch.tensor(lengths, device=device)[:, None]
        with self._session.under(plans):
            logits = self._run(self._cache, inputs).logits
        for row, answer in enumerate(self._joined):
            answer.cached = CachedAnswer(self._cache, row, lengths[row] + 1)
            try:
                distribution = answer.sampler.distribution(logits[row : row + 1, -1])
                answer.tokens.append(answer.sampler.draw(distribution))
            except Exception as error:
                answer.failure = error

    def drop(self, answer: Answer) -> None:
        """Let go of an answer, whether it is complete or not."""
        self.answers = [other for other in self.answers if other is not answer]
        if not self.answers:
            self._joined, self._cache = [], None

    def _join(self) -> None:
        """Put the answers that run now into one cache; those under equal plans side by side."""
        self.answers.sort(key=lambda answer: repr(answer.plan.key))
        program = self._session.program_of(Setting(tuple(answer.plan for answer in self.answers)))
        self._cache = join([answer.cached for answer in self.answers], program)
        self._joined = list(self.answers)

    def _run(self, cache: Any, inputs: Mapping[str, Tensor]) -> Any:
        return self.model(
            **inputs, **{self._cache_argument: cache}, use_cache=True, logits_to_keep=1
        )
