"""The governor: which rung of the ladder keeps a deadline, on a machine that is not alone.

Before a request it predicts each rung's seconds: what the rung took when the server started, times
how much slower the machine is by now, at a quantile of what whole requests were off lately. It
learns from every pass and from every request. The slow-down is one global factor that all rungs
share, as in ALERT (Wan et al., USENIX ATC 2020, section 3.3); unlike there, a pass that is far off
ends the belief in what was at once, and how much predictions are off is learned from requests, in
which noise of their passes cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

# Of the normal distribution: 99 of 100 requests take no longer.
_QUANTILE = 2.326
# What a pass weighs in the mean, and in the spread, of what follows it.
_MEMORY, _GAIN = 0.9, 0.1
# Deviations that end the belief in what was: something else has begun to run, or has stopped.
_SURPRISE = 3.0
# Deviations that are none: what came before them was an exception.
_USUAL = 2.0
# Passes that say how much they vary; before, no less than twice as fast or slow is a surprise.
_SETTLED, _UNSETTLED = 3, math.log(2)
# Steps of decoding that are learned from together: the shorter a pass, the more it varies.
_WINDOW = 8
# No machine is steadier than this, as a deviation of the logarithm.
_STEADIEST = 0.03
# A plan dearer than the last one has to be in time with so much to spare: plans do not go back and
# forth.
_BAND = 0.03
# Requests that the mean and the spread stand on, of those that have been; the measurement when a
# server starts is worth as many.
_MEASURED = 20


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
class PromptSize:
    """How long a prompt is, in tokens."""

    text: int
    image: int = 0


@dataclass(frozen=True)
class RungTimes:
    """What a rung takes on the idle machine, in seconds.

    A prompt takes `prompt_fixed`, and so much for each token of its text and of its images,
    encoders included; a step of decoding `step_fixed`, and `per_answer` for each answer of the
    batch.
    """

    prompt_fixed: float
    per_text_token: float
    per_image_token: float
    step_fixed: float
    per_answer: float

    def own(self, prompt: PromptSize) -> float:
        """Of a prompt's tokens."""
        return self.per_text_token * prompt.text + self.per_image_token * prompt.image

    def prompt(self, prompt: PromptSize) -> float:
        """Of reading a prompt."""
        return self.prompt_fixed + self.own(prompt)

    def step(self, answers: int) -> float:
        """Of one token for each of several answers."""
        return self.step_fixed + self.per_answer * answers


class News(Enum):
    """What a pass says of the machine."""

    NONE = "it is as it was"
    CHANGED = "it has become another one"
    FALSE_ALARM = "it had not, the pass before was an exception"


@dataclass
class SlowDown:
    """How many times longer passes take than on the idle machine: a filter of its logarithm."""

    mean: float = 0.0
    variance: float = _STEADIEST**2  # of a pass around it
    _weight: float = 0.0  # seconds of passes that the mean stands on
    _passes: int = _SETTLED  # since the machine has changed
    _before: SlowDown | None = None  # the pass that has just changed it
    _was_faster: bool = False  # by the last pass, surprisingly

    def learn(self, predicted: float, took: float) -> News:
        """One pass took so many seconds where so many were predicted for the idle machine."""
        seen, news = math.log(max(took, 1e-9) / max(predicted, 1e-9)), News.NONE
        before, self._before = self._before, None
        if before is not None and (seen - before.mean) ** 2 <= _USUAL**2 * before.variance:
            news = News.FALSE_ALARM
            # That there are exceptions belongs to how passes vary.
            variance = before.variance + _GAIN * (_SURPRISE**2 - 1) * before.variance
            self.mean, self.variance, self._weight = before.mean, variance, before._weight
            self._passes = before._passes
        off, most = seen - self.mean, _SURPRISE * math.sqrt(self.variance)
        if self._passes < _SETTLED:
            most = max(most, _UNSETTLED)
        is_surprise = abs(off) > most
        # To take a machine for faster than it is costs more than to take it for slower: two passes
        # have to say so.
        was_faster, self._was_faster = self._was_faster, is_surprise and off < 0
        if is_surprise and (off > 0 or was_faster):
            news, self._before = News.CHANGED, replace(self)
            self._weight, self._passes, self._was_faster = 0.0, 0, False
        else:
            # The surprise itself says where the machine is now, not how much it varies there.
            off = max(off, -most) if is_surprise else off
            self._passes += 1
            gain = max(_GAIN, 1 / (self._passes + 1))
            self.variance = max(self.variance + gain * (off**2 - self.variance), _STEADIEST**2)
        self._weight = _MEMORY * self._weight + predicted
        self.mean += max(predicted / self._weight, _GAIN) * off
        return news

    def shift(self, by: float) -> None:
        """Other passes have shown that the machine is another one now; the next one says more."""
        self.mean += by
        self._weight, self._passes = 0.0, 0

    @property
    def median(self) -> float:
        """Of a pass."""
        return math.exp(self.mean)

    @property
    def quantile(self) -> float:
        """What one pass in a hundred exceeds."""
        return math.exp(self.mean + _QUANTILE * math.sqrt(self.variance))


