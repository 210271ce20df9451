"""Intervals: sets of whole numbers (lanes, features, layers) as half-open ranges."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "Intervals",
    "count_of",
    "intervals_of",
    "merged",
    "numbers_of",
    "print_ranges",
    "read_ranges",
]

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


def read_ranges(text: str) -> tuple[int, ...]:
    """Read what `print_ranges` wrote; raise ValueError on anything else."""
    if text == "none":
        return ()
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            numbers.extend(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        numbers = []
    if not numbers or numbers != sorted(set(numbers)):
        raise ValueError(f"'{text}' is not a list of ascending ranges such as 0-3,7")
    return tuple(numbers)
