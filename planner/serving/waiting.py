"""Requests that wait: those that have to be read first stand in front."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from planner.serving.governor import Governor, PromptSize
from planner.serving.jobs import Job

# A request without a deadline is read before those whose deadlines come so many seconds after it.
_PATIENCE = 10.0


@dataclass(eq=False)
class Waiting:
    """A queue in the order of latest beginnings; `together` prompts are read at a time."""

    governor: Governor
    together: int
    _jobs: list[Job] = field(default_factory=list)

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

    def seconds(
        self, jobs: Sequence[Job], running: Sequence[int], more: Sequence[PromptSize] = ()
    ) -> float:
        """Of reading jobs, and other prompts, under the cheapest plans; answers of rungs run."""
        known = [*_rungs_and_sizes(jobs), *((0, size) for size in more)]
        groups = range(0, len(known), self.together)
        return sum(self._read(known[at : at + self.together], running) for at in groups)

    def late(self, begin: float, running: Sequence[int], also: Job | None = None) -> int:
        """How many would be read too late, under the cheapest plans from `begin` seconds on.

        `also`: a job that would wait with them. `running`: rungs of the answers that run.
        """
        jobs = [*self._jobs] if also is None else sorted([*self._jobs, also], key=_order)
        moment, late = time.monotonic() + begin, 0
        for at in range(0, len(jobs), self.together):
            group = jobs[at : at + self.together]
            late += sum(job.deadline.is_set and moment > job.latest for job in group)
            moment += self._read(_rungs_and_sizes(group), running)
        return late

    def _read(self, known: Sequence[tuple[int, PromptSize]], running: Sequence[int]) -> float:
        """One read, and the token that running answers get behind it."""
        rungs, sizes = zip(*known, strict=True)
        return self.governor.prompt_seconds(rungs, sizes) + self.governor.step_seconds(running)


def _rungs_and_sizes(jobs: Sequence[Job]) -> list[tuple[int, PromptSize]]:
    return [(job.cheapest, job.prompt.size) for job in jobs]


def _order(job: Job) -> float:
    return min(job.latest, job.arrived + _PATIENCE)
