"""Deadlines kept by the governor of `planner serve`, beside other ways, on a simulated machine.

    python benchmarks/governor.py [--requests 2000] [--seed 0] [--json]

A trace says how much slower than idle the machine is for every request, and how long the request
has waited; policies see what each has taken, never the trace. All pick from the same ladder of
plans. Static plans, AIMD and PID are what one would write first; the oracle knows the trace and
takes the best plan in time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planner.cli.console import print_json, print_records
from planner.serving.governor import Deadline, Governor, PromptSize, RungTimes

# Share of the base model's time, and of its accuracy, as tiny-llava's plans have them about.
LADDER = ((0.5, 0.90), (0.65, 0.96), (0.85, 0.99), (1.0, 1.0))
SHARES = [share for share, _ in LADDER]
RUNGS = [
    RungTimes(0.004 * share, 0.0004 * share, 0.0, 0.008 * share, 0.001 * share) for share in SHARES
]
PROMPT, NEW = PromptSize(120), 16
# Of the base model's seconds on the idle machine.
SLACK = 1.25
# Requests after a step of the machine that are not its steady state.
SETTLING = 20
Trace = NDArray[np.float64]  # (2, requests): slow-down, seconds waited


class Policy(Protocol):
    """Picks rungs, and is told what came of it."""

    def pick(self, waited: float) -> int:
        """The rung of the next request."""
        ...

    def learn(self, rung: int, prompt: float, token: float, late: float) -> None:
        """What it took, in seconds, and the share of its deadline by which it was late."""
        ...


class Governed:
    """planner's own."""

    def __init__(self, deadline: float) -> None:
        self.governor = Governor(RUNGS)
        self.deadline = Deadline(deadline)

    def pick(self, waited: float) -> int:
        """As the engine does."""
        top = len(RUNGS) - 1
        found = self.governor.choose(self.deadline, PROMPT, NEW, dearest=top, waited=waited)
        return found or 0

    def learn(self, rung: int, prompt: float, token: float, late: float) -> None:
        """As the engine does."""
        expected = self.governor.expect([rung], [PROMPT])
        self.governor.read([rung], [PROMPT], prompt)
        for _ in range(NEW - 1):
            self.governor.stepped([rung], token)
        self.governor.finished(expected, NEW, prompt + (NEW - 1) * token)


@dataclass
class Static:
    """One plan for all; the dearest is a server without a governor."""

    rung: int

    def pick(self, waited: float) -> int:
        """It."""
        return self.rung

    def learn(self, rung: int, prompt: float, token: float, late: float) -> None:
        """Nothing."""


@dataclass
class ByShare:
    """Lets plans take a share of the base model's time, and takes the dearest one within it."""

    shares: Sequence[float]  # that each plan of the ladder takes, ascending to 1
    share: float = 1.0

    def pick(self, waited: float) -> int:
        """The dearest plan within the share."""
        return max((r for r, s in enumerate(self.shares) if s <= self.share + 1e-9), default=0)


@dataclass
class AIMD(ByShare):
    """Additive increase, multiplicative decrease of the share."""

    def learn(self, rung: int, prompt: float, token: float, late: float) -> None:
        """Halve when late."""
        wanted = self.share / 2 if late > 0 else self.share + 0.02
        self.share = float(np.clip(wanted, self.shares[0], 1.0))


@dataclass
class PID(ByShare):
    """A controller of the share, which holds seconds at nine tenths of the deadline."""

    total: float = 0.0
    last: float = 0.0

    def learn(self, rung: int, prompt: float, token: float, late: float) -> None:
        """Gains by Ziegler and Nichols' rule for the simulator's ladder, by trial."""
        error = -late - 0.1
        self.total = float(np.clip(self.total + error, -2, 2))
        wanted = 0.8 + 0.4 * error + 0.15 * self.total + 0.1 * (error - self.last)
        self.share, self.last = float(np.clip(wanted, self.shares[0], 1.0)), error


def seconds_of(rung: int, slow: float) -> tuple[float, float, float]:
    """Of a prompt, a token, and the whole of a request."""
    prompt, token = slow * RUNGS[rung].prompt(PROMPT), slow * RUNGS[rung].step(1)
    return prompt, token, prompt + (NEW - 1) * token


