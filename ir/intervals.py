"""Intervals: sets of whole numbers (lanes, features, layers) as half-open ranges."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

_RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?", re.ASCII)

# Half-open, ascending, disjoint: ((0, 64), (128, 192)).
Intervals = tuple[tuple[int, int], ...]


def intervals_of(numbers: Iterable[int]) -> Intervals:
    """Ascending numbers as intervals, as few as possible."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return tuple(found)


def numbers_of(intervals: Intervals) -> list[int]:
    """The numbers inside, ascending."""
    return [number for start, stop in intervals for number in range(start, stop)]


def count_of(intervals: Intervals) -> int:
    """How many numbers lie inside."""
    return sum(stop - start for start, stop in intervals)


def merged(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """Sort intervals and join those that touch or overlap; empty ones are left out."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif start < stop:
            found.append((start, stop))
    return tuple(found)


def print_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as text: ``0-3,7,9-10``; nothing as ``none``."""
    ranges = [(start, stop - 1) for start, stop in intervals_of(numbers)]
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in ranges) or "none"


def read_ranges(text: str, below: int) -> tuple[int, ...]:
    """Read what `print_ranges` wrote, of numbers below a bound.

    ValueError where it is something else, or goes beyond the bound; no range is expanded then.
    """
    if text == "none":
        return ()
    matches = [_RANGE.fullmatch(part) for part in text.split(",")]
    ranges = [(int(m[1]), int(m[2] or m[1])) for m in matches if m is not None]
    edges = [edge for first, last in ranges for edge in (2 * first, 2 * last + 1)]
    if len(ranges) < len(matches) or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"'{text[:80]}' is not a list of ascending ranges such as 0-3,7")
    if ranges[-1][1] >= below:
        raise ValueError(f"'{text[:80]}' goes beyond the {below} there are")
    return tuple(numbers_of(tuple((first, last + 1) for first, last in ranges)))
