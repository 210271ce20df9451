"""In which order a run meets its records: epoch after epoch, one step of pictures, one of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch.utils.data import Sampler
from typing_extensions import override

from planner.training.data.conversations import Conversation


class Visit(NamedTuple):
    """A record when a run meets it; the number tells two meetings apart, those of one epoch too."""

    number: int
    conversation: Conversation


class Visited(Sequence[Visit]):
    """Records by the number of a visit, which is the record's index plus epochs times records."""

    def __init__(self, records: Sequence[Conversation]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Visit:  # type: ignore[override]
        return Visit(number, self.records[number % len(self.records)])


class Visits(Sampler[int]):
    """The numbers of all visits of a run, every epoch in an order of its own.

    All records of a step are of one kind, as LLaVA-1.5 groups pictures and text by modality; what
    is left of both at the end of an epoch is mixed. Records that do not fill a step any more are
    left out of the epoch. The order depends on the arguments alone: a run that goes on skips what
    it has met, and processes share it.

    `kinds`: of the records, by index; None if all are alike. `step`: records of an optimiser's
    step, on all processes.
    """

    def __init__(
        self, kinds: Sequence[int] | None, records: int, step: int, steps: int, seed: int
    ) -> None:
        self.kinds, self.records, self.step, self.steps = kinds, records, step, steps
        self.seed = seed

    def __len__(self) -> int:
        return self.step * self.steps

    @override
    def __iter__(self) -> Iterator[int]:
        groups = (group for epoch in count() for group in self._epoch(epoch))
        for _, group in zip(range(self.steps), groups):
            yield from group

    def _epoch(self, epoch: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.records, generator=generator)
        order = order.repeat(-(-self.step // self.records)) + epoch * self.records
        members = [order]
        if self.kinds is not None:
            kinds = torch.tensor(self.kinds)[order % self.records]
            found = kinds.unique().tolist()
            # In the order in which they are met.
            found.sort(key=lambda kind: int((kinds == kind).int().argmax()))
            members = [order[kinds == kind] for kind in found]
        stops = [len(some) - len(some) % self.step for some in members]
        parts = [some[:stop].view(-1, self.step) for some, stop in zip(members, stops, strict=True)]
        groups = torch.cat(parts)
        for place in torch.randperm(len(groups), generator=generator).tolist():
            yield groups[place].tolist()
        rest = torch.cat([some[stop:] for some, stop in zip(members, stops, strict=True)])
        for group in rest.split(self.step):
            if len(group) == self.step:
                yield group.tolist()
