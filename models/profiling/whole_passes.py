"""Whole passes under random plans: what they take beside what their operators take alone.

What operators take alone leaves out the host's work between them, and what their neighbours leave
in caches. Coefficients of `TERMS` are fitted to whole passes, by least squares of relative errors,
none of them negative; errors are of passes that were left out of a fit. Passes under several plans
take turns, as requests do: frozen weights are copied anew then, which is the slower case.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares

from planner.ir.cost.measured_device import KINDS, TERMS, MeasuredDevice, Passes
from planner.models.profiling.pace import PacedStopwatch, Taken
from planner.models.profiling.subjects import STEPS, Pass, Subject
from planner.models.profiling.sweep import Partial
from planner.progress import Progress

# Passes that take turns, as requests under several plans do.
_TOGETHER = 8
# A pass is repeated until it has taken so long, at least and at most so often.
_SECONDS, _FEWEST, _MOST = 0.4, 3, 8
# The first time a plan runs it has much to prepare, and the second time it copies weights.
_FIRST = 2
# Relative errors beyond this count less: something else ran just then.
_USUAL = 0.05
# How much is believed that passes of one model are like those of any other, as a number of passes;
# and by how much coefficients differ between models, at least.
_BELIEVED = 0.2
_DIFFER = np.array([1e-3, 2e-5, 0.5, 0.5, 0.5, 0.5, 0.5])
_FOLDS = 8


@dataclass(frozen=True)
class Timed:
    """A pass and what it took, again and again."""

    subject: Subject
    one: Pass
    every: Sequence[Taken]
    pace: float  # the machine's usual one

    @property
    def seconds(self) -> float:
        """Its median at the usual pace."""
        return median(one.at(self.pace) for one in self.every)

    def predicted(self, device: MeasuredDevice) -> float:
        """Seconds."""
        return self.one.predicted(self.subject.graph, device)

    def error(self, device: MeasuredDevice) -> float:
        """Of the prediction, relative."""
        return self.predicted(device) / self.seconds - 1


@torch.no_grad()
def timed(
    subjects: Sequence[Subject],
    count: int,
    most_tokens: int,
    seed: int,
    partial: Partial,
    progress: Progress,
    pace: float,
) -> list[Timed]:
    """So many random passes, a quarter of them decoding, of one model after the other.

    `pace`: of the machine that they are to be told for, usually.
    """
    rng, drawn = random.Random(seed), []
    for number in range(count):
        subject = subjects[number * len(subjects) // count]
        drawn.append((subject, subject.draw(rng, most_tokens, decodes=number % 4 == 3)))
    for start in range(0, count, _TOGETHER):
        group = drawn[start : start + _TOGETHER]
        keys = [f"pass.{seed}.{start + number}" for number in range(len(group))]
        if not all(map(partial.taken.get, keys)):
            partial.taken.update(zip(keys, interleaved(group), strict=True))
            partial.save()
        progress(min(start + _TOGETHER, count), count)
    return [
        Timed(subject, one, partial.taken[f"pass.{seed}.{number}"], pace)
        for number, (subject, one) in enumerate(drawn)
    ]


def interleaved(group: Sequence[tuple[Subject, Pass]]) -> list[list[Taken]]:
    """What passes take that take turns, every time."""
    found: list[list[Taken]] = [[] for _ in group]
    watch = PacedStopwatch(group[0][0].bench)
    runs = [None if one.decodes else subject.prompt(one) for subject, one in group]
    rounds = 0
    while rounds < _FEWEST + _FIRST or (
        rounds < _MOST + _FIRST and min(map(_together, found)) < _SECONDS
    ):
        for (subject, one), run, every in zip(group, runs, found, strict=True):
            with subject.session.under(one.plan):
                work = run or subject.tokens(one)
                taken = watch.seconds([work])
            if rounds >= _FIRST:
                every.append(Taken(taken.seconds / (STEPS if one.decodes else 1), taken.pace))
        rounds += 1
    return found


def _together(every: Sequence[Taken]) -> float:
    return sum(one.seconds for one in every)


# -- what passes are the sum of -------------------------------------------------------------------


def fitted(
    device: MeasuredDevice, passes: Sequence[Timed], usual: Mapping[str, Passes] | None = None
) -> dict[str, Passes]:
    """What passes of one precision take, by kind, with errors by passes that were left out.

    `usual`: what passes of other models take, which is believed where these do not tell.
    """
    return {
        kind: _fitted(
            device,
            [one for one in passes if one.one.decodes == (kind == "token")],
            Passes() if usual is None else usual[kind],
            of_one=usual is not None,
        )
        for kind in KINDS
    }


def _fitted(device: MeasuredDevice, passes: Sequence[Timed], usual: Passes, of_one: bool) -> Passes:
    """The same of one kind; `of_one`: they are of one model."""
    parts = np.array([_parts(one, device) for one in passes])
    near = np.array([usual.terms[name] for name in TERMS])
    seconds = np.array([one.seconds for one in passes])
    held_out = np.empty(len(passes))
    for fold in _folds(passes, of_one):
        known = np.setdiff1d(np.arange(len(passes)), fold)
        held_out[fold] = parts[fold] @ _solved(parts[known], seconds[known], near)
    # By the clock: a promise is not kept by a machine that would be faster at other times.
    shares = [
        taken.seconds / predicted - 1
        for one, predicted in zip(passes, held_out.tolist(), strict=True)
        for taken in one.every
    ]
    terms = dict(zip(TERMS, _solved(parts, seconds, near).tolist(), strict=True))
    return Passes(terms, quantiles(held_out / seconds - 1), late_by(shares))


def _parts(found: Timed, device: MeasuredDevice) -> list[float]:
    """Seconds of each term, at a coefficient of 1."""
    graph = found.subject.graph
    ones = [{name: float(name == term) for name in TERMS} for term in TERMS]
    return found.one.by(graph, [device.with_terms(graph.dtype_bytes, terms) for terms in ones])


def _folds(passes: Sequence[Timed], of_one: bool) -> list[list[int]]:
    """Passes that are left out together: some of one model, or all of one of several."""
    if of_one:
        return [list(range(n, len(passes), _FOLDS)) for n in range(min(_FOLDS, len(passes)))]
    graphs = dict.fromkeys(id(one.subject) for one in passes)
    return [[n for n, one in enumerate(passes) if id(one.subject) == g] for g in graphs]


def _solved(parts: Any, seconds: Any, near: Any) -> Any:
    """Coefficients of the terms, by the relative errors that they leave.

    Those of terms that passes hardly have stay `near` what they would be elsewhere.
    """
    shares = parts / seconds[:, None]
    scale = np.maximum(near, _DIFFER)
    pull = _USUAL * math.sqrt(_BELIEVED) / scale

    def off(terms: Any) -> Any:
        return np.concatenate([shares @ terms - 1, pull * (terms - near)])

    bounds = (np.zeros(len(near)), np.full(len(near), np.inf))
    start = np.maximum(near, 1e-9)
    return least_squares(off, start, bounds=bounds, x_scale=scale, loss="soft_l1", f_scale=_USUAL).x


def late_by(shares: Sequence[float]) -> float:
    """By which share a pass is late once in a hundred times, by how late some were.

    The quantile of split conformal prediction (Lei et al., JASA 2018, equation 8): it holds for a
    pass to come that is like these.
    """
    place = math.ceil(0.99 * (len(shares) + 1))
    return round(max(0.0, sorted(shares)[min(place, len(shares)) - 1]), 4)


def quantiles(errors: Iterable[float]) -> dict[str, float]:
    """Median, 90th and 95th percentile of their size."""
    sizes = np.abs(list(errors))
    at = {"median": 0.5, "p90": 0.9, "p95": 0.95}
    return {name: round(float(np.quantile(sizes, share)), 4) for name, share in at.items()}


def repeats_differ(passes: Sequence[Timed]) -> float:
    """By which share medians of the even and of the odd times differ, in the median."""
    times = [[taken.at(one.pace) for taken in one.every] for one in passes]
    halves = [(median(every[::2]), median(every[1::2])) for every in times]
    return round(median(abs(even / odd - 1) for even, odd in halves), 4)
