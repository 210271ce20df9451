"""Work timed beside a product that is always the same: it tells how fast the machine is just now.

No machine is equally fast all the time: its clock changes, and where it is a virtual one, so do
those it shares a processor with. (Two cores of an AMD EPYC in a cloud took up to 1.4 times as long
for seconds, with nothing else on them.) A calibration takes minutes, so what is timed early and
what is timed late would be of two machines. Here work counts as a multiple of what the product
takes before and behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from torch.nn import functional as F

from planner.models.profiling.operator_cases import Bench
from planner.models.profiling.stopwatch import stopwatch_for

# Rows, in and out features; and how often it is computed for a measurement that is no shorter than
# a CUDA device's clock can tell.
_PRODUCT, _TIMES = (128, 768, 1024), {"cpu": 1, "cuda": 20}
# Its median is taken of so many, and is known for so many seconds.
_REPEATS, _FRESH = 3, 0.01


class Taken(NamedTuple):
    """What some work took."""

    seconds: float  # by the clock
    pace: float  # seconds of the product around that time

    def at(self, pace: float) -> float:
        """Seconds on the machine at another pace."""
        return self.seconds * pace / self.pace


class PacedStopwatch:
    """Times work at a place."""

    def __init__(self, bench: Bench) -> None:
        rows, features, out = _PRODUCT
        product = partial(F.linear, bench.random(rows, features), bench.random(out, features))
        self._watch = stopwatch_for(bench.place)
        self._product = [product] * _TIMES[bench.place.type]
        self._known, self._measured = 0.0, float("-inf")

    def seconds(self, runs: Iterable[Callable[[], Any]]) -> Taken:
        """Of all of some work, one after the other."""
        before = self._pace()
        seconds = self._watch.seconds(runs)
        # What it was before is known no longer.
        self._measured = float("-inf")
        return Taken(seconds, (before + self._pace()) / 2)

    def _pace(self) -> float:
        if time.perf_counter() - self._measured > _FRESH:
            self._known = median(self._watch.seconds(self._product) for _ in range(_REPEATS))
            self._known = max(self._known, 1e-9)
            self._measured = time.perf_counter()
        return self._known
