"""PruMerge and PruMerge+: keep the patches CLS attends to, and merge their neighbours into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from planner.models.tokens.selectors.base import (
    Needs,
    Product,
    Sizes,
    VisionInputs,
    VisionSelection,
    VisionSelector,
    check_cap,
)
from planner.models.tokens.selectors.ranking import capped, descending, outliers
from planner.models.tokens.selectors.scoring import cls_attention

__all__ = ["PruMerge", "PruMergePlus", "merge"]


def merge(
    features: Tensor, keys: Tensor, attention: Tensor, kept: Tensor, neighbours: int
) -> Tensor:
    """Enrich the kept patches of one picture and sum up the others.

    Each kept x becomes x + sum_j a_j x_j over the patches j, kept or not, whose keys are nearest
    by cosine. One more token is the sum of a_j x_j over all patches not kept; with none it is left
    out. The weights a_j are CLS attention and not normalised.

    Args:
        features: shape (patches, width).
        keys: shape (patches, key width).
        attention: shape (patches,).
        kept: shape (k,), int64.
        neighbours: how many patches are merged into a kept one.

    Returns:
        Shape (k + 1, width), or (k, width) where everything is kept.
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


@dataclass(frozen=True)
class PruMerge(VisionSelector):
    """Keep the patches whose CLS attention is an outlier, and merge the rest: k + 1 tokens.

    CLS attention is that of the tower's last layer taken as one head over the whole width;
    outliers lie above Q3 + 1.5 IQR of their own picture (the reference takes the quartiles over the
    batch, which is one picture there). Kept tokens come by falling attention, as in the reference,
    then the sum of the others; a picture without outliers becomes that one token. Shang et al.,
    "LLaVA-PruMerge" (arXiv 2403.15388), Algorithm 1; the neighbours' weighted sum is
    added, not their weighted mean, as in the code.

    The paper's rule may keep everything. With a cap at most int(n max) tokens are left of a
    picture, the sum of the others among them: where the rule says more, the patches with the
    highest attention of those that it would keep, in its order. A patch that the cap cuts is merged
    as if the rule had dropped it.

    Attributes:
        neighbours: how many nearest patches are merged into a kept one.
        max: largest share of tokens that is left; None is no cap.
    """

    name = "prumerge"
    needs = Needs.TOWER_ATTENTION
    tower_layers: ClassVar[tuple[int, ...]] = (-1,)
    neighbours: int = 32
    max: float | None = None

    def __post_init__(self) -> None:
        self.check("neighbours", self.neighbours >= 0, "a count from 0 on")
        check_cap(self, self.max)

    @property
    def is_adaptive(self) -> bool:
        """The outliers are as many as they are."""
        return True

    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """At most the cap; without one anything up to all tokens."""
        return (None if self.max is None else capped(tokens, self.max),)

    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """CLS attention; of every kept patch the similarities and the sum of its neighbours."""
        patches, width = sizes.image_tokens, sizes.tower
        kept = self.counts(patches)[0]
        kept = patches if kept is None else kept
        return (1, patches + 1, width), (kept, patches, width), (kept, width, patches)

    def choose(self, attention: Tensor) -> list[Tensor]:
        """Patches to keep, per picture, in output order.

        Args:
            attention: shape (runs, patches).
        """
        order = descending(attention)
        chosen = outliers(attention).gather(1, order)
        return [row[flags] for row, flags in zip(order, chosen, strict=True)]

    def select(self, inputs: VisionInputs) -> VisionSelection:
        """Choose, then merge, picture by picture."""
        tower = inputs.attention(self.tower_layers[0], self.name)
        attention = cls_attention(tower.query, tower.key, heads=1)[:, 0]
        features, indices = [], []
        for run, kept in enumerate(self.choose(attention)):
            kept = self._capped(kept, attention[run])
            merged = merge(
                inputs.features[run], tower.key[run, 1:], attention[run], kept, self.neighbours
            )
            features.append(merged)
            indices.append(torch.cat([kept, kept.new_full((len(merged) - len(kept),), -1)]))
        return VisionSelection(tuple(features), tuple(indices))

    def _capped(self, kept: Tensor, attention: Tensor) -> Tensor:
        """What the cap leaves of the patches of one picture, shape (k,), in the same order."""
        if self.max is None:
            return kept
        # One token is for the sum of the others.
        best = descending(attention[kept])[: capped(len(attention), self.max) - 1]
        return kept[best.sort().values]


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with a spatial grid of patches kept besides.

    Adaptive (no ratio): the share of outliers is the ratio; the grid has stride int(step / 3) from
    patch 0, step = int(1 / ratio), and comes behind the outliers. Without outliers the ratio is
    taken as one patch. Fixed ratio: int(n ratio) patches by attention and a grid of stride step
    from step // 2. The grid leaves out the last patch, as the reference's range does.

    With a fixed ratio of 1/8 the reference gives 72 + 72 + 1 = 145 tokens of 576. A patch that is
    among the best and on the grid appears twice there, and its sum of the others then leaves out
    one that belongs to it. Here the 72 best come from outside the grid: 145 tokens, all different.

    A cap, as in PruMerge, goes with the adaptive rule. Attention decides what it leaves, so
    outliers go before the grid, and of the grid the patches stay that CLS attends to most.

    Attributes:
        neighbours: how many nearest patches are merged into a kept one.
        max: largest share of tokens that is left; None is no cap.
        ratio: share of patches kept by attention; None is adaptive.
    """

    name = "prumerge+"
    ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("ratio", self.ratio is None or 0 < self.ratio <= 1, "a share above 0, up to 1")
        check_cap(self, self.max, self.ratio)

    @property
    def is_adaptive(self) -> bool:
        """Unless there is a fixed ratio."""
        return self.ratio is None

    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """Twice the ratio and one, about; where adaptive as PruMerge."""
        if self.ratio is None:
            return super().counts(tokens)
        grid = len(self._grid(tokens, self.ratio))
        kept = grid + min(int(tokens * self.ratio), tokens - grid)
        return (kept + (kept < tokens),)

    def choose(self, attention: Tensor) -> list[Tensor]:
        """Patches to keep, per picture: by attention, then the grid."""
        patches = attention.shape[1]
        if self.ratio is not None:
            grid = attention.new_tensor(self._grid(patches, self.ratio), dtype=torch.int64)
            outside = torch.ones(patches, dtype=torch.bool, device=attention.device)
            outside[grid] = False
            count = int(patches * self.ratio)
            return [torch.cat([row[outside[row]][:count], grid]) for row in descending(attention)]
        chosen = []
        for kept in super().choose(attention):
            step = patches // max(len(kept), 1)
            grid = torch.arange(0, patches - 1, max(step // 3, 1), device=kept.device)
            chosen.append(torch.cat([kept, grid[~torch.isin(grid, kept)]]))
        return chosen

    @staticmethod
    def _grid(patches: int, ratio: float) -> range:
        step = int(1 / ratio)
        return range(step // 2, patches - 1, step)