@dataclass
class Margin:
    """How much longer requests take than was predicted, as a logarithm.

    Its quantile is Student's: the fewer requests have been seen on the machine as it is now, the
    less is known of how they vary.
    """

    mean: float = 0.0
    variance: float = _STEADIEST**2
    _requests: int = _MEASURED  # since the machine has changed

    def learn(self, predicted: float, took: float) -> None:
        """One request took so many seconds where so many were predicted."""
        off = math.log(max(took, 1e-9) / max(predicted, 1e-9)) - self.mean
        # The machine may have changed in its middle: no request says more than a surprise.
        most = _SURPRISE * math.sqrt(self.variance)
        off = min(max(off, -most), most)
        self.mean += _GAIN * off
        self.variance = max(self.variance + _GAIN * (off**2 - self.variance), _STEADIEST**2)
        self._requests = min(self._requests + 1, _MEASURED)

    def changed(self, news: News) -> None:
        """Passes have shown something."""
        self._requests = 0 if news is News.CHANGED else _MEASURED

    @property
    def quantile(self) -> float:
        """What one request in a hundred exceeds, as a factor."""
        freedom = self._requests + 3
        # Student's quantile to first order (Abramowitz and Stegun, 26.7.5).
        quantile = _QUANTILE + (_QUANTILE**3 + _QUANTILE) / (4 * freedom)
        spread = math.sqrt(self.variance * (1 + 1 / (self._requests + 1)))
        return math.exp(self.mean + quantile * spread)


@dataclass(frozen=True)
class Expected:
    """What a request was expected to take when its prompt was read, in seconds."""

    prompt: float
    step: float  # for each token of its answer but the first
    changes: int  # that the machine had seen by then

    def seconds(self, tokens: int) -> float:
        """Of an answer of so many tokens."""
        return self.prompt + self.step * (tokens - 1)


