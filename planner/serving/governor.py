"""The governor: which rung of the ladder keeps a deadline, on a machine that is not alone.

Before a request it predicts each rung's seconds: what the rung took when the server started, times
how much slower the machine is by now, at a quantile of what that slow-down was lately. It learns
from every pass. The slow-down is filtered as in ALERT (Wan et al., USENIX ATC 2020, section 3.3):
one global factor that all rungs share, with a mean and a deviation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# Of the normal distribution: 99 of 100 passes take no longer.
_QUANTILE = 2.326
# How much of a surprise is believed at once.
_GAIN = 0.2
# Deviations that end the belief in what was: something else has begun to run, or has stopped.
_SURPRISE = 3.0
# Steps of decoding that are learned from together.
_WINDOW = 8
# No machine is steadier than this, as a deviation of the logarithm.
_STEADIEST = 0.03


@dataclass(frozen=True)
class Deadline:
    """Seconds that a request may take, from its arrival on."""

    whole: float = math.inf  # until its last token
    first_token: float = math.inf  # until its first one
    per_token: float = math.inf  # between two tokens that follow it, on average

    @property
    def is_set(self) -> bool:
        """Whether there is any."""
        return min(self.whole, self.first_token, self.per_token) < math.inf


@dataclass(frozen=True)
class RungTimes:
    """What a rung takes on the idle machine, in seconds.

    A prompt takes `prompt_fixed` and `per_prompt_token` for each of its tokens; a step of decoding
    `step_fixed` and `per_answer` for each answer of the batch.
    """

    prompt_fixed: float
    per_prompt_token: float
    step_fixed: float
    per_answer: float

    def prompt(self, tokens: int) -> float:
        """Of reading a prompt."""
        return self.prompt_fixed + self.per_prompt_token * tokens

    def step(self, answers: int) -> float:
        """Of one token for each of several answers."""
        return self.step_fixed + self.per_answer * answers


@dataclass
class SlowDown:
    """How many times longer passes take than on the idle machine: a filter of its logarithm."""

    mean: float = 0.0
    variance: float = _STEADIEST**2

    def learn(self, predicted: float, took: float) -> None:
        """One pass took so many seconds where so many were predicted for the idle machine."""
        off = math.log(max(took, 1e-9) / max(predicted, 1e-9)) - self.mean
        is_new = abs(off) > _SURPRISE * math.sqrt(self.variance)
        gain = 1.0 if is_new else _GAIN
        self.mean += gain * off
        # One surprise says where the machine is now, not how much it varies there.
        if not is_new:
            self.variance += _GAIN * (off**2 - self.variance)
        self.variance = max(self.variance, _STEADIEST**2)

    def factor(self, quantile: float = _QUANTILE) -> float:
        """The slow-down that is exceeded so seldom; ``factor(0)`` is the median."""
        return math.exp(self.mean + quantile * math.sqrt(self.variance))


@dataclass
class Governor:
    """Predicts what requests take, picks rungs for deadlines, and learns.

    Prompts and tokens slow down by factors of their own: other requests come between tokens.
    """

    rungs: Sequence[RungTimes]  # on the idle machine, the cheapest first
    prompts: SlowDown = field(default_factory=SlowDown)
    tokens: SlowDown = field(default_factory=SlowDown)
    # (predicted, took) of the last steps: one alone may have waited for a prompt.
    _window: list[tuple[float, float]] = field(default_factory=list)

    def read(self, rungs: Sequence[int], tokens: Sequence[int], seconds: float) -> None:
        """Prompts of so many tokens, each under its rung, were read together."""
        fixed = sum(self.rungs[rung].prompt_fixed for rung in set(rungs))
        own = sum(self.rungs[r].per_prompt_token * n for r, n in zip(rungs, tokens, strict=True))
        self.prompts.learn(fixed + own, seconds)

    def stepped(self, rungs: Sequence[int], seconds: float) -> None:
        """The running answers, of these rungs, have each got a token, others' prompts included."""
        self._window.append((self._step(rungs), seconds))
        if len(self._window) == _WINDOW:
            predicted, took = map(sum, zip(*self._window))
            self.tokens.learn(predicted, took)
            self._window.clear()

    def choose(
        self,
        deadline: Deadline,
        prompt_tokens: int,
        new_tokens: int,
        *,
        dearest: int,
        waited: float = 0.0,
        running: Sequence[int] = (),
    ) -> int | None:
        """The rung up to `dearest` that costs most and still keeps a deadline, None where none
        does.

        `waited`: seconds gone since it arrived, and those until it can begin. `running`: rungs of
        the answers that it will share steps with.
        """
        for rung in range(dearest, -1, -1):
            first = waited + self.prompts.factor() * self.rungs[rung].prompt(prompt_tokens)
            token = self.tokens.factor() * self._step((*running, rung))
            whole = first + token * (new_tokens - 1)
            in_time = first <= deadline.first_token and whole <= deadline.whole
            if in_time and (token <= deadline.per_token or new_tokens == 1):
                return rung
        return None

    def is_possible(self, deadline: Deadline, prompt_tokens: int, new_tokens: int) -> bool:
        """Whether the cheapest rung would keep a deadline on the idle machine, all alone."""
        idle = Governor(self.rungs[:1])
        return idle.choose(deadline, prompt_tokens, new_tokens, dearest=0) is not None

    def prompt_seconds(self, rung: int, tokens: int) -> float:
        """What reading a prompt is expected to take now."""
        return self.prompts.factor(0) * self.rungs[rung].prompt(tokens)

    def step_seconds(self, rungs: Sequence[int]) -> float:
        """What a token for each of the running answers, of these rungs, is expected to take now."""
        return self.tokens.factor(0) * self._step(rungs)

    def _step(self, rungs: Sequence[int]) -> float:
        """Of one step on the idle machine: layers run once for each kind of answers in them."""
        fixed = sum(self.rungs[rung].step_fixed for rung in set(rungs))
        return fixed + sum(self.rungs[rung].per_answer for rung in rungs)
