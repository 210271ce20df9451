"""PruMerge and PruMerge+: keep the patches CLS attends to, and merge their neighbours into them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from planner.models.tokens.selectors.rules import VisionInputs, VisionSelection, select_features
from planner.models.tokens.selectors.scoring import descending, outliers
from planner.planning.selectors import PruMerge, PruMergePlus
from planner.planning.selectors.in_vision import capped


def merge(
    features: Tensor, keys: Tensor, attention: Tensor, kept: Tensor, neighbours: int
) -> Tensor:
    """Enrich the kept patches of one picture and sum up the others.

    Each kept x becomes x + sum_j a_j x_j over the patches j, kept or not, whose keys are nearest
    by cosine. One more token is the sum of a_j x_j over all patches not kept; with none it is left
    out. The weights a_j are CLS attention and not normalised.

    Of features (patches, width), keys (patches, key width), attention (patches,) and patches kept,
    (k,), the result is (k + 1, width), or (k, width) where everything is kept.
    """
    weighted = features.to(attention.dtype) * attention[:, None]
    direction = normalize(keys.to(attention.dtype), dim=-1)
    similarity = direction[kept] @ direction.mT
    similarity.scatter_(1, kept[:, None], -torch.inf)
    near = descending(similarity)[:, : min(neighbours, len(features) - 1)]
    rest = torch.ones_like(attention, dtype=torch.bool).index_fill_(0, kept, False)
    joins = torch.zeros_like(similarity).scatter_(1, near, 1)
    parts = [features[kept].to(attention.dtype) + joins @ weighted]
    if rest.any():
        parts.append(weighted[rest].sum(0, keepdim=True))
    return torch.cat(parts).to(features.dtype)


@select_features.register(PruMerge)
def prumerge(selector: PruMerge, inputs: VisionInputs) -> VisionSelection:
    """Choose, then merge, picture by picture."""
    tower = inputs.attention(selector.tower_layers[0], selector.name)
    attention = tower.received(heads=1)[:, 0]
    if isinstance(selector, PruMergePlus):
        chosen = _with_grid(selector, attention)
    else:
        chosen = _outlying(attention)
    features, indices = [], []
    for run, kept in enumerate(chosen):
        kept = _capped(selector, kept, attention[run])
        merged = merge(
            inputs.features[run], tower.patch_keys[run], attention[run], kept, selector.neighbours
        )
        features.append(merged)
        indices.append(torch.cat([kept, kept.new_full((len(merged) - len(kept),), -1)]))
    return VisionSelection(tuple(features), tuple(indices))


def _outlying(attention: Tensor) -> list[Tensor]:
    """Patches whose attention, shape (runs, patches), is an outlier, the most attended first."""
    order = descending(attention)
    chosen = outliers(attention).gather(1, order)
    return [row[flags] for row, flags in zip(order, chosen, strict=True)]


def _with_grid(selector: PruMergePlus, attention: Tensor) -> list[Tensor]:
    """Patches to keep, per picture: by attention, shape (runs, patches), then the grid."""
    patches = attention.shape[1]
    if selector.ratio is not None:
        grid = attention.new_tensor(selector.grid(patches, selector.ratio), dtype=torch.int64)
        outside = torch.ones(patches, dtype=torch.bool, device=attention.device)
        outside[grid] = False
        count = int(patches * selector.ratio)
        return [torch.cat([row[outside[row]][:count], grid]) for row in descending(attention)]
    chosen = []
    for kept in _outlying(attention):
        step = patches // max(len(kept), 1)
        grid = torch.arange(0, patches - 1, max(step // 3, 1), device=kept.device)
        chosen.append(torch.cat([kept, grid[~torch.isin(grid, kept)]]))
    return chosen


def _capped(selector: PruMerge, kept: Tensor, attention: Tensor) -> Tensor:
    """What the cap leaves of the patches of one picture, shape (k,), in the same order."""
    if selector.max is None:
        return kept
    # One token is for the sum of the others.
    best = descending(attention[kept])[: capped(len(attention), selector.max) - 1]
    return kept[best.sort().values]
