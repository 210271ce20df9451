"""In which order the kept lanes of a narrowed weight lie.

Neither a sum over neurons nor attention asks for an order of its lanes, as long as all linears of a
site agree on it. So lanes lie where they cause the least copying: a lane whose number is below the
number of lanes kept has a place of its own, the others fill the gaps. Two random plans that keep
half of the lanes agree in three places of ten, two that keep seven eighths in three of four, and
plans that resemble each other in nearly all: memory narrowed for one becomes that for the other by
copying the rest.

The order depends on which lanes are kept and on nothing else. A plan gives the same result to the
last bit whatever ran before it, and a KV cache outlives a change of plans and back.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from math import gcd

import numpy as np
from numpy.typing import NDArray

from planner.ir.intervals import Intervals

__all__ = ["Moves", "moves", "order"]

# (slot, lane, lanes): lanes from `lane` on go to slots from `slot` on.
Moves = tuple[tuple[int, int, int], ...]


@lru_cache(maxsize=4096)
def order(lanes: Intervals, unit: int = 1) -> NDArray[np.int64]:
    """Which lane lies in which slot, in units of lanes.

    Args:
        lanes: kept lanes as intervals, their edges multiples of the unit.
        unit: lanes in a unit.
    """
    kept = np.concatenate([np.arange(start // unit, stop // unit) for start, stop in lanes])
    if len(lanes) == 1:
        # As the weight stores them: nothing has to be copied at all.
        return kept
    count = len(kept)
    slots = np.full(count, -1)
    at_home = kept < count
    slots[kept[at_home]] = kept[at_home]
    guests = kept[~at_home]
    # Of several guests that want one slot the first gets it: the last write counts.
    claims = np.full(count, -1)
    claims[guests[::-1] % count] = guests[::-1]
    gaps = slots < 0
    slots[gaps] = claims[gaps]
    slots[slots < 0] = guests[slots[guests % count] != guests]
    return slots


@lru_cache(maxsize=4096)
def moves(lanes: Intervals, held: Intervals = ()) -> Moves:
    """What to copy so that memory which holds some lanes in their order holds others in theirs.

    Args:
        lanes: those that it is to hold, as intervals.
        held: those that it holds.
    """
    if not lanes:
        return ()
    unit = gcd(*chain.from_iterable(lanes), *chain.from_iterable(held))
    slots = order(lanes, unit)
    changed = np.ones(len(slots), bool)
    if held:
        before = order(held, unit)[: len(slots)]
        changed[: len(before)] = before != slots[: len(before)]
    places = np.flatnonzero(changed)
    if not len(places):
        return ()
    coming = slots[places]
    breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(coming) != 1)) + 1
    starts = [0, *breaks.tolist()]
    stops = [*breaks.tolist(), len(places)]
    return tuple(
        (int(places[a]) * unit, int(coming[a]) * unit, (b - a) * unit)
        for a, b in zip(starts, stops, strict=True)
    )
