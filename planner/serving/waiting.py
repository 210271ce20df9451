"""Requests that wait: those that have to be read first stand in front."""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from planner.serving.governor import Governor, PromptSize
from planner.serving.jobs import Job

# A request without a deadline is read before those whose deadlines come so many seconds after it.
_PATIENCE = 10.0
# What came in so many seconds is expected to come again.
_PAST = 0.5
# Answers that run are those of the last reads.
_ANSWERS = 3


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
        insort(self._jobs, job, key=_order)

    def remove(self, job: Job) -> None:
        """Take out a job."""
        self._jobs.remove(job)

    def note(self, job: Job) -> None:
        """One with a deadline has come, to wait or to be refused."""
        self._came.append(job)
        while self._came[0].arrived < job.arrived - _PAST:
            self._came.popleft()

    def seconds(
        self, jobs: Sequence[Job], running: Sequence[int], more: Sequence[PromptSize] = ()
    ) -> float:
        """Of reading jobs, and other prompts, under the cheapest plans; answers of rungs run."""
        known = [*_rungs_and_sizes(jobs), *((0, size) for size in more)]
        groups = range(0, len(known), self.together)
        return sum(self._read(known[at : at + self.together], running) for at in groups)

    def late(
        self,
        begin: float,
        running: Sequence[int],
        also: Job | None = None,
        *,
        expecting: bool = False,
    ) -> int:
        """How many would be read too late, under the cheapest plans from `begin` seconds on.

        Args:
            running: rungs of the answers that run.
            also: a job that would wait with them.
            expecting: those that are going to come are among them.
        """
        now = time.monotonic()
        known = [(_order(job), job) for job in self._jobs]
        if expecting:
            came = (job for job in self._came if job.arrived >= now - _PAST)
            known += [(_order(job) + _PAST, job) for job in came]
        if also is not None:
            known.append((_order(also), also))
        known.sort(key=itemgetter(0))
        moment, late, answers = now + begin, 0, list(running)
        for at in range(0, len(known), self.together):
            group = known[at : at + self.together]
            late += sum(job.deadline.is_set and moment > latest for latest, job in group)
            jobs = [job for _, job in group]
            moment += self._read(_rungs_and_sizes(jobs), answers)
            answers = [*answers, *(job.cheapest for job in jobs)][-_ANSWERS * self.together :]
        return late

    def _read(self, known: Sequence[tuple[int, PromptSize]], running: Sequence[int]) -> float:
        """One read, and the token that running answers get behind it."""
        rungs, sizes = zip(*known, strict=True)
        return self.governor.prompt_seconds(rungs, sizes) + self.governor.step_seconds(running)


def _rungs_and_sizes(jobs: Sequence[Job]) -> list[tuple[int, PromptSize]]:
    return [(job.cheapest, job.prompt.size) for job in jobs]


def _order(job: Job) -> float:
    return min(job.latest, job.arrived + _PATIENCE)
