"""Uniform: a regular grid of image tokens."""

from __future__ import annotations

from itertools import accumulate, groupby, pairwise
from math import isqrt

from planner.models.tokens.selectors.rules import DecoderInputs, DecoderSelection, select_tokens
from planner.planning.selectors import Uniform


def evenly_spaced(n: int, keep: int) -> list[int]:
    """`keep` of the positions 0 ... n - 1, each in the middle of one of `keep` equal parts."""
    return [(2 * index + 1) * n // (2 * keep) for index in range(keep)]


def shares(sizes: list[int], keep: int) -> list[int]:
    """Divide `keep` among parts in proportion to their sizes, whole and exact in sum."""
    total = sum(sizes)
    ends = [0, *(end * keep // total for end in accumulate(sizes))]
    return [stop - start for start, stop in pairwise(ends)]


def grid_points(n: int, keep: int) -> list[int]:
    """`keep` of n tokens in raster order, spread evenly over the picture, ascending.

    A square number of tokens is a square picture: about sqrt(keep) evenly spaced rows, each with
    its share of evenly spaced columns; 144 of 576 are every second row and column. Any other
    number (unpadded tiles with newline tokens, say) is spread along the raster.
    """
    side = isqrt(n)
    if side * side != n or keep == 0:
        return evenly_spaced(n, keep)
    rows = max(round(keep**0.5), -(-keep // side))
    return [
        row * side + column
        for row, columns in zip(evenly_spaced(side, rows), shares([1] * rows, keep), strict=True)
        for column in evenly_spaced(side, columns)
    ]


@select_tokens.register(Uniform)
def uniform(selector: Uniform, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    """Lay a grid over every picture."""
    keep = ~inputs.image
    for sample, flags in enumerate(inputs.image.tolist()):
        pictures = [
            [position for position, _ in run]
            for is_image, run in groupby(enumerate(flags), key=lambda pair: pair[1])
            if is_image
        ]
        sizes = [len(picture) for picture in pictures]
        count = min(selector.keep, sum(sizes))
        if not count:
            continue
        for picture, share in zip(pictures, shares(sizes, count), strict=True):
            keep[sample, [picture[point] for point in grid_points(len(picture), share)]] = True
    return DecoderSelection(keep)
