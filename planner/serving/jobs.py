"""What the engine is asked to do, and what it says while it does it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from planner.ir.errors import PlannerError
from planner.plan import Plan
from planner.serving.chat_prompts import Prompt
from planner.serving.governor import Deadline
from planner.serving.running_batch import Sampler


class Busy(PlannerError):
    """A request is turned away before work is done on it."""

    def __init__(self, sentence: str, reason: str, seconds: float) -> None:
        super().__init__(sentence)
        self.reason = reason  # ``queue``, ``deadline``, ``stopping`` or ``timeout``
        self.retry_after = max(1, math.ceil(seconds))

    def __reduce__(self) -> tuple[type[Busy], tuple[str, str, float]]:
        return Busy, (str(self), self.reason, self.retry_after)


def stopping(seconds: float = 1.0) -> Busy:
    """What clients are told while the server stops."""
    return Busy("the server is stopping", "stopping", seconds)


@dataclass(frozen=True)
class Piece:
    """Some text of an answer; it may be empty."""

    text: str
    rung: int  # that the answer is made under


@dataclass(frozen=True)
class Done:
    """An answer is complete."""

    reason: Literal["stop", "length"]
    tokens: int
    rung: int
    plan: Plan
    kept: Mapping[int, int]  # layer of a token stage -> image tokens left


@dataclass(frozen=True)
class Failed:
    """There will be no more of an answer."""

    error: PlannerError


Event = Piece | Done | Failed


@dataclass(eq=False)
class Job:
    """A request."""

    prompt: Prompt
    new_tokens: int  # the most to generate
    dearest: int  # the rung that its budget allows
    sampler: Sampler
    emit: Callable[[Event], None]  # called in the engine's thread
    stops: tuple[str, ...] = ()  # texts that end the answer
    deadline: Deadline = field(default_factory=Deadline)  # from `arrived` on
    arrived: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    # When its prompt has to be read, to be in time under the cheapest plan; known once it waits.
    latest: float = math.inf

    @property
    def cheapest(self) -> int:
        """The rung under which it can be read if need be."""
        return 0 if self.deadline.is_set else self.dearest
