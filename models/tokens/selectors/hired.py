"""HiRED: a token budget spread over the tiles of a high-resolution image."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor

from planner.ir.errors import InputError
from planner.models.tokens.selectors.base import (
    Needs,
    Product,
    Sizes,
    VisionInputs,
    VisionSelection,
    VisionSelector,
)
from planner.models.tokens.selectors.ranking import top_mask
from planner.models.tokens.selectors.scoring import cls_attention

__all__ = ["HiRED", "tile_counts"]


def tile_counts(marked: Tensor, rows: int, columns: int) -> Tensor:
    """How many of an overview's marked patches lie in each tile's part of it.

    A patch belongs to the tile that holds its centre.

    Args:
        marked: shape (patches,), bool: a square overview in raster order.
        rows: of tiles.
        columns: of tiles.

    Returns:
        Shape (rows * columns,), int64, raster order.
    """
    side = isqrt(len(marked))
    centre = torch.arange(side, device=marked.device) * 2 + 1
    row, column = centre * rows // (2 * side), centre * columns // (2 * side)
    tile = (row[:, None] * columns + column).flatten()
    return tile[marked].bincount(minlength=rows * columns)


@dataclass(frozen=True)
class HiRED(VisionSelector):
    """Keep a share of all patches of an image, where CLS attention says the content is.

    An image of t tiles and an overview has int((t + 1) n ratio) tokens to spend. The share alpha of
    them goes to the overview. The others go to tiles in proportion to how many of the
    int(n (1 - alpha)) patches to which the overview's CLS attends most in the *first* layer lie in
    the tile's part of the overview. Within each run patches are taken by CLS attention in the
    *second last* layer, which feeds the projector; attention is summed over heads. An image of one
    run just keeps int(n ratio). Arif et al., "HiRED" (arXiv 2408.10945), after the released code;
    that splits the overview's raster order into equal stretches, which are not the tiles, so here
    patches are counted where they lie. Shares are rounded down, so a few tokens may stay unspent.

    Attributes:
        ratio: share of patches kept.
        alpha: share of the budget that goes to the overview.
    """

    name = "hired"
    needs = Needs.TOWER_ATTENTION
    tower_layers: ClassVar[tuple[int, ...]] = (0, -2)
    ratio: float = 0.2
    alpha: float = 0.5

    def __post_init__(self) -> None:
        self.check("ratio", 0 <= self.ratio <= 1, "a share from 0 to 1")
        self.check("alpha", 0 <= self.alpha <= 1, "a share from 0 to 1")

    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """int(tokens ratio): exact for one run, at most that on average over tiles."""
        return (int(tokens * self.ratio),)

    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """CLS attention in two layers."""
        return ((2, sizes.image_tokens + 1, sizes.tower),)

    def select(self, inputs: VisionInputs) -> VisionSelection:
        """Set every run's budget, then rank all runs at once."""
        early, late = (inputs.attention(layer, self.name) for layer in self.tower_layers)
        content = cls_attention(early.query, early.key, early.heads).sum(1)
        scores = cls_attention(late.query, late.key, late.heads).sum(1)
        budgets = self.budgets(content, inputs.tiles or ((0, 0),) * len(scores))
        kept = top_mask(scores, torch.ones_like(scores, dtype=torch.bool), budgets)
        indices = tuple(row.nonzero().flatten() for row in kept)
        features = tuple(run[index] for run, index in zip(inputs.features, indices, strict=True))
        return VisionSelection(features, indices)

    def budgets(self, content: Tensor, tiles: tuple[tuple[int, int], ...]) -> Tensor:
        """Tokens that each run may keep.

        Args:
            content: shape (runs, patches): CLS attention in the first layer.
            tiles: (rows, columns) of each image's tiles; (0, 0) for an image of one run.

        Returns:
            Shape (runs,), int64.
        """
        runs, patches = content.shape
        if sum(1 + rows * columns for rows, columns in tiles) != runs:
            raise InputError(
                f"{self.name} got {runs} runs, which its tiles {tiles} do not add up to."
            )
        marks = content.new_full((runs,), int(patches * (1 - self.alpha)), dtype=torch.int64)
        marked = top_mask(content, torch.ones_like(content, dtype=torch.bool), marks)
        budgets = torch.zeros_like(marks)
        first = 0
        for rows, columns in tiles:
            count = rows * columns
            total = int((1 + count) * patches * self.ratio)
            overview = min(int(total * self.alpha) if count else total, patches)
            budgets[first] = overview
            if count:
                spend = min(total - overview, count * patches)
                inside = tile_counts(marked[first], rows, columns)
                spent = inside * spend // inside.sum().clamp(min=1)
                budgets[first + 1 : first + 1 + count] = spent.clamp(max=patches)
            first += 1 + count
        return budgets
