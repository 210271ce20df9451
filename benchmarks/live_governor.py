"""The governor of `planner serve` on this machine: half of it is taken, and given back.

    python benchmarks/live_governor.py [--model tiny-llava] [--switches layers]
        [--budgets 0.5,1] [--slack 1.6] [--trace 16,64,16] [--cycles 4] [--output FOLDER]

Questions about scenes go through the server's engine one by one, on a ladder of plans. This process
runs on one core, by one thread. In the middle of every cycle another process is busy on the same
core: it takes half of it. All have the same deadline, `--slack` times what the base model takes
while the machine is idle (median). In every round each policy answers the same question, in random
order: planner's governor, AIMD, PID, and every plan alone, of which the base model is a server
without a governor. The oracle takes, afterwards, the dearest plan that was in time in that round.
A governor knows what its own requests took, and nothing else.

Nothing is reported unless the base plan's answers are the stock model's, every plan answers a
question the same way whoever picked it, and the other process did take half. `--output` writes
`governor.json` and a picture, `governor.svg`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any

import numpy as np
import torch
from governor import AIMD, PID, Policy, Static
from numpy.typing import NDArray

from planner.cli.command_options import parse_fractions
from planner.cli.console import print_records
from planner.files import write_text
from planner.loading import count_image_tokens, load_model, prompt_inputs
from planner.models.profiling.device_profile import machine_of
from planner.serving.chat_prompts import Prompt, PromptReader
from planner.serving.engine import Engine, EngineLimits
from planner.serving.governor import Deadline, Governor, RungTimes
from planner.serving.jobs import Busy, Done, Event, Failed, Job, Piece
from planner.serving.ladder import Ladder
from planner.serving.metrics import Metrics
from planner.serving.opening import prompt_limits
from planner.serving.running_batch import RunningBatch, Sampler
from planner.serving.warm_up import make_ladder, measure_rungs
from planner.training.data import SceneQuestions, Turn
from planner.training.evaluate import score
from planner.training.experiments.results_page import figure_as_svg

FAMILIES = ("existence", "attribute", "count", "spatial")
# A word and the end.
NEW_TOKENS = 2
# Rounds after a step that are not the steady state.
SETTLING = 5
# How much slower the machine is when half of it is taken, give or take.
HALF = (1.6, 2.5)


class Invalid(Exception):
    """What is measured is not what it should be."""


@dataclass(frozen=True)
class Question:
    """A question about a scene."""

    turn: Turn
    prompt: Prompt
    stock: str  # what the stock model answers


@dataclass(frozen=True)
class Answered:
    """What came of a request."""

    seconds: float
    rung: int
    text: str


@dataclass
class Server:
    """A policy and the engine that it has to itself; without one the engine's governor picks."""

    engine: Engine
    deadline: float
    policy: Policy | None = None
    answers: list[Answered | None] = field(default_factory=list)  # None where it was refused

    def ask(self, question: Question) -> None:
        """Have a question answered."""
        rung = len(self.engine.ladder.rungs) - 1 if self.policy is None else self.policy.pick(0.0)
        deadline = Deadline(self.deadline) if self.policy is None else Deadline()
        answer = answered(self.engine, question.prompt, rung, deadline)
        self.answers.append(answer)
        if self.policy is not None and answer is not None:
            self.policy.learn(rung, 0.0, 0.0, answer.seconds / self.deadline - 1)


def answered(engine: Engine, prompt: Prompt, rung: int, deadline: Deadline) -> Answered | None:
    """Have an engine answer one prompt; None where it refuses to."""
    ended: SimpleQueue[tuple[float, Event]] = SimpleQueue()
    texts: list[str] = []

    def emit(event: Event) -> None:
        if isinstance(event, Piece):
            texts.append(event.text)
        else:
            ended.put((time.monotonic(), event))

    job = Job(prompt, NEW_TOKENS, rung, Sampler(0.0), emit, deadline=deadline)
    try:
        engine.submit(job)
    except Busy:
        return None
    end, event = ended.get()
    if isinstance(event, Failed):
        raise event.error
    assert isinstance(event, Done)
    return Answered(end - job.arrived, event.rung, "".join(texts).strip())


def served(answer: Answered | None) -> Answered:
    """What came of a request that had no deadline; Invalid where it was refused."""
    if answer is None:
        raise Invalid("a request without a deadline was refused")
    return answer


