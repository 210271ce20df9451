"""What the kernels are told of a plan: the units of one site that survive.

Survivors are index tensors, so a new plan is new data and recompiles nothing; one row of them
serves the whole batch, or each sample has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import chain

import torch
from torch import Tensor

from planner.ir.errors import InputError
from planner.ir.intervals import Intervals, intervals_of, merged


@dataclass(frozen=True, eq=False)
class Survivors:
    """Units of one site that run, for one plan or for one plan per sample.

    A unit is `width` consecutive lanes: features of a weight, neurons, or one KV group. Lanes come
    in units so that a kernel can read weights as whole vectors; where a plan's boundary cuts
    through a unit, `lanes` says which of its lanes count.

    Attributes:
        units: (plans, slots) int32: surviving units, ascending, then anything.
        counts: (plans,) int32: how many of a row are meant.
        width: lanes per unit.
        lanes: (plans, slots) int32, bit j set if lane j of the unit survives; None: all do.
        kept_runs: what the tensors hold, per plan, as runs of lanes: known to the host where the
            survivors were made by `of` or `packed`, so that nobody waits for a device to learn it.
    """

    units: Tensor
    counts: Tensor
    width: int = 1
    lanes: Tensor | None = None
    kept_runs: tuple[Intervals, ...] | None = None

    @staticmethod
    def of(
        kept: Sequence[Sequence[int]],
        total: int,
        width: int = 1,
        *,
        slots: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Survivors:
        """Build from the surviving lanes of each plan.

        Args:
            kept: per plan, distinct lanes below `total`, in any order.
            total: lanes of the site, a multiple of `width`.
            width: lanes per unit; at most 31 where a unit survives in part.
            slots: entries per row; by default all units, so that every plan has the same shape.
            device: where the tensors go.

        Raises:
            InputError: a lane is out of range or repeated, or the shapes do not fit.
        """
        runs = []
        for lanes in map(sorted, kept):
            if lanes and (lanes[0] < 0 or lanes[-1] >= total or len({*lanes}) < len(lanes)):
                raise InputError(f"Surviving lanes must be distinct and in 0..{total - 1}.")
            runs.append(intervals_of(lanes))
        if width < 1 or total % width:
            raise InputError(f"{total} lanes cannot be divided into units of {width}.")
        return _built(tuple(runs), width, total // width if slots is None else slots, device)

    @staticmethod
    def packed(
        runs: Intervals, width: int | None = None, device: torch.device | str = "cpu"
    ) -> Survivors:
        """One plan's lanes in as few units as possible, with no slot to spare.

        Args:
            runs: surviving lanes.
            width: lanes per unit; by default so many that all units survive whole, and what is
                packed by slot has as many columns as lanes survive.
            device: where the tensors go.
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

    def require(self, samples: int) -> None:
        """Raise InputError unless there is one plan, or one for each of some samples."""
        if self.plans not in (1, samples):
            raise InputError(
                f"{self.plans} plans do not fit {samples} samples: give one, or one each."
            )

    def kept(self, plan: int) -> Tensor:
        """Surviving lanes of one plan, ascending, int64. Waits for the GPU if they are there."""
        lanes = torch.arange(self.width, device=self.units.device)
        index = self.features(plan)
        if self.lanes is None:
            return index
        bits = self.lanes[plan, : len(index) // self.width, None] >> lanes
        return index[(bits & 1).bool().flatten()]

    def features(self, plan: int) -> Tensor:
        """Lanes of one plan's units, ascending, int64: those that survive in part come whole."""
        units = self.units[plan, : int(self.counts[plan])].long()
        lanes = torch.arange(self.width, device=units.device)
        return (units[:, None] * self.width + lanes).flatten()

    def runs(self, plan: int) -> Intervals:
        """`features` as intervals. Waits for the GPU unless the host knows what survives."""
        width = self.width
        if self.kept_runs is None:
            units = intervals_of(self.units[plan, : int(self.counts[plan])].tolist())
            return tuple((first * width, last * width) for first, last in units)
        return merged((a // width * width, -(-b // width) * width) for a, b in self.kept_runs[plan])

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
        if len(found) > slots:
            raise InputError(f"{len(found)} surviving units do not fit into {slots} slots.")
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
