"""Selectors that leave fewer features between the vision tower and the projector."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

from typing_extensions import override

from planner.ir.errors import InputError
from planner.planning.selectors.arguments import Count, Part, Several, Share
from planner.planning.selectors.selector import Needs, Product, Sizes, VisionSelector


def capped(tokens: int, share: float) -> int:
    """Most of so many tokens that a cap leaves: their share, rounded down, and at least one."""
    return max(1, int(tokens * share))


class Adaptive(VisionSelector):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("max", self.max is None or 0 < self.max < 1, "a share above 0 and below 1")
        if None not in (self.max, self.ratio):
            raise InputError(
                f"{self.name} keeps a fixed number with ratio, and at most a share with max: give "
                "one of the two."
            )


@dataclass(frozen=True)
class PruMerge(Adaptive):
    """Keep the patches whose CLS attention is an outlier, and merge the rest: k + 1 tokens.

    CLS attention is that of the tower's last layer taken as one head over the whole width;
    outliers lie above Q3 + 1.5 IQR of their own picture (the reference takes the quartiles over the
    batch, which is one picture there). Kept tokens come by falling attention, as in the reference,
    then the sum of the others; a picture without outliers becomes that one token. Shang et al.,
    "LLaVA-PruMerge" (arXiv 2403.15388), Algorithm 1; the neighbours' weighted sum is
    added, not their weighted mean, as in the code. That takes int(n (k / n)) of k outliers, which
    may be one fewer in floating point; here all are kept.

    The paper's rule may keep everything. With a cap at most int(n max) tokens are left of a
    picture, the sum of the others among them: where the rule says more, the patches with the
    highest attention of those that it would keep, in its order. A patch that the cap cuts is merged
    as if the rule had dropped it.
    """

    name = "prumerge"
    needs = Needs.TOWER_ATTENTION
    tower_layers: ClassVar[tuple[int, ...]] = (-1,)
    neighbours: Count = 32  # how many nearest patches are merged into a kept one
    max: float | None = None  # largest share of tokens that is left; None is no cap

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
    ratio: Part | None = None  # of patches kept by attention; None is adaptive

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
    mean of what joined it, as in the code. In towers without a CLS token the dominant tokens are
    all patches, by the mean attention that each receives from all.
    """

    name = "visionzip"
    needs = Needs.TOWER_ATTENTION | Needs.CLS_FEATURE
    tower_layers: ClassVar[tuple[int, ...]] = (-2,)
    without_cls = True
    dominant: Several = 54  # tokens kept by attention, CLS among them
    contextual: Count = 10  # tokens merged from the rest

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
            sizes.tower_attention,
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
    Patches stay in raster order, as masks leave them there. At a ratio of 1 all stay.
    """

    name = "hired"
    needs = Needs.TOWER_ATTENTION | Needs.TILES
    tower_layers: ClassVar[tuple[int, ...]] = (0, -2)
    ratio: Share = 0.2  # of patches kept
    alpha: Share = 0.5  # of the budget that goes to the overview

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """int(tokens ratio), of one run."""
        return (int(tokens * self.ratio),)

    @override
    def counts_of_picture(self, tiles: int, patches: int) -> tuple[int | None, ...]:
        """What there is to spend, of which a few tokens may be left."""
        return (int(tiles * patches * self.ratio),)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """CLS attention in two layers."""
        return ((2, sizes.image_tokens + 1, sizes.tower),)


@dataclass(frozen=True)
class FasterVLM(VisionSelector):
    """Keep the patches that CLS attends to most, in raster order.

    CLS attention is that of the tower's second last layer, which feeds the projector, averaged
    over heads; in towers without a CLS token the mean that a patch receives from all patches, as
    the authors advise. Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual
    Token Pruning" (arXiv 2412.01818).
    """

    name = "fastervlm"
    needs = Needs.TOWER_ATTENTION
    tower_layers: ClassVar[tuple[int, ...]] = (-2,)
    without_cls = True
    keep: Count  # of each picture or tile

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        return (min(self.keep, tokens),)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """CLS attention."""
        return (sizes.tower_attention,)


@dataclass(frozen=True)
class VisPruner(FasterVLM):
    """Some patches by CLS attention, the others because they are no duplicates; in raster order.

    int(keep important) patches are those that CLS attends to most, as in FasterVLM. What is left,
    ordered by falling attention, is thinned out in rounds until the rest of `keep` remains: places
    count 0, 1, ...; of the patches at even places the 8 most like some patch at an odd place (or
    as many as are too many) are dropped; the others come first in the next round, the most like
    first, then those at odd places. Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual
    Cues for Effective Token Pruning in VLMs" (arXiv 2412.01818), after the released code, which
    fails where an odd number is left.
    """

    name = "vispruner"
    important: Share = 0.5  # of `keep` that attention picks

    def split(self, patches: int) -> tuple[int, int]:
        """How many of so many patches attention picks, and how many are kept besides."""
        chosen = min(int(self.keep * self.important), patches)
        return chosen, min(self.keep - chosen, patches - chosen)

    def rounds(self, patches: int) -> tuple[tuple[int, int], ...]:
        """Of every round the number of patches that it begins with, and how many it drops."""
        chosen, wanted = self.split(patches)
        left, rounds = patches - chosen, []
        while wanted and left > wanted:
            dropped = min(_DROPPED_AT_ONCE, left - wanted, left - left // 2)
            rounds.append((left, dropped))
            left -= dropped
        return tuple(rounds)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """CLS attention, and cosines of even to odd places in every round."""
        rounds = self.rounds(sizes.image_tokens)
        return (
            *super().products(layer, sizes),
            *((left - left // 2, left // 2, sizes.tower) for left, _ in rounds),
        )


_DROPPED_AT_ONCE = 8


@dataclass(frozen=True)
class Downsample(VisionSelector):
    """Average patches into a grid of side x side: the picture at a lower resolution, a baseline.

    It beats many selectors on common benchmarks: Liao et al., "Are We Using the Right Benchmark: An
    Evaluation Framework for Visual Token Compression Methods" (arXiv 2510.07143). There pictures
    are made smaller; a tower of one resolution takes none, so here what it makes of a picture is.
    Cells are those of adaptive average pooling: they overlap where the sides do not divide.
    """

    name = "downsample"
    side: Several

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """side * side; a picture of fewer patches, or of no square number, is an InputError."""
        if self.side > isqrt(tokens) or isqrt(tokens) ** 2 != tokens:
            raise InputError(
                f"{self} averages squares of patches with at least {self.side} a side, and a "
                f"picture has {tokens} patches here."
            )
        return (self.side**2,)
