"""Selectors that drop tokens between two layers of the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Annotated, Self

from typing_extensions import override

from planner.planning.selectors.arguments import Count, Layer, Several, Share, Within
from planner.planning.selectors.selector import DecoderSelector, Needs, Positioned, Product, Sizes

# Numbers that a budget is told a network by, and the most token counts that one chooses from.
BUDGET_FEATURES = 256
MOST_COUNTS = 32


class FromLayer(DecoderSelector):
    """Drops tokens once, before layer `k`."""

    k: int  # the first layer that sees fewer tokens; 0 is the whole decoder

    @property
    @override
    def layers(self) -> tuple[int, ...]:
        return (self.k,)


@dataclass(frozen=True)
class FastV(FromLayer):
    """Keep round(n (1 - r)) image tokens from layer k on, by attention in layer k - 1.

    The score is the attention that the last prompt token pays each image token, averaged over
    heads. Order and position ids stay. Chen et al., "An Image is Worth 1/2 Tokens After Layer 2"
    (arXiv 2403.06764), section 4. The reference scores sample 0 of a batch and needs the whole
    attention matrix of one layer; here every sample is scored by its own last real token, from one
    row computed from q and K. Counts round half to even, as there.
    """

    name = "fastv"
    needs = Needs.QUERY_KEY
    scores_by_attention = True
    k: Annotated[
        int, Within(1, inf, "a layer from 1 on, because it scores by the layer before")
    ] = 2
    r: Share = 0.5  # of image tokens dropped

    @classmethod
    @override
    def at(cls, layer: int, keep: int, of: int) -> Self:
        return cls(k=layer, r=1 - keep / of)

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        return (round(tokens * (1 - self.r)),)


@dataclass(frozen=True)
class SparseVLM(Positioned, DecoderSelector):
    """Keep the image tokens that selected text attends to, fewer after each of some layers.

    The score is the attention that rating text tokens (`raters` of the rule) pay an image token in
    a layer, averaged over heads and raters. Of the dropped tokens the best 30 % are merged by
    density-peak clustering, ten to one, and recycled. Zhang et al., "SparseVLM" (arXiv 2410.04417).

    The paper derives how many to drop from the rank of the attention matrix; its code has fixed
    tables instead, and so have we: the default is the table for 192 tokens on average, 300/200/110
    and the recycled ones, after layers 2, 6 and 15. In the code, which handles one sample, scores
    come from the same layer's attention and the layers after it see the smaller set. Behind every
    step position ids are contiguous, and recycled tokens stand behind what is left of their
    picture, as in version 1.0 of the code; with ``positions=original`` they take the place of their
    cluster's centre. The reference drops at least one token at every step, this none where there
    are few enough.
    """

    name = "sparsevlm"
    needs = Needs.QUERY_KEY | Needs.MARKS | Needs.HIDDEN_STATES
    after: tuple[int, ...] = (2, 6, 15)  # layers after which tokens are dropped
    keep: tuple[int, ...] = (300, 200, 110)  # after each of them, recycled ones not counted
    recycle: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = all(a < b for a, b in pairwise((-1, *self.after)))
        self.check("after", ascending and len(self.after) > 0, "layers from 0 on, ascending")
        good = len(self.keep) == len(self.after) and min(self.keep) >= 0
        self.check("keep", good, f"one count from 0 on for each of {len(self.after)} layers")

    @classmethod
    @override
    def at(cls, layer: int, keep: int, of: int) -> Self:
        """One step, without recycling, that keeps `keep` tokens from `layer` on."""
        return cls(after=(layer - 1,), keep=(keep,), recycle=False)

    @property
    @override
    def layers(self) -> tuple[int, ...]:
        """The layers after those that score."""
        return tuple(layer + 1 for layer in self.after)

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """What is kept and recycled at each step."""
        left = []
        for keep in self.keep:
            kept = min(keep, tokens)
            tokens = kept + (self.recycled(tokens - kept)[1] if self.recycle else 0)
            left.append(tokens)
        return tuple(left)

    @staticmethod
    def recycled(dropped: int) -> tuple[int, int]:
        """How many of the dropped tokens are recycled, and into how many."""
        if not dropped:
            return 0, 0
        reused = int(dropped * _RECYCLED_SHARE) + 1
        return reused, int(reused / _TOKENS_PER_CLUSTER) + 1

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """The raters' rows of attention and their mean, all text rating; before the first, fits."""
        text, keys = sizes.text_tokens, sizes.text_tokens + sizes.image_tokens
        scores: tuple[Product, ...] = ((text, keys, sizes.query), (1, keys, text))
        if layer == self.layers[0]:
            return (*scores, (sizes.image_tokens, text, sizes.hidden))
        return scores


_RECYCLED_SHARE = 0.3
_TOKENS_PER_CLUSTER = 10


