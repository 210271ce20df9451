"""Seconds of short work, on a CPU or a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch


class Stopwatch:
    """Times work on a CPU.

    With one thread it counts what the process computes, so that others on the machine do not;
    several threads wait for one another, and there it is the clock on the wall.
    """

    def __init__(self) -> None:
        self._now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(self, runs: Iterable[Callable[[], Any]]) -> float:
        """Of all of some work, one after the other."""
        begin = self._now()
        for run in runs:
            run()
        return self._now() - begin


class CudaStopwatch(Stopwatch):
    """Times work on the current CUDA device: from its first kernel's start to its last one's end.

    Where kernels are shorter than the host takes to launch them, that is the host's time.
    """

    def seconds(self, runs: Iterable[Callable[[], Any]]) -> float:
        """As `Stopwatch.seconds`."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for run in runs:
            run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def stopwatch_for(place: torch.device) -> Stopwatch:
    """What times work at a place."""
    return CudaStopwatch() if place.type == "cuda" else Stopwatch()
