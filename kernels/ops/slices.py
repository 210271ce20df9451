"""How the PyTorch side of the ops reads survivors: samples by plan, weights by runs of features.

What does not survive is not computed. Features are read as contiguous runs of weight rows and
columns without a copy where runs are long, and gathered where they are short: matrix products want
long runs, and a gather costs as much as reading the weights twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planner.ir.intervals import count_of
from planner.kernels.survivors import Survivors

# Mean run, in weight rows, from which views beat a gather (measured on a CPU, prefill and decode).
LONG_RUN = 32

Part = slice | Tensor
"""Features of a weight, or samples of a batch: a run, read in place, or a list, gathered."""


def plans_of(survivors: Survivors) -> list[tuple[Part, int]]:
    """(samples, plan) for each distinct plan; a plan that all share serves all."""
    if survivors.plans == 1:
        return [(slice(None), 0)]
    groups: dict[object, list[int]] = {}
    for plan in range(survivors.plans):
        known = survivors.kept_runs
        kept = tuple(survivors.kept(plan).tolist()) if known is None else known[plan]
        groups.setdefault(kept, []).append(plan)
    if len(groups) == 1:
        return [(slice(None), 0)]
    device = survivors.units.device
    return [(torch.tensor(samples, device=device), samples[0]) for samples in groups.values()]


def parts_of(survivors: Survivors, plan: int) -> list[Part]:
    """Features of a plan's units: runs to view where these are long, else one list to gather."""
    runs = survivors.runs(plan)
    if count_of(runs) < LONG_RUN * len(runs):
        return [survivors.features(plan)]
    return [slice(start, stop) for start, stop in runs]


def length_of(*parts: Part) -> int:
    """How many features parts have."""
    return sum(p.stop - p.start if isinstance(p, slice) else len(p) for p in parts)