@contextmanager
def competitor(core: int) -> Iterator[Callable[[bool], None]]:
    """Another process that is busy on a core while it is told to be."""
    with subprocess.Popen([sys.executable, "-ISc", "while True: pass"]) as process:
        os.sched_setaffinity(process.pid, {core})
        process.send_signal(signal.SIGSTOP)
        try:
            yield lambda busy: process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)
        finally:
            process.kill()


def questions(model: Any, processor: Any, count: int) -> list[Question]:
    """Questions that one word answers, with the stock model's answers."""
    tokenizer, found = processor.tokenizer, []
    for sample in SceneQuestions("test", 100 * count, families=FAMILIES):
        (turn,) = sample.turns
        if len(tokenizer(turn.answer, add_special_tokens=False).input_ids) >= NEW_TOKENS:
            continue
        inputs = prompt_inputs(model, processor, turn.question, sample.image)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        length = inputs["input_ids"].shape[1]
        stock = tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()
        prompt = Prompt(inputs, length, count_image_tokens(model, inputs), (turn.question,))
        found.append(Question(turn, prompt, stock))
        if len(found) == count:
            return found
    raise AssertionError("scenes do not run out")


@dataclass(frozen=True)
class Bench:
    """A model under a ladder of plans, and what is asked of it."""

    batch: RunningBatch
    tokenizer: Any
    ladder: Ladder
    times: Sequence[RungTimes]
    questions: Sequence[Question]

    @classmethod
    def of(cls, model: str, switches: str, budgets: Sequence[float], count: int) -> Bench:
        """As a server opens it."""
        loaded, processor, _ = load_model(model)
        asked = questions(loaded, processor, count)
        say = lambda stage: print(stage, file=sys.stderr)  # noqa: E731
        ladder = make_ladder(loaded, processor, budgets, "auto", {"switches": switches}, say)
        batch = RunningBatch(loaded)
        reader = PromptReader(loaded, processor, prompt_limits(loaded))
        times = measure_rungs(batch, ladder, reader, say)
        return cls(batch, processor.tokenizer, ladder, times, asked)

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """One that works, with a governor that has seen nothing yet."""
        metrics, limits = Metrics("live"), EngineLimits()
        governor = Governor(self.times)
        engine = Engine(self.batch, self.tokenizer, self.ladder, governor, 4096, metrics, limits)
        engine.start()
        try:
            yield engine
        finally:
            engine.stop()

    def seconds(self, rung: int, count: int) -> float:
        """Of a request on the machine as it is now; median."""
        with self.engine() as engine:
            return median(
                served(answered(engine, question.prompt, rung, Deadline())).seconds
                for question in self.questions[:count]
            )


def run(
    bench: Bench, slack: float, is_busy: Sequence[bool], tell: Callable[[bool], None]
) -> tuple[float, dict[str, Server]]:
    """The deadline, and all policies with what they answered, round by round.

    `is_busy`: whether the machine is shared in a round; `tell` makes it so.
    """
    top = len(bench.ladder.rungs) - 1
    idle = [bench.seconds(rung, 30) for rung in range(top + 1)]
    deadline, shares = slack * idle[top], [seconds / idle[top] for seconds in idle]
    policies: dict[str, Policy | None] = {
        "governor": None,
        "AIMD": AIMD(shares),
        "PID": PID(shares),
        **{f"plan {r.budget:g}": Static(n) for n, r in enumerate(bench.ladder.rungs)},
    }
    rng = random.Random(0)
    with ExitStack() as stack:
        servers = {
            name: Server(stack.enter_context(bench.engine()), deadline, policy)
            for name, policy in policies.items()
        }
        was_busy = False
        for busy, question in zip(is_busy, bench.questions, strict=True):
            if busy != was_busy:
                tell(busy)
                print("half is taken" if busy else "and given back", file=sys.stderr)
            was_busy = busy
            for server in rng.sample(list(servers.values()), len(servers)):
                server.ask(question)
    return deadline, servers


