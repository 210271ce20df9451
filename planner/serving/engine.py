"""The engine: one thread that admits requests to the running batch and has it make tokens.

Between two steps of the batch a few prompts are read, each under the plan that the governor picks
for it; their answers join the batch at once, whatever plans the others have.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from planner.ir.errors import InputError, PlannerError
from planner.serving.answer_text import AnswerText
from planner.serving.governor import Deadline, Expected, Governor, PromptSize
from planner.serving.jobs import Busy, Done, Failed, Job, Piece, stopping
from planner.serving.ladder import Ladder
from planner.serving.metrics import Metrics
from planner.serving.running_batch import Answer, RunningBatch, alike
from planner.serving.waiting import Place, Waiting

# Tokens of prompts that are read together: the running answers wait meanwhile.
_TOGETHER_TOKENS = 2048
_TOO_LATE = "the deadline cannot be kept with what runs now"


@dataclass(eq=False)
class _Running:
    """A job whose answer is in the batch."""

    job: Job
    rung: int
    answer: Answer
    text: AnswerText
    begun: float  # when its prompt was read
    first_token: float  # when it came
    expected: Expected


@dataclass(frozen=True)
class EngineLimits:
    """How much goes on at once."""

    answers: int = 32  # in the running batch
    waiting: int = 256  # requests that wait for a place in it
    seconds: float = 120.0  # from a request's arrival to its last token
    prompts: int = 8  # read together, between two steps of the batch


class Engine:
    """Runs jobs; see the module. Ladder and governor have the same rungs, the cheapest first."""

    def __init__(
        self,
        batch: RunningBatch,
        tokenizer: Any,
        ladder: Ladder,
        governor: Governor,
        most_tokens: int,  # of a prompt with its answer
        metrics: Metrics,
        limits: EngineLimits,
    ) -> None:
        self.ladder, self.limits, self.metrics = ladder, limits, metrics
        self._batch, self._governor = batch, governor
        # Threads that read prompts have theirs.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._most_answers = limits.answers if batch.can_join else 1
        self._most_cached = self._most_answers * most_tokens
        ends = batch.model.generation_config.eos_token_id
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])
        self._changed = threading.Condition()
        # A scheduler's prompts are read one by one.
        self._waiting = Waiting(governor, 1 if batch.is_scheduled else limits.prompts)
        self._reserved: list[Place] = []  # of prompts that are made ready
        self._reading: list[Job] = []  # taken off the queue, and not in the batch yet
        self._running: list[_Running] = []
        self._is_stopping = self._has_given_up = False
        self._thread = threading.Thread(target=self._run, name="planner-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests, finish those there are, and end."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def give_up(self) -> None:
        """Take no more requests; whoever waits for one is told at once that there is no answer."""
        with self._changed:
            self._is_stopping = self._has_given_up = True
            self._changed.notify()
        for job in self._left():
            self._fail(job, stopping())
            job.is_cancelled = True

    @property
    def is_healthy(self) -> bool:
        """Whether it works, and takes requests."""
        return self._thread.is_alive() and not self._is_stopping

    @contextmanager
    def place(self, deadline: Deadline, arrived: float) -> Iterator[None]:
        """Hold a place in the queue while a prompt is made ready, and until its job is submitted.

        Busy where there is none, or where no prompt at all could be in time, InputError where none
        ever could: to find that out costs next to nothing, unlike making prompts ready.
        """
        if deadline.is_set and not self._governor.is_possible(deadline, PromptSize(0), 1):
            raise self._impossible("any prompt")
        spare = self._governor.seconds_to_spare(deadline, PromptSize(0), 1)
        mine = Place(arrived + spare, arrived, 0, PromptSize(0))
        with self._changed:
            self._check_open()
            if len(self._waiting) + len(self._reserved) >= self.limits.waiting:
                raise self._refusal("too many requests are waiting", "queue")
            if deadline.is_set and self._is_too_much(mine, self._reserved):
                raise self._refusal(_TOO_LATE, "deadline")
            self._reserved.append(mine)
        try:
            yield
        finally:
            with self._changed:
                self._reserved.remove(mine)

    def latest(self, deadline: Deadline, arrived: float) -> tuple[float, Busy]:
        """Until when somebody waits who came then, and what is said to them from then on."""
        due = arrived + min(deadline.whole, deadline.first_token)
        if due < arrived + self.limits.seconds:
            return due, Busy(_TOO_LATE, "deadline", 1)
        return arrived + self.limits.seconds, self._timeout()

    def _timeout(self) -> Busy:
        return Busy(f"no answer within {self.limits.seconds:g} seconds", "timeout", 1)

    def submit(self, job: Job) -> None:
        """Have a job done.

        InputError where its deadline is too short for the cheapest plan on the idle machine, Busy
        where it cannot be kept now.
        """
        with self._changed:
            self._check_open()
            if job.deadline.is_set:
                self._check_deadline(job)
            self._waiting.add(job)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def _check_open(self) -> None:
        if self._is_stopping:
            self.metrics.refused("stopping")
            raise stopping(self._seconds_to_begin())

    def _refusal(self, sentence: str, reason: str) -> Busy:
        self.metrics.refused(reason)
        return Busy(sentence, reason, self._seconds_to_begin())

    def _impossible(self, what: str) -> InputError:
        self.metrics.refused("impossible")
        return InputError(
            "the deadline is too short: not even the cheapest plan on the idle machine keeps it "
            f"for {what}"
        )

    def _check_deadline(self, job: Job) -> None:
        if not self._governor.is_possible(job.deadline, job.prompt.size, job.new_tokens):
            raise self._impossible(
                f"{job.prompt.tokens} tokens of prompt and {job.new_tokens} of answer"
            )
        asked = job.deadline, job.prompt.size, job.new_tokens
        spare = self._governor.seconds_to_spare(*asked, self._running_rungs())
        job.latest = job.arrived + spare
        self._waiting.note(job)
        if self._is_too_much(Place.of(job)):
            raise self._refusal(_TOO_LATE, "deadline")

    def _is_too_much(self, place: Place, beside: Sequence[Place] = ()) -> bool:
        """Whether one more would be late or make one late that waits, or that is `beside` it."""
        rungs, begin = self._running_rungs(), self._seconds_to_place()
        # A machine with nothing to do tries: how else would it learn that it is fast again?
        if not (begin or rungs or self._waiting or beside):
            return False
        with_it = self._waiting.late(begin, rungs, [*beside, place])
        return with_it > self._waiting.late(begin, rungs, beside)

    def _running_rungs(self) -> list[int]:
        return [running.rung for running in list(self._running)]

    def _seconds_to_place(self) -> float:
        """Until there is a place among the running answers for all that wait and for one more."""
        waiting, running = len(self._waiting), list(self._running)
        if not running or len(running) + waiting < self._most_answers:
            return 0.0
        left = min(r.job.new_tokens - len(r.answer.tokens) for r in running)
        step = self._governor.step_seconds([r.rung for r in running])
        # Places become free one by one.
        return left * step * math.ceil((waiting + 1) / self._most_answers)

    def _seconds_to_begin(self) -> float:
        """Until a request that came now, and had no hurry, would be read."""
        return self._waiting.seconds(self._running_rungs()) + self._seconds_to_place()

    def _run(self) -> None:
        """Work to the end; nobody is left waiting where it comes too early."""
        try:
            self._loop()
        except Exception as error:
            with self._changed:
                self._is_stopping = True
            for job in self._left():
                self._fail(job, error)
            raise

    def _left(self) -> list[Job]:
        """All jobs there are."""
        with self._changed:
            left = [*self._waiting, *self._reading, *(r.job for r in list(self._running))]
        return list(dict.fromkeys(left))

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._running:
                    if self._is_stopping:
                        return
                    self._changed.wait()
            self._let_go()
            if self._waiting and len(self._running) < self._most_answers:
                self._reading = self._next_jobs()
                self._read(self._reading)
                self._reading = []
            if self._running:
                self._step()
            self._tell()

    def _let_go(self) -> None:
        """Of jobs that nobody waits for, or that have taken too long."""
        latest = math.inf if self._has_given_up else time.monotonic() - self.limits.seconds
        late = stopping() if self._has_given_up else self._timeout()
        with self._changed:
            gone = [job for job in self._waiting if job.is_cancelled or job.arrived < latest]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            self._fail(job, late)
        for running in list(self._running):
            if running.job.is_cancelled or running.job.arrived < latest:
                self._leave(running)
                self._fail(running.job, late)

    def _fail(self, job: Job, error: Exception) -> None:
        if job.is_cancelled:
            self.metrics.aborted()
            return
        if isinstance(error, Busy):
            self.metrics.refused(error.reason)
        known = error if isinstance(error, PlannerError) else None
        job.emit(Failed(known or PlannerError(f"the model failed: {type(error).__name__}")))

    def _read(self, jobs: Sequence[Job]) -> None:
        """Read prompts that go together."""
        rungs, sizes = self._rungs_of(jobs), [job.prompt.size for job in jobs]
        expected = self._governor.expect(rungs, sizes, [r.rung for r in self._running])
        begun = time.monotonic()
        try:
            answers = self._batch.read(
                [job.prompt.inputs for job in jobs],
                [self.ladder.rungs[rung] for rung in rungs],
                [job.sampler for job in jobs],
                [job.prompt.asked for job in jobs],
            )
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            # One of them was it; the others have done nothing.
            for job in jobs:
                self._read([job])
            return
        now = time.monotonic()
        self._governor.read(rungs, sizes, now - begun)
        self.metrics.prompt_tokens.inc(sum(job.prompt.tokens for job in jobs))
        for job, rung, answer in zip(jobs, rungs, answers, strict=True):
            self.metrics.queued.observe(begun - job.arrived)
            self.metrics.first_token.observe(now - job.arrived)
            text = AnswerText(self._tokenizer, job.stops)
            self._running.append(_Running(job, rung, answer, text, begun, now, expected))
        for running in self._running[-len(jobs) :]:
            self._say(running)

    def _next_jobs(self) -> list[Job]:
        """The first of the queue, and those behind it that can be read with it."""
        room = min(self._most_answers - len(self._running), self.limits.prompts)
        with self._changed:
            first, *others = self._waiting
            jobs, kind, tokens = [first], alike(first.prompt.inputs), first.prompt.tokens
            for job in others[: room - 1]:
                tokens += job.prompt.tokens
                if tokens > _TOGETHER_TOKENS or alike(job.prompt.inputs) != kind:
                    break
                jobs.append(job)
            for job in jobs:
                self._waiting.remove(job)
        return jobs

    def _rungs_of(self, jobs: Sequence[Job]) -> list[int]:
        """The rungs for jobs that are read now; one for all with deadlines: every other plan of a
        batch costs calls of its own.

        It is the dearest that keeps their deadlines and makes none late that waits or is expected.
        """
        # They were accepted; where things have become worse since, the cheapest plan is best.
        picked = [self._rung_for(job) or 0 for job in jobs if job.deadline.is_set]
        # One rung less for every read that waits: what is kept free now is there for others.
        reads = math.ceil(len(self._waiting) / self.limits.prompts)
        rung = max(0, min(picked, default=0) - reads)
        if rung:
            fewest = self._late_behind(jobs, 0)
            while rung and self._late_behind(jobs, rung) > fewest:
                rung -= 1
        return [rung if job.deadline.is_set else job.dearest for job in jobs]

    def _late_behind(self, jobs: Sequence[Job], rung: int) -> int:
        """How many that wait would be late if jobs were read under a rung now."""
        rungs = [rung if job.deadline.is_set else job.dearest for job in jobs]
        running = [*self._running_rungs(), *rungs]
        begin = self._governor.prompt_seconds(rungs, [job.prompt.size for job in jobs])
        with self._changed:
            begin += self._governor.step_seconds(running)
            return self._waiting.late(begin, running, expecting=True)

    def _rung_for(self, job: Job) -> int | None:
        return self._governor.choose(
            job.deadline,
            job.prompt.size,
            job.new_tokens,
            dearest=job.dearest,
            waited=time.monotonic() - job.arrived,
            running=self._running_rungs(),
        )

    def _step(self) -> None:
        rungs = [running.rung for running in self._running]
        begun = time.monotonic()
        try:
            self._batch.step()
        except Exception as error:
            for running in list(self._running):
                self._leave(running)
                self._fail(running.job, error)
            return
        self._governor.stepped(rungs, time.monotonic() - begun)
        for running in list(self._running):
            if running.answer.failure is not None:
                self._leave(running)
                self._fail(running.job, running.answer.failure)
            else:
                self._say(running)

    def _say(self, running: _Running) -> None:
        """Pass on the last token of an answer, and its end where it is the end."""
        job, answer, text = running.job, running.answer, running.text
        is_end = answer.tokens[-1] in self._ends
        piece = "" if is_end else text.add(answer.tokens[-1])
        is_last = is_end or text.is_stopped or len(answer.tokens) >= job.new_tokens
        if is_last and not text.is_stopped:
            piece += text.end()
        job.emit(Piece(piece, running.rung))
        if is_last:
            self._leave(running)
            reason: Literal["stop", "length"] = "stop" if is_end or text.is_stopped else "length"
            self._note(running, reason)
            count = len(answer.tokens)
            job.emit(Done(reason, count, running.rung, answer.plan, answer.kept))

    def _note(self, running: _Running, reason: str) -> None:
        """An answer is complete."""
        job, count = running.job, len(running.answer.tokens)
        now = time.monotonic()
        self._governor.finished(running.expected, count, now - running.begun)
        first, whole = running.first_token - job.arrived, now - job.arrived
        per_token = (now - running.first_token) / (count - 1) if count > 1 else 0.0
        self.metrics.finished(reason, self.ladder.rungs[running.rung].budget)
        self.metrics.new_tokens.inc(count)
        self.metrics.whole.observe(whole)
        if count > 1:
            self.metrics.per_token.observe(per_token)
        if job.deadline.is_set:
            due = job.deadline
            kept = whole <= due.whole and first <= due.first_token and per_token <= due.per_token
            self.metrics.deadline(kept)

    def _leave(self, running: _Running) -> None:
        self._batch.drop(running.answer)
        self._running.remove(running)

    def _tell(self) -> None:
        cached = sum(running.answer.cached.length for running in self._running)
        self.metrics.running.set(len(self._running))
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.kv_use.set(cached / self._most_cached)
        self.metrics.slow_down.set(self._governor.prompts.median)
