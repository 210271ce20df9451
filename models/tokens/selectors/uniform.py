"""Uniform: a regular grid of image tokens, the other baseline that needs no model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from math import isqrt
from typing import Self

from planner.models.tokens.selectors.base import DecoderInputs, DecoderSelection, DecoderSelector

__all__ = ["Uniform", "evenly_spaced", "grid_points"]


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


@dataclass(frozen=True)
class Uniform(DecoderSelector):
    """Keep a regular grid of each sample's image tokens.

    Every unbroken run of image tokens is taken as one picture; pictures share the count in
    proportion to their tokens.

    Attributes:
        keep: image tokens kept per sample.
        k: the first layer that sees fewer tokens; 0 is the whole decoder.
    """

    name = "uniform"
    keep: int
    k: int = 0

    def __post_init__(self) -> None:
        self.check("keep", self.keep >= 0, "a count from 0 on")
        self.check("k", self.k >= 0, "a layer from 0 on")

    @classmethod
    def at(cls, layer: int, keep: int, of: int) -> Self:
        """The selector that keeps `keep` tokens from `layer` on."""
        return cls(keep=keep, k=layer)

    @property
    def layers(self) -> tuple[int, ...]:
        """The one pruned layer."""
        return (self.k,)

    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """As many as asked for, or all."""
        return (min(self.keep, tokens),)

    def select(self, inputs: DecoderInputs, layer: int) -> DecoderSelection:
        """Lay a grid over every picture."""
        keep = ~inputs.image
        for sample, flags in enumerate(inputs.image.tolist()):
            pictures = [
                [position for position, _ in run]
                for is_image, run in groupby(enumerate(flags), key=lambda pair: pair[1])
                if is_image
            ]
            sizes = [len(picture) for picture in pictures]
            count = min(self.keep, sum(sizes))
            if not count:
                continue
            for picture, share in zip(pictures, shares(sizes, count), strict=True):
                keep[sample, [picture[point] for point in grid_points(len(picture), share)]] = True
        return DecoderSelection(keep)
