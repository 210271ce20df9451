"""Selectors that leave fewer features between the vision tower and the projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from planner.ir.errors import InputError
from planner.planning.selectors.selector import Needs, Product, Sizes, VisionSelector


def capped(tokens: int, share: float) -> int:
    """Most of so many tokens that a cap leaves: their share, rounded down, and at least one."""
    return max(1, int(tokens * share))


class _Adaptive(VisionSelector):
    """Keeps what the picture says, at most a share of it, unless a ratio fixes the number."""

    max: float | None
    ratio: float | None = None

    @property
    @override
    def is_adaptive(self) -> bool:
        return self.ratio is None

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """At most the cap; without one anything up to all tokens."""
        return (None if self.max is None else capped(tokens, self.max),)

    def check_cap(self) -> None:
        """Raise InputError unless the cap is a share, and stands without a ratio."""
        self.check("max", self.max is None or 0 < self.max < 1, "a share above 0 and below 1")
        if None not in (self.max, self.ratio):
            raise InputError(
                f"{self.name} keeps a fixed number with ratio, and at most a share with max: give "
                "one of the two."
            )


@dataclass(frozen=True)
class PruMerge(_Adaptive):
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
    """

    name = "prumerge"
    needs = Needs.TOWER_ATTENTION
    tower_layers: ClassVar[tuple[int, ...]] = (-1,)
    neighbours: int = 32  # how many nearest patches are merged into a kept one
    max: float | None = None  # largest share of tokens that is left; None is no cap

    def __post_init__(self) -> None:
        self.check("neighbours", self.neighbours >= 0, "a count from 0 on")
        self.check_cap()

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """CLS attention; of every kept patch the similarities and the sum of its neighbours."""
        patches, width = sizes.image_tokens, sizes.tower
        kept = self.counts(patches)[0]
        kept = patches if kept is None else kept
        return (1, patches + 1, width), (kept, patches, width), (kept, width, patches)


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
    """

    name = "prumerge+"
    ratio: float | None = None  # share of patches kept by attention; None is adaptive

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("ratio", self.ratio is None or 0 < self.ratio <= 1, "a share above 0, up to 1")

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """Twice the ratio and one, about; where adaptive as PruMerge."""
        if self.ratio is None:
            return super().counts(tokens)
        grid = len(self.grid(tokens, self.ratio))
        kept = grid + min(int(tokens * self.ratio), tokens - grid)
        return (kept + (kept < tokens),)

    @staticmethod
    def grid(patches: int, ratio: float) -> range:
        """The patches kept besides, where the ratio is fixed."""
        step = int(1 / ratio)
        return range(step // 2, patches - 1, step)


@dataclass(frozen=True)
class VisionZip(VisionSelector):
    """CLS, the patches it attends to most, and a few tokens merged from all others.

    CLS attention and keys are those of the tower's second last layer; attention is summed, keys are
    averaged over heads. Yang et al., "VisionZip" (arXiv 2412.04467). In the code the
    CLS token is one of the dominant tokens: the default 54 + 10 are CLS, 53 patches and 10
    contextual tokens, the 64 of the paper's tables. A contextual token is its target patch plus the
    mean of what joined it, as in the code.
    """

    name = "visionzip"
    needs = Needs.TOWER_ATTENTION | Needs.CLS_FEATURE
    tower_layers: ClassVar[tuple[int, ...]] = (-2,)
    dominant: int = 54  # tokens kept by attention, CLS among them
    contextual: int = 10  # tokens merged from the rest

    def __post_init__(self) -> None:
        self.check("dominant", self.dominant >= 1, "a count from 1 on, the CLS token included")
        self.check("contextual", self.contextual >= 0, "a count from 0 on")

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """CLS and `dominant` - 1 patches, then `contextual` tokens, as far as there are patches."""
        patches = min(self.dominant - 1, tokens)
        return (1 + patches + min(self.contextual, tokens - patches),)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """CLS attention; similarities to the targets, and what joined each of them."""
        patches, width = sizes.image_tokens, sizes.tower
        rest = max(patches - (self.dominant - 1), 0)
        targets = min(self.contextual, rest)
        joins = rest - targets
        return (
            (1, patches + 1, width),
            (joins, targets, width // sizes.tower_heads),
            (targets, width, joins),
        )


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
    """

    name = "hired"
    needs = Needs.TOWER_ATTENTION
    tower_layers: ClassVar[tuple[int, ...]] = (0, -2)
    ratio: float = 0.2  # share of patches kept
    alpha: float = 0.5  # share of the budget that goes to the overview

    def __post_init__(self) -> None:
        self.check("ratio", 0 <= self.ratio <= 1, "a share from 0 to 1")
        self.check("alpha", 0 <= self.alpha <= 1, "a share from 0 to 1")

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """int(tokens ratio): exact for one run, at most that on average over tiles."""
        return (int(tokens * self.ratio),)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """CLS attention in two layers."""
        return ((2, sizes.image_tokens + 1, sizes.tower),)


@dataclass(frozen=True)
class TRIM(_Adaptive):
    """Keep patches by CLIP similarity to the prompt, in order, and the mean of all others.

    Adaptive (no ratio): those whose score lies above Q3 + 1.5 IQR of their own picture; else the
    best int(n ratio). Song et al., "Less is More: A Simple yet Effective Token Reduction Method for
    Efficient Multi-modal LLMs" (arXiv 2409.10994), after the released code's ``TextSim+``, which
    takes one quartile over the whole batch and keeps equally many of each picture. With a cap at
    most int(n max) tokens are left of a picture, the mean of the others among them: where the rule
    says more, the patches with the highest scores.

    Needs CLIP's text encoder and both projections; a checkpoint whose vision tower came without
    them cannot supply these.
    """

    name = "trim"
    needs = Needs.TEXT_EMBEDDING
    ratio: float | None = None  # share of patches kept; None is adaptive
    max: float | None = None  # largest share that the adaptive rule leaves; None is no cap

    def __post_init__(self) -> None:
        self.check("ratio", self.ratio is None or 0 <= self.ratio <= 1, "a share from 0 to 1")
        self.check_cap()

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """int(tokens ratio) and one for the others; where adaptive at most the cap."""
        if self.ratio is None:
            return super().counts(tokens)
        kept = int(tokens * self.ratio)
        return (kept + (kept < tokens),)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """The scores, in a joint space no wider than the tower."""
        return ((1, sizes.image_tokens, sizes.tower),)