def traces(requests: int, rng: np.random.Generator) -> dict[str, tuple[Trace, Sequence[int]]]:
    """Name -> the trace, and where the machine steps to another speed."""
    noise = np.exp(rng.normal(0, 0.03, requests))
    nothing = np.zeros(requests)
    places = np.arange(requests)
    half = np.where((places // (requests // 4)) % 2 == 1, 1.8, 1.0)
    throttled = 1 + 0.8 * np.clip((places - requests / 4) / (requests / 4), 0, 1)
    pressed = np.where(rng.random(requests) < 0.02, 2.5, 1.0)
    bursts = np.where((places % 100) < 15, 0.25 * seconds_of(3, 1.0)[2], 0.0)
    steps = [int(place) + 1 for place in np.flatnonzero(np.diff(half))]
    return {
        "idle": (np.stack([noise, nothing]), ()),
        "half of the cores taken": (np.stack([half * noise, nothing]), steps),
        "throttling": (np.stack([throttled * noise, nothing]), ()),
        "memory pressure": (np.stack([pressed * noise, nothing]), ()),
        "bursts": (np.stack([noise, bursts]), ()),
    }


def replay(policy: Policy, trace: Trace, steps: Sequence[int], deadline: float) -> dict[str, float]:
    """One policy over a trace: share of deadlines kept, overall and in the steady state, ..."""
    rungs, kept = [], []
    for slow, waited in trace.T:
        rung = policy.pick(waited)
        prompt, token, whole = seconds_of(rung, slow)
        late = (waited + whole) / deadline - 1
        policy.learn(rung, prompt, token, late)
        rungs.append(rung)
        kept.append(late <= 0)
    hit, chosen = np.array(kept), np.array(rungs)
    steady = np.ones(len(hit), bool)
    for step in steps:
        steady[step : step + SETTLING] = False
    accuracy = np.array([worth for _, worth in LADDER])[chosen]
    return {
        "kept": float(hit.mean()),
        "steady": float(hit[steady].mean()),
        "second": float(np.mean([hit[step + 1] for step in steps])) if steps else float("nan"),
        "accuracy": float(accuracy.mean()),
        "score": float((accuracy * hit).mean()),
        "switches": float(np.count_nonzero(np.diff(chosen)) / len(chosen)),
    }


def oracle(trace: Trace, deadline: float) -> dict[str, float]:
    """The best plan in time for every request, the cheapest where none is."""
    rungs = [
        max(
            (r for r in range(len(RUNGS)) if waited + seconds_of(r, slow)[2] <= deadline), default=0
        )
        for slow, waited in trace.T
    ]
    return replay(_Replayed(iter(rungs).__next__), trace, (), deadline)


@dataclass
class _Replayed:
    next: Callable[[], int]

    def pick(self, waited: float) -> int:
        return self.next()

    def learn(self, rung: int, prompt: float, token: float, late: float) -> None: ...


def measure(requests: int, seed: int) -> list[dict[str, object]]:
    """A row a trace and policy."""
    deadline = SLACK * seconds_of(len(RUNGS) - 1, 1.0)[2]
    rows: list[dict[str, object]] = []
    for name, (trace, steps) in traces(requests, np.random.default_rng(seed)).items():
        policies: dict[str, Policy] = {
            "governor": Governed(deadline),
            "none (base model)": Static(len(RUNGS) - 1),
            **{f"static {LADDER[r][0]:g}": Static(r) for r in range(len(RUNGS) - 1)},
            "AIMD": AIMD(SHARES),
            "PID": PID(SHARES),
        }
        for called, policy in policies.items():
            rows.append({"trace": name, "policy": called, **replay(policy, trace, steps, deadline)})
        rows.append({"trace": name, "policy": "oracle", **oracle(trace, deadline)})
    return rows


def pick_seconds(picks: int = 10_000) -> float:
    """Of one choice, on this machine."""
    policy = Governed(1.0)
    begun = time.perf_counter()
    for _ in range(picks):
        policy.pick(0.0)
    return (time.perf_counter() - begun) / picks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments.requests, arguments.seed)
    seconds = pick_seconds()
    if arguments.json:
        print_json({"rows": rows, "pick_seconds": seconds})
        return
    print_records(
        {
            "trace": "{trace}",
            "policy": "{policy}",
            "kept": "{kept:.1%}",
            "steady": "{steady:.1%}",
            "second": "{second:.0%}",
            "accuracy": "{accuracy:.3f}",
            "in time": "{score:.3f}",
            "switches": "{switches:.1%}",
        },
        rows,
    )
    print(f"one choice takes {seconds * 1e6:.0f} us")


if __name__ == "__main__":
    main()