@dataclass
class Governor:
    """Predicts what requests take, picks rungs for deadlines, and learns.

    Prompts and steps slow down by factors of their own: they use a machine differently.
    """

    rungs: Sequence[RungTimes]  # on the idle machine, the cheapest first
    prompts: SlowDown = field(default_factory=SlowDown)
    tokens: SlowDown = field(default_factory=SlowDown)
    margin: Margin = field(default_factory=Margin)
    # (predicted, took) of the last steps.
    _window: list[tuple[float, float]] = field(default_factory=list)
    changes: int = 0  # of the machine, so far
    _last: int = field(init=False)  # the dearest rung that was read last

    def __post_init__(self) -> None:
        self._last = len(self.rungs) - 1

    def read(self, rungs: Sequence[int], prompts: Sequence[PromptSize], seconds: float) -> None:
        """Prompts, each under its rung, were read together."""
        self._last = max(rungs)
        self._learn(self.prompts, self.tokens, self._reading(rungs, prompts), seconds)

    def stepped(self, rungs: Sequence[int], seconds: float) -> None:
        """The running answers, of these rungs, have each got a token."""
        self._window.append((self._step(rungs), seconds))
        if len(self._window) == _WINDOW:
            self._learn_steps()

    def finished(self, expected: Expected, tokens: int, seconds: float) -> None:
        """A request, of so many tokens of answer, took so long from its reading on."""
        self._learn_steps()
        if expected.changes == self.changes:
            self.margin.learn(expected.seconds(tokens), seconds)

    def _learn_steps(self) -> None:
        if self._window:
            predicted, took = map(sum, zip(*self._window, strict=True))
            self._window.clear()
            self._learn(self.tokens, self.prompts, predicted, took)

    def _learn(self, own: SlowDown, other: SlowDown, predicted: float, seconds: float) -> None:
        before = own.mean
        news = own.learn(predicted, seconds)
        if news is not News.NONE:
            other.shift(own.mean - before)
            self.margin.changed(news)
            self.changes += 1

    def choose(
        self,
        deadline: Deadline,
        prompt: PromptSize,
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
            reading, step = self.rungs[rung].prompt(prompt), self._step((*running, rung))
            first = waited + self.prompts.quantile * reading
            token = self.tokens.quantile * step
            whole = self.prompts.median * reading + self.tokens.median * step * (new_tokens - 1)
            spare = 1 + _BAND if rung > self._last else 1.0
            is_in_time = (
                spare * first <= deadline.first_token
                and spare * (waited + self.margin.quantile * whole) <= deadline.whole
                and (spare * token <= deadline.per_token or new_tokens == 1)
            )
            if is_in_time:
                return rung
        return None

    def seconds_to_spare(
        self,
        deadline: Deadline,
        prompt: PromptSize,
        new_tokens: int,
        running: Sequence[int] = (),
    ) -> float:
        """How long after its arrival a request can be read and be in time under the cheapest plan.

        Negative where it cannot be at all. `running` as of `choose`.
        """
        reading, step = self.rungs[0].prompt(prompt), self._step((*running, 0))
        if new_tokens > 1 and self.tokens.quantile * step > deadline.per_token:
            return -math.inf
        whole = self.prompts.median * reading + self.tokens.median * step * (new_tokens - 1)
        return min(
            deadline.first_token - self.prompts.quantile * reading,
            deadline.whole - self.margin.quantile * whole,
        )

    def is_possible(self, deadline: Deadline, prompt: PromptSize, new_tokens: int) -> bool:
        """Whether the cheapest rung would keep a deadline on the idle machine, all alone."""
        idle = Governor(self.rungs[:1])
        return idle.choose(deadline, prompt, new_tokens, dearest=0) is not None

    def expect(
        self, rungs: Sequence[int], prompts: Sequence[PromptSize], running: Sequence[int] = ()
    ) -> Expected:
        """Of prompts that are read together, each under its rung, and join the answers that run."""
        return Expected(
            self.prompt_seconds(rungs, prompts), self.step_seconds([*running, *rungs]), self.changes
        )

    def prompt_seconds(self, rungs: Sequence[int], prompts: Sequence[PromptSize]) -> float:
        """What reading some prompts together is expected to take now."""
        return self.prompts.median * self._reading(rungs, prompts)

    def step_seconds(self, rungs: Sequence[int]) -> float:
        """What a token for each of the running answers, of these rungs, is expected to take now."""
        return self.tokens.median * self._step(rungs)

    def _reading(self, rungs: Sequence[int], prompts: Sequence[PromptSize]) -> float:
        """Of reading prompts on the idle machine: layers run once for each kind of plan."""
        fixed = sum(self.rungs[rung].prompt_fixed for rung in set(rungs))
        return fixed + sum(self.rungs[r].own(p) for r, p in zip(rungs, prompts, strict=True))

    def _step(self, rungs: Sequence[int]) -> float:
        """Of one step on the idle machine: layers run once for each kind of plan."""
        fixed = sum(self.rungs[rung].step_fixed for rung in set(rungs))
        return fixed + sum(self.rungs[rung].per_answer for rung in rungs)
