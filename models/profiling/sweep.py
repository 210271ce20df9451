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
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import isotonic_regression

from planner.documents import read_json
from planner.files import write_text
from planner.ir.cost.measured_device import Table
from planner.ir.errors import InputError
from planner.models.profiling.operator_cases import AXES, Bench, Case
from planner.models.profiling.stopwatch import stopwatch_for
from planner.progress import Progress

# A case is repeated until it has taken so long, at most so often.
_SECONDS, _REPEATS = 2e-3, 100
_SAVED_EVERY = 200


@torch.no_grad()
def sweep(
    bench: Bench, cases: Sequence[Case], rounds: int, partial: Path, facts: Any, progress: Progress
) -> dict[str, float]:
    """Median seconds of every case, by its key.

    Args:
        cases: what is timed, in a random order in every round.
        partial: where what was timed is kept meanwhile.
        facts: that hold of this machine; what was timed under others is begun anew.
    """
    found = _kept(partial, facts)
    watch, total, done = stopwatch_for(bench.place), rounds * len(cases), 0
    for number in range(rounds):
        for case in random.Random(number).sample(cases, len(cases)):
            done += 1
            timed = found.setdefault(case.key, [])
            if len(timed) > number:
                continue
            warm_up = watch.seconds(bench.runs(case, 1))
            count = max(1, min(_REPEATS, math.ceil(_SECONDS / max(warm_up, 1e-7))))
            timed.append(watch.seconds(bench.runs(case, count)) / count)
            if done % _SAVED_EVERY == 0:
                write_text(partial, json.dumps({"facts": facts, "seconds": found}))
            progress(done, total)
    write_text(partial, json.dumps({"facts": facts, "seconds": found}))
    return {case.key: median(found[case.key]) for case in cases}


def _kept(partial: Path, facts: Any) -> dict[str, list[float]]:
    if not partial.is_file():
        return {}
    document = read_json(partial, "partial calibration")
    if not isinstance(document, dict) or document.get("facts") != json.loads(json.dumps(facts)):
        raise InputError(
            f"'{partial}' is of another machine, or other options: delete it to begin anew"
        )
    return dict(document["seconds"])


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
