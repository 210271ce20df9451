"""Requests that wait: those that have to be read first stand in front."""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import attrgetter

from planner.serving.governor import Governor, PromptSize
from planner.serving.jobs import Job

# Nothing is read after what has to be read later than so many seconds after it came.
_PATIENCE = 10.0
# What came in so many seconds is expected to come again.
_PAST = 0.5
# Answers that run are those of the last reads.
_ANSWERS = 3


@dataclass(frozen=True)
class Place:
    """What a request takes of the queue, whether its prompt is known or not."""

    latest: float  # when it has to be read, or it is late; infinite without a deadline
    arrived: float
    rung: int  # the cheapest under which it can be read
    size: PromptSize

    @staticmethod
    def of(job: Job) -> Place:
        """Of a job that waits, or would."""
        return Place(job.latest, job.arrived, job.cheapest, job.prompt.size)

    @property
    def turn(self) -> float:
        """What is read in order of."""
        return min(self.latest, self.arrived + _PATIENCE)


@dataclass(eq=False)
class Waiting:
    """A queue in the order of latest beginnings; `together` prompts are read at a time.

    The near future is taken to be like the near past: as many will come, in as much of a hurry.
    """

    governor: Governor
    together: int
    _jobs: list[Job] = field(default_factory=list)
    _came: deque[Job] = field(default_factory=deque)  # of late, and had deadlines

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def add(self, job: Job) -> None:
        """Put a job in its place; equals keep the order in which they came."""
        insort(self._jobs, job, key=lambda each: Place.of(each).turn)

    def remove(self, job: Job) -> None:
        """Take out a job."""
        self._jobs.remove(job)

    def note(self, job: Job) -> None:
        """One with a deadline has come, to wait or to be refused."""
        self._came.append(job)
        while self._came[0].arrived < job.arrived - _PAST:
            self._came.popleft()

    def seconds(self, running: Sequence[int]) -> float:
        """Of reading all under the cheapest plans; `running` as of `late`."""
        return sum(self._read(group, running) for group in self._groups(map(Place.of, self._jobs)))

    def late(
        self,
        begin: float,
        running: Sequence[int],
        also: Sequence[Place] = (),
        *,
        expecting: bool = False,
    ) -> int:
        """How many would be read too late, under the cheapest plans from `begin` seconds on.

        Args:
            running: rungs of the answers that run.
            also: others that would wait with them.
            expecting: those that are going to come are among them.
        """
        now = time.monotonic()
        places = [*map(Place.of, self._jobs), *also]
        if expecting:
            came = (Place.of(job) for job in self._came if job.arrived >= now - _PAST)
            places += [replace(p, latest=p.latest + _PAST, arrived=p.arrived + _PAST) for p in came]
        # As with what a request takes itself, one wait in a hundred may take longer.
        margin = self.governor.margin.quantile
        wait, late, answers = begin, 0, list(running)
        for group in self._groups(sorted(places, key=attrgetter("turn"))):
            late += sum(now + margin * wait > place.latest for place in group)
            wait += self._read(group, answers)
            answers = [*answers, *(place.rung for place in group)][-_ANSWERS * self.together :]
        return late

    def _groups(self, places: Iterable[Place]) -> Iterator[list[Place]]:
        """Those that are read together."""
        left = iter(places)
        while group := list(islice(left, self.together)):
            yield group

    def _read(self, group: Sequence[Place], running: Sequence[int]) -> float:
        """One read, and the token that running answers get behind it."""
        rungs, sizes = [place.rung for place in group], [place.size for place in group]
        return self.governor.prompt_seconds(rungs, sizes) + self.governor.step_seconds(running)
