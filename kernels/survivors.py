"""What kernels are told of a plan: the units of one site that survive, as index tensors.

A new plan is new data and recompiles nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from planner.ir.errors import InputError
from planner.ir.intervals import Intervals, count_of, intervals_of, merged

# Mean run, in weight rows, from which views beat a gather, which costs as much as reading the
# weights twice (measured on a CPU, prefill and decode).
_LONG_RUN = 32

Part = slice | Tensor
"""Features of a weight, or samples of a batch: a run, read in place, or a list, gathered."""


def length_of(*parts: Part) -> int:
    """How many features parts have."""
    return sum(p.stop - p.start if isinstance(p, slice) else len(p) for p in parts)


@dataclass(frozen=True, eq=False)
class Survivors:
    """Units of one site that run, for one plan or for one plan per sample.

    A unit is `width` consecutive lanes: features of a weight, neurons, or one KV group. Lanes come
    in units so that a kernel can read weights as whole vectors; where a plan's boundary cuts
    through a unit, `lanes` says which of its lanes count.
    """

    # (plans, slots) int32: surviving units, ascending, then anything. One row serves the whole
    # batch, or each sample has its own.
    units: Tensor
    counts: Tensor  # (plans,) int32: how many of a row are meant
    width: int = 1
    # (plans, slots) int32, bit j set if lane j of the unit survives; None: all do.
    lanes: Tensor | None = None
    # Surviving lanes of each plan, where the host knows what the tensors hold, so that nobody waits
    # for a device to learn it.
    kept_runs: tuple[Intervals, ...] | None = None

    @staticmethod
    def of(
        kept: Sequence[Sequence[int]],
        total: int,
        width: int = 1,
        device: torch.device | str = "cpu",
    ) -> Survivors:
        """Build from the surviving lanes of each plan, with room for all units.

        Args:
            kept: per plan, distinct lanes below `total`, in any order.
            total: lanes of the site, a multiple of `width`.
            width: lanes per unit; at most 31 where a unit survives in part.

        Raises InputError: a lane is out of range or repeated, or the shapes do not fit.
        """
        runs = []
        for lanes in map(sorted, kept):
            if lanes and (lanes[0] < 0 or lanes[-1] >= total or len({*lanes}) < len(lanes)):
                raise InputError(f"Surviving lanes must be distinct and in 0..{total - 1}.")
            runs.append(intervals_of(lanes))
        if width < 1 or total % width:
            raise InputError(f"{total} lanes cannot be divided into units of {width}.")
        return _built(tuple(runs), width, total // width, device)

    @staticmethod
    def packed(
        runs: Intervals, width: int | None = None, device: torch.device | str = "cpu"
    ) -> Survivors:
        """One plan's lanes in as few units as possible, with no slot to spare.

        By default units are so wide that all survive whole, and what is packed by slot has as many
        columns as lanes survive.
        """
        width = width or reduce(math.gcd, chain.from_iterable(runs), 0) or 1
        return _built((runs,), width, len(_units(runs, width)), device)

    @staticmethod
    @lru_cache(maxsize=256)
    def everything(total: int, device: torch.device) -> Survivors:
        """All of so many units, one lane each."""
        return Survivors.packed(((0, total),), 1, device)

    @property
    def plans(self) -> int:
        """Rows: 1 where the batch shares one plan."""
        return self.units.shape[0]

    @property
    def slots(self) -> int:
        """Entries per row."""
        return self.units.shape[1]

    def plan_of(self, sample: int) -> int:
        """The row of a sample."""
        return sample if self.plans > 1 else 0

    def features(self, plan: int) -> Tensor:
        """Lanes of one plan's units, ascending, int64: those that survive in part come whole."""
        units = self.units[plan, : self._count(plan)].long()
        return (units[:, None] * self.width + torch.arange(self.width).to(units)).flatten()

    def alive(self, plan: int) -> Tensor | None:
        """Which of `features` survive; None where all do. Waits for the GPU if they are there."""
        if self.lanes is None:
            return None
        bits = self.lanes.cpu().numpy()[plan, : self._count(plan), None]
        if (bits == (1 << self.width) - 1).all():
            return None
        alive = bits >> np.arange(self.width) & 1
        return torch.from_numpy(alive.astype(bool).ravel()).to(self.units.device)

    def kept(self, plan: int) -> Tensor:
        """Surviving lanes of one plan, ascending, int64. Waits for the GPU if they are there."""
        features, alive = self.features(plan), self.alive(plan)
        return features if alive is None else features[alive]

    def runs(self, plan: int) -> Intervals:
        """`features` as intervals. Waits for the GPU unless the host knows what survives."""
        width = self.width
        if self.kept_runs is None:
            # By NumPy: behind a large product each step of PyTorch takes tens of microseconds.
            units = self.units.cpu().numpy()[plan, : self._count(plan)]
            pieces = np.split(units, np.flatnonzero(np.diff(units) != 1) + 1)
            return tuple((int(p[0]) * width, int(p[-1] + 1) * width) for p in pieces if len(p))
        return merged((a // width * width, -(-b // width) * width) for a, b in self.kept_runs[plan])

    def _count(self, plan: int) -> int:
        count: int = self.counts.tolist()[plan]
        return count

    # How PyTorch reads survivors.

    def groups(self) -> list[tuple[Part, int]]:
        """(samples, plan) for each distinct plan; a plan that all share serves all."""
        if self.plans == 1:
            return [(slice(None), 0)]
        groups: dict[object, list[int]] = {}
        for plan in range(self.plans):
            known = self.kept_runs
            kept = tuple(self.kept(plan).tolist()) if known is None else known[plan]
            groups.setdefault(kept, []).append(plan)
        if len(groups) == 1:
            return [(slice(None), 0)]
        device = self.units.device
        return [(torch.tensor(samples, device=device), samples[0]) for samples in groups.values()]

    def parts(self, plan: int) -> list[Part]:
        """`features` as runs to view where these are long, else as one list to gather."""
        runs = self.runs(plan)
        if count_of(runs) < _LONG_RUN * len(runs):
            return [self.features(plan)]
        return [slice(start, stop) for start, stop in runs]

    def widened(self, width: int) -> Survivors:
        """The same units, of another width: heads of so many features, say."""
        runs = self.kept_runs
        if runs is not None:
            scaled = ([(a // self.width * width, b // self.width * width) for a, b in row]
                      for row in runs)  # fmt: skip
            runs = tuple(map(tuple, scaled)) if self.lanes is None else None
        return Survivors(self.units, self.counts, width, None, runs)


def neuron_width(neurons: int) -> int:
    """Lanes per unit for an MLP: 8, a 16-byte vector of half precision, where that divides."""
    return math.gcd(neurons, 8)


def _built(
    kept_runs: tuple[Intervals, ...], width: int, slots: int, device: torch.device | str
) -> Survivors:
    units = torch.zeros(len(kept_runs), slots, dtype=torch.int32)
    lanes = torch.zeros(len(kept_runs), slots, dtype=torch.int32)
    counts = torch.zeros(len(kept_runs), dtype=torch.int32)
    whole = True
    for plan, runs in enumerate(kept_runs):
        found = _units(runs, width)
        counts[plan] = len(found)
        units[plan, : len(found)] = torch.tensor([*found], dtype=torch.int32)
        full = (1 << width) - 1
        whole = whole and all(bits == full for bits in found.values())
        if width <= 31:
            lanes[plan, : len(found)] = torch.tensor([*found.values()], dtype=torch.int32)
    if not whole and width > 31:
        raise InputError(f"Units of {width} lanes can only survive whole.")
    partial = None if whole else lanes.to(device)
    return Survivors(units.to(device), counts.to(device), width, partial, kept_runs)


def _units(runs: Intervals, width: int) -> dict[int, int]:
    """Units that some lane of survives, ascending, and the surviving lanes of each as bits."""
    found: dict[int, int] = {}
    for start, stop in runs:
        for unit in range(start // width, (stop - 1) // width + 1):
            first, last = max(start - unit * width, 0), min(stop - unit * width, width)
            found[unit] = found.get(unit, 0) | (1 << last) - (1 << first)
    return found
