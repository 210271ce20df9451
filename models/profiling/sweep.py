"""Every case timed round by round, and tables made of the medians.

What was timed is kept beside the output after every few cases, so that a run that is cut short goes
on where it was.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import isotonic_regression

from planner.documents import read_json, validated
from planner.files import write_text
from planner.ir.cost.measured_device import Table
from planner.ir.errors import InputError
from planner.models.profiling.operator_cases import AXES, Bench, Case
from planner.models.profiling.pace import PacedStopwatch, Taken
from planner.models.profiling.stopwatch import stopwatch_for
from planner.progress import Progress

# A case is repeated until it has taken so long, at most so often.
_SECONDS, _REPEATS = 2e-3, 100
_SAVED_EVERY = 200


@dataclass(frozen=True)
class Partial:
    """What was timed so far, kept in a file from which a run that was cut short goes on.

    Attributes:
        facts: that what was timed depends on.
        taken: by key, every time.
    """

    path: Path
    facts: Any
    taken: dict[str, list[Taken]]

    @staticmethod
    def at(path: Path, facts: Any) -> Partial:
        """What the file has; InputError where that was timed under other facts."""
        facts = json.loads(json.dumps(facts))
        if not path.is_file():
            return Partial(path, facts, {})
        document = read_json(path, "partial calibration")
        is_one = isinstance(document, dict) and "taken" in document
        if not is_one or document.get("facts") != facts:
            raise InputError(
                f"'{path}' is of another machine, version or other options: delete it to begin anew"
            )
        taken = validated(dict[str, list[Taken]], document.get("taken"), f"'{path}'")
        return Partial(path, facts, taken)

    @property
    def pace(self) -> float:
        """The usual one of the machine, while all that was timed."""
        return median(one.pace for every in self.taken.values() for one in every)

    def save(self) -> None:
        """Write the file."""
        write_text(self.path, json.dumps({"facts": self.facts, "taken": self.taken}))


@torch.no_grad()
def sweep(
    bench: Bench, cases: Sequence[Case], rounds: int, partial: Partial, progress: Progress
) -> dict[str, float]:
    """Median seconds of every case at the machine's usual pace, by its key.

    Cases are in a random order in every round.
    """
    found = partial.taken
    watch, total, done = PacedStopwatch(bench), rounds * len(cases), 0
    for number in range(rounds):
        for case in random.Random(number).sample(cases, len(cases)):
            done += 1
            timed = found.setdefault(case.key, [])
            if len(timed) > number:
                continue
            if case.table == "weights":
                cold, cached = (_once(bench, case.of(t), watch) for t in ("cold", "product"))
                more = cold.at(cached.pace) - cached.seconds
                timed.append(Taken(more, cached.pace))
            else:
                timed.append(_once(bench, case, watch))
            if done % _SAVED_EVERY == 0:
                partial.save()
            progress(done, total)
    partial.save()
    pace = partial.pace
    return {case.key: median(one.at(pace) for one in found[case.key]) for case in cases}


def _once(bench: Bench, case: Case, watch: PacedStopwatch) -> Taken:
    """What a case takes."""
    runs, usual = bench.runs(case, 1), stopwatch_for(bench.place)
    # The first time has much to prepare.
    least = max(1e-7, min(usual.seconds(runs) for _ in range(2)))
    count = bench.turns(case) or max(1, min(_REPEATS, math.ceil(_SECONDS / least)))
    if count > 1:
        runs = bench.runs(case, count)
        if case.table != "cold":
            usual.seconds(runs)  # and caches hold what they can
    taken = watch.seconds(runs)
    return Taken(taken.seconds / count, taken.pace)


def table_of(name: str, seconds: Mapping[tuple[int, ...], float]) -> Table:
    """A table that grows along every axis.

    `name`: of the table. `seconds`: by sizes; what is missing grows in proportion to the size that
    it has more of.
    """
    axes = AXES[name]
    grid = np.empty([len(axis) for axis in axes])
    for place in itertools.product(*(range(len(axis)) for axis in axes)):
        sizes = tuple(axis[index] for axis, index in zip(axes, place, strict=True))
        grid[place] = seconds.get(sizes) or max(
            grid[(*place[:n], index - 1, *place[n + 1 :])] * axes[n][index] / axes[n][index - 1]
            for n, index in enumerate(place)
            if index
        )
    return Table(tuple(tuple(map(float, axis)) for axis in axes), _growing(grid))


def _growing(grid: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """The nearest numbers that grow along every axis, by ratio; flat, the last axis fastest."""
    logs = np.log(grid)
    for axis in range(logs.ndim):
        logs = np.apply_along_axis(lambda line: isotonic_regression(line).x, axis, logs)
    for axis in range(logs.ndim):
        logs = np.maximum.accumulate(logs, axis)
    return tuple(float(f"{value:.4g}") for value in np.exp(logs).ravel())
