"""Work on many items, here or elsewhere: what comes of them is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from planner.progress import Progress

LoadedT = TypeVar("LoadedT")
LoadedT_co = TypeVar("LoadedT_co", covariant=True)
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

# What works, item by item, of what was loaded: a model, say.
Make = Callable[[LoadedT], Callable[[ItemT], ResultT]]


class Spread(Protocol[LoadedT_co]):
    """Where work is done, by one worker or several, each of which has loaded the same."""

    def __call__(
        self, make: Make[LoadedT_co, ItemT, ResultT], items: Sequence[ItemT]
    ) -> Iterator[tuple[int, ResultT]]:
        """The number of each item with what comes of it, in the order in which they are done.

        Every worker makes what works once. An item's result depends on the item alone.
        """


@dataclass(frozen=True)
class Here(Generic[LoadedT]):
    """In this process, one item after the other."""

    loaded: LoadedT

    def __call__(
        self, make: Make[LoadedT, ItemT, ResultT], items: Sequence[ItemT]
    ) -> Iterator[tuple[int, ResultT]]:
        """See `Spread`."""
        work = make(self.loaded)
        for index, item in enumerate(items):
            yield index, work(item)


def in_order(
    spread: Spread[LoadedT],
    make: Make[LoadedT, ItemT, ResultT],
    items: Sequence[ItemT],
    progress: Progress,
) -> list[ResultT]:
    """What comes of all items, in their order."""
    found: dict[int, ResultT] = {}
    progress(0, len(items))
    for index, result in spread(make, items):
        found[index] = result
        progress(len(found), len(items))
    return [found[index] for index in range(len(items))]
