"""HiRED: a token budget spread over the tiles of a high-resolution image."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from planner.ir.errors import InputError
from planner.kernels.ops.choose_tokens import top_mask
from planner.models.tokens.selectors.rules import VisionInputs, VisionSelection, select_features
from planner.models.tokens.selectors.scoring import descending
from planner.planning.selectors import HiRED


def tile_counts(marked: Tensor, rows: int, columns: int) -> Tensor:
    """How many marked patches of a square overview have their centre in each tile.

    `marked` has shape (patches,), bool; the result (rows * columns,), int64; both in raster order.
    """
    side = isqrt(len(marked))
    centre = torch.arange(side, device=marked.device) * 2 + 1
    row, column = centre * rows // (2 * side), centre * columns // (2 * side)
    tile = (row[:, None] * columns + column).flatten()
    return tile[marked].bincount(minlength=rows * columns)


@select_features.register(HiRED)
def hired(selector: HiRED, inputs: VisionInputs) -> VisionSelection:
    """Set every run's budget, then rank all runs at once."""
    early, late = (inputs.attention(layer, selector.name) for layer in selector.tower_layers)
    content = early.received().sum(1)
    scores = late.received().sum(1)
    budgets = _budgets(selector, content, inputs.tiles or ((0, 0),) * len(scores))
    indices = tuple(
        row[:budget].sort().values
        for row, budget in zip(descending(scores), budgets.tolist(), strict=True)
    )
    features = tuple(run[index] for run, index in zip(inputs.features, indices, strict=True))
    return VisionSelection(features, indices)


def _budgets(selector: HiRED, content: Tensor, tiles: tuple[tuple[int, int], ...]) -> Tensor:
    """Tokens that each run may keep, by CLS attention in the first layer, shape (runs, patches)."""
    runs, patches = content.shape
    if sum(1 + rows * columns for rows, columns in tiles) != runs:
        raise InputError(
            f"{selector.name} got {runs} runs, which its tiles {tiles} do not add up to."
        )
    if selector.ratio == 1:
        return torch.full((runs,), patches, device=content.device)
    marks = content.new_full((runs,), int(patches * (1 - selector.alpha)), dtype=torch.int64)
    marked = top_mask(content, torch.ones_like(content, dtype=torch.bool), marks)
    budgets = torch.zeros_like(marks)
    first = 0
    for rows, columns in tiles:
        count = rows * columns
        total = int((1 + count) * patches * selector.ratio)
        overview = min(int(total * selector.alpha) if count else total, patches)
        budgets[first] = overview
        if count:
            spend = min(total - overview, count * patches)
            inside = tile_counts(marked[first], rows, columns)
            spent = inside * spend // inside.sum().clamp(min=1)
            budgets[first + 1 : first + 1 + count] = spent.clamp(max=patches)
        first += 1 + count
    return budgets