@dataclass(frozen=True)
class PyramidDrop(Positioned, DecoderSelector):
    """Keep a smaller share of the image tokens from each of some layers on.

    The score is the attention that the last prompt token would pay an image token in the layer that
    comes next, averaged over heads: its norm, queries and keys are computed for all tokens, and
    again behind the choice. int(n ratio) of a sample's n image tokens are left, in their order, at
    contiguous position ids. While answers are learned, every token that one follows asks, and their
    mean counts. Xing et al., "PyramidDrop" (arXiv 2410.17247), after the released code. That has
    layers 8, 16 and 24 for 40 layers as for 32; scale them for other depths.
    """

    name = "pyramiddrop"
    needs = Needs.NEXT_QUERY_KEY | Needs.IMAGE_TOKENS
    scores_by_attention = True
    k: tuple[int, ...] = (8, 16, 24)  # the first layers that see fewer tokens
    ratio: tuple[float, ...] = (0.5, 0.25, 0.125)  # shares of all image tokens kept from each on

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = all(a < b for a, b in pairwise((-1, *self.k)))
        self.check("k", ascending, "layers from 0 on, ascending")
        falling = all(a >= b for a, b in pairwise((1, *self.ratio, 0)))
        good = len(self.ratio) == len(self.k) and falling
        self.check(
            "ratio", good, f"one share from 1 to 0, falling, for each of {len(self.k)} layers"
        )

    @property
    @override
    def layers(self) -> tuple[int, ...]:
        return self.k

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        return tuple(int(tokens * ratio) for ratio in self.ratio)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """Queries, keys and values of the next layer, for all tokens that are there."""
        tokens = sizes.text_tokens + sizes.image_tokens
        return (
            (tokens, sizes.query, sizes.hidden),
            (tokens, sizes.key, sizes.hidden),
            (tokens, sizes.key, sizes.hidden),
        )


@dataclass(frozen=True)
class DART(FromLayer):
    """Keep image tokens that differ most from a few pivots, from layer k on.

    Pivots are the image tokens, and the tokens behind the last of them, whose keys in layer k - 1
    have the largest L1 norm over all heads. In turn, by falling norm, each pivot takes its share of
    `keep`, rounded down: the image tokens left whose features have the lowest cosine to its own.
    Features are what enters layer k, through the decoder's final norm. Image pivots are kept too,
    so 132 tokens stay at the default of 4 + 4 pivots and ``keep=128``. Order and position ids stay.
    Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication
    Matters More" (arXiv 2502.11494), after the released code, whose pivots take their turns in the
    order of a Python set, and which handles one sample. Where there are fewer pivots than asked
    for, the last one takes the shares of those that lack.
    """

    name = "dart"
    needs = Needs.QUERY_KEY | Needs.NORMED_STATES
    keep: Count  # per sample, image pivots not counted
    k: Annotated[int, Within(1, inf, "a layer from 1 on, because it looks at keys before it")] = 2
    image_pivots: Several = 4
    text_pivots: Count = 4

    @property
    def pivots(self) -> int:
        """Of image and text, where there are enough tokens."""
        return self.image_pivots + self.text_pivots

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        return (min(tokens, self.image_pivots + self.pivots * (self.keep // self.pivots)),)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """Cosines of the pivots to all image tokens."""
        return ((self.pivots, sizes.image_tokens, sizes.hidden),)


@dataclass(frozen=True)
class DivPrune(Positioned, FromLayer):
    """Keep round(n ratio) image tokens that are as different from each other as can be.

    Greedy max-min diversity on 1 - cosine of what enters layer k, by default the projected
    features: first the token whose nearest neighbour is farthest, then again and again the token
    farthest from all that are kept. Alvar et al., "DivPrune" (arXiv 2503.02175), Algorithm 1; the
    released code may pick a token twice where tokens are duplicates, this never. Order stays, and
    position ids are contiguous, as there.
    """

    name = "divprune"
    needs = Needs.HIDDEN_STATES
    ratio: Share = 0.098  # of image tokens kept
    k: Layer = 0

    @classmethod
    @override
    def at(cls, layer: int, keep: int, of: int) -> Self:
        return cls(ratio=keep / of, k=layer)

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        return (round(tokens * self.ratio),)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """Cosines of all image tokens to each other."""
        return ((sizes.image_tokens, sizes.image_tokens, sizes.hidden),)


@dataclass(frozen=True)
class _Count(FromLayer):
    """Keeps a number of image tokens from one layer on, without a look at the model."""

    keep: Count  # per sample
    k: Layer = 0

    @classmethod
    @override
    def at(cls, layer: int, keep: int, of: int) -> Self:
        return cls(keep=keep, k=layer)

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        return (min(self.keep, tokens),)


@dataclass(frozen=True)
class Learned(_Count):
    """Keep the image tokens that a trained controller scores best, before the decoder.

    The vision side of a unified controller (`planner.models.scheduling`), which also chooses how
    many: a plan says how many that were. It takes the controller to run it.
    """

    name = "learned"
    k: Annotated[int, Within(0, 0, "0, since it works before the decoder")] = 0
    width: Several = 64  # of the controller's features of a token

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """Features of tokens and budget, tokens against words, scores of tokens and of counts."""
        tokens, width = sizes.image_tokens + sizes.text_tokens, self.width
        return (
            (tokens, width, sizes.hidden),
            (1, width, BUDGET_FEATURES),
            (tokens, tokens, width),
            (tokens, 1, width),
            (2, width, tokens),
            (1, MOST_COUNTS, 2 * width),
        )


@dataclass(frozen=True)
class Random(_Count):
    """Keep a random subset of each sample's image tokens: the baseline that others have to beat.

    The i-th image token of a sample draws the i-th number of the seeded stream, so a choice depends
    on nothing but the seed and the number of image tokens: not on the batch, padding or device.
    """

    name = "random"
    seed: Annotated[int, Within(0, inf, "a number from 0 on")] = 0


@dataclass(frozen=True)
class Uniform(_Count):
    """Keep a regular grid of each sample's image tokens, the other baseline without a model.

    Every unbroken run of image tokens is taken as one picture; pictures share the count in
    proportion to their tokens.
    """

    name = "uniform"