@dataclass(frozen=True)
class Trace:
    """What happened, round by round."""

    is_busy: NDArray[np.bool_]
    deadline: float
    questions: Sequence[Question]
    answers: dict[str, Sequence[Answered | None]]  # policy -> a round's

    @property
    def steps(self) -> NDArray[np.int64]:
        """Rounds in which the machine has changed."""
        return np.flatnonzero(np.diff(self.is_busy)) + 1

    @property
    def is_steady(self) -> NDArray[np.bool_]:
        """Rounds that are long enough behind a change."""
        steady = np.ones(len(self.is_busy), bool)
        for step in self.steps:
            steady[step : step + SETTLING] = False
        return steady

    def seconds(self, policy: str) -> NDArray[np.float64]:
        """Of its requests; those that were refused took forever."""
        return np.array([np.inf if a is None else a.seconds for a in self.answers[policy]])

    def rungs(self, policy: str) -> NDArray[np.int64]:
        """That it picked; -1 where it refused."""
        return np.array([-1 if a is None else a.rung for a in self.answers[policy]])

    def figures(self, policy: str) -> dict[str, Any]:
        """What it came to."""
        in_time = self.seconds(policy) <= self.deadline
        right = np.array(
            [
                0.0 if a is None else score(q.turn, a.text)
                for q, a in zip(self.questions, self.answers[policy], strict=True)
            ]
        )
        switched = np.diff(self.rungs(policy), prepend=self.rungs(policy)[0]) != 0
        return {
            "policy": policy,
            "kept": float(in_time.mean()),
            "steady": float(in_time[self.is_steady].mean()),
            "seconds": [bool(in_time[step + 1]) for step in self.steps],
            "accuracy": float(right.mean()),
            "hits": float((right * in_time).mean()),
            "switches": float(switched[self.is_steady].mean()),
        }

    def oracle(self, statics: Sequence[str]) -> list[Answered | None]:
        """In every round the last of these that was in time, the first where none was."""
        chosen = []
        for row in zip(*(self.answers[name] for name in statics), strict=True):
            in_time = [a for a in row if a is not None and a.seconds <= self.deadline]
            chosen.append(in_time[-1] if in_time else row[0])
        return chosen


def check(trace: Trace, statics: Sequence[str]) -> None:
    """Invalid unless the trace shows what it should."""
    plans = [[served(answer) for answer in trace.answers[name]] for name in statics]
    for question, own in zip(trace.questions, plans[-1], strict=True):
        if own.text != question.stock:
            raise Invalid(f"'{own.text}' is not the stock model's answer '{question.stock}'")
    for policy, answers in trace.answers.items():
        for number, answer in enumerate(answers):
            if answer is not None and answer.text != plans[answer.rung][number].text:
                raise Invalid(f"'{answer.text}' is not what the plan that {policy} took answers")
    base, busy = trace.seconds(statics[-1]), trace.is_busy
    slow = float(np.median(base[busy & trace.is_steady]) / np.median(base[~busy]))
    if not HALF[0] <= slow <= HALF[1]:
        raise Invalid(f"the other process made the base model {slow:.2f} times slower, not twice")


def goals(trace: Trace, rows: Sequence[dict[str, Any]], statics: Sequence[str]) -> dict[str, Any]:
    """What the governor is held to: goal -> (what it came to, whether that is enough)."""
    by_name = {row["policy"]: row for row in rows}
    own, oracle = by_name["governor"], by_name["oracle"]
    as_right = [by_name[s] for s in statics if by_name[s]["accuracy"] >= own["accuracy"]]
    best = max((row["kept"] for row in as_right), default=float("nan"))
    found = {
        "deadlines kept, at least 95 %": (own["kept"], own["kept"] >= 0.95),
        "in the steady state, 99 %": (own["steady"], own["steady"] >= 0.99),
        "second request after a step": (np.mean(own["seconds"]), all(own["seconds"])),
        "steady requests with another plan, at most 5 %": (
            own["switches"],
            own["switches"] <= 0.05,
        ),
        "accuracy over the oracle's, at least .98": (
            own["accuracy"] / oracle["accuracy"],
            own["accuracy"] >= 0.98 * oracle["accuracy"],
        ),
        "hits over the best plan's of that accuracy, at least 2": (
            own["kept"] / best,
            own["kept"] >= 2 * best,
        ),
    }
    return {goal: {"is": float(value), "met": bool(met)} for goal, (value, met) in found.items()}


def picture(trace: Trace, statics: Sequence[str]) -> bytes:
    """Seconds of every request over the trace, and which plan the governor took; SVG."""
    shown = {statics[-1]: "tab:red", statics[0]: "tab:blue", "governor": "black"}
    with figure_as_svg((8, 4.5), font_size=9) as (figure, drawn):
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for name, colour in shown.items():
            label = f"{name} (base model)" if name == statics[-1] else name
            above.plot(1000 * trace.seconds(name), ".", color=colour, markersize=3, label=label)
        above.axhline(1000 * trace.deadline, color="gray", linewidth=1, label="deadline")
        above.set_ylabel("milliseconds")
        above.set_ylim(0, 4000 * trace.deadline / 1.5)
        above.legend(loc="upper right", ncols=4)
        below.step(range(len(trace.is_busy)), trace.rungs("governor"), "k", where="mid")
        below.set_yticks(range(len(statics)), [name.removeprefix("plan ") for name in statics])
        below.set(xlabel="request", ylabel="governor's plan")
        for axes in (above, below):
            for begin, end in pairwise(np.append(trace.steps, len(trace.is_busy))):
                if trace.is_busy[begin]:
                    axes.axvspan(begin - 0.5, end - 0.5, color="gold", alpha=0.25, linewidth=0)
    return drawn.getvalue()


def write(folder: Path, document: dict[str, Any], trace: Trace, statics: Sequence[str]) -> None:
    """The figures, every request, and the picture."""
    requests = {
        name: {
            "ms": [round(1000 * s, 1) if s < np.inf else None for s in trace.seconds(name)],
            "plan": trace.rungs(name).tolist(),
        }
        for name in trace.answers
    }
    text = json.dumps({**document, "requests": requests})
    write_text(folder / "governor.json", text + "\n")
    (folder / "governor.svg").write_bytes(picture(trace, statics))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--switches", default="layers", help="as for planner serve")
    parser.add_argument("--budgets", default="0.5,1", help="of the ladder; the last is 1")
    parser.add_argument("--slack", type=float, default=1.6)
    parser.add_argument("--trace", default="16,64,16", help="rounds alone, shared, alone")
    parser.add_argument("--cycles", type=int, default=4)
    parser.add_argument("--output", type=Path, help="folder")
    given = parser.parse_args()
    before, shared, after = map(int, given.trace.split(","))
    cycle = [False] * before + [True] * shared + [False] * after
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    is_busy = cycle * given.cycles
    bench = Bench.of(given.model, given.switches, parse_fractions(given.budgets), len(is_busy))
    statics = [f"plan {rung.budget:g}" for rung in bench.ladder.rungs]
    with competitor(core) as tell:
        deadline, servers = run(bench, given.slack, is_busy, tell)
    answers: dict[str, Sequence[Answered | None]] = {n: s.answers for n, s in servers.items()}
    trace = Trace(np.array(is_busy), deadline, bench.questions, answers)
    trace.answers["oracle"] = trace.oracle(statics)
    try:
        check(trace, statics)
    except Invalid as error:
        print(f"nothing to report: {error}", file=sys.stderr)
        return 1
    rows = [trace.figures(name) for name in trace.answers]
    document = {
        "date": date.today().isoformat(),
        "machine": machine_of(torch.device("cpu")),
        "model": given.model,
        "plans": [[r.budget, list(r.plan.layers_off)] for r in bench.ladder.rungs],
        "trace": [int(b) for b in (before, shared, after, given.cycles)],
        "deadline_ms": round(1000 * deadline, 2),
        "policies": rows,
        "goals": goals(trace, rows, statics),
    }
    if given.output is not None:
        write(given.output, document, trace, statics)
    show(document)
    return 0


def show(document: dict[str, Any]) -> None:
    """In words."""
    columns = {
        "policy": "{policy}",
        "kept": "{kept:.1%}",
        "steady": "{steady:.1%}",
        "accuracy": "{accuracy:.3f}",
        "in time and right": "{hits:.3f}",
        "switches": "{switches:.1%}",
    }
    print(document["model"], document["machine"], f"deadline {document['deadline_ms']} ms")
    print_records(columns, document["policies"])
    for goal, came in document["goals"].items():
        print(f"{'met   ' if came['met'] else 'MISSED'} {goal}: {came['is']:.3f}")


if __name__ == "__main__":
    sys.exit(main())
