"""SparseVLM: text tokens that fit the image rate image tokens, in several steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from planner.models.tokens.selectors.base import (
    DecoderInputs,
    DecoderSelection,
    DecoderSelector,
    Needs,
    Product,
    Sizes,
    supplied,
)
from planner.models.tokens.selectors.ranking import descending, pack, top_mask
from planner.models.tokens.selectors.scoring import attention_rows, visible_keys

__all__ = ["SparseVLM", "cluster", "raters"]

RECYCLED_SHARE = 0.3
TOKENS_PER_CLUSTER = 10


def raters(hidden_states: Tensor, image: Tensor, valid: Tensor) -> Tensor:
    """Text tokens that may rate: those that fit the image better than the average text token.

    Every image token spreads a softmax of its dot products over the text after the last image
    token; a text token's fit is its mean share, and it rates if that exceeds the mean fit. With no
    text after the image the last token rates.

    Args:
        hidden_states: shape (batch, seq, width): embeddings, before layer 0.
        image: shape (batch, seq), bool.
        valid: shape (batch, seq), bool.

    Returns:
        Shape (batch, seq), bool.
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    chosen = torch.zeros_like(image)
    for sample in range(image.shape[0]):
        pictures = image[sample].nonzero().flatten()
        tokens = valid[sample].nonzero().flatten()
        if not len(tokens):
            continue
        question = tokens[tokens > pictures[-1]] if len(pictures) else tokens[:0]
        if not len(question):
            chosen[sample, tokens[-1]] = True
            continue
        states = hidden_states[sample].to(dtype)
        fit = (states[pictures] @ states[question].mT).softmax(-1).mean(0)
        # All fits equal (one token of text, say): everyone is average, so everyone rates.
        better = fit > fit.mean()
        chosen[sample, question[better] if better.any() else question] = True
    return chosen


def cluster(tokens: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Density-peak clustering with k nearest neighbours, k being the number of clusters.

    A token's density is exp(-mean squared distance to its k nearest, itself among them); centres
    have the largest products of density and distance to the nearest denser token. Each token joins
    the nearest centre. Distances are divided by sqrt(width). The reference adds random noise of
    1e-6 to break ties in density; here ties go to the lower index.

    Args:
        tokens: shape (n, width).
        clusters: at most n.

    Returns:
        centres: shape (clusters,), int64: positions of the centres.
        members: shape (n,), int64: which centre each token belongs to.
    """
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / tokens.shape[-1] ** 0.5
    nearest = distance.sort(-1).values[:, :clusters]
    density = (-nearest.square().mean(-1)).exp()
    denser = density[None, :] > density[:, None]
    peak = torch.where(denser, distance, distance.max()).min(-1).values
    centres = descending(density * peak)[:clusters]
    members = distance[:, centres].argmin(-1)
    members[centres] = torch.arange(clusters, device=tokens.device)
    return centres, members


def recycled(dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are recycled, and into how many."""
    if not dropped:
        return 0, 0
    reused = int(dropped * RECYCLED_SHARE) + 1
    return reused, int(reused / TOKENS_PER_CLUSTER) + 1


def recycle(hidden_states: Tensor, image: Tensor, kept: Tensor, scores: Tensor) -> DecoderSelection:
    """Keep the best dropped image tokens as well, merged into a few.

    Args:
        hidden_states: shape (batch, seq, width).
        image: shape (batch, seq), bool.
        kept: shape (batch, seq), bool: image tokens that stay as they are.
        scores: shape (batch, seq).
    """
    hidden_states, keep = hidden_states.clone(), ~image | kept
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    for sample in range(len(image)):
        dropped = (image[sample] & ~kept[sample]).nonzero().flatten()
        reused, clusters = recycled(len(dropped))
        if not reused:
            continue
        best = dropped[descending(scores[sample, dropped])[:reused]]
        tokens = hidden_states[sample, best].to(dtype)
        centres, members = cluster(tokens, clusters)
        sums = tokens.new_zeros(clusters, tokens.shape[1]).index_add_(0, members, tokens)
        means = sums / members.bincount(minlength=clusters)[:, None]
        hidden_states[sample, best[centres]] = means.to(hidden_states.dtype)
        keep[sample, best[centres]] = True
    return DecoderSelection(keep, hidden_states)


@dataclass(frozen=True)
class SparseVLM(DecoderSelector):
    """Keep the image tokens that selected text attends to, fewer after each of some layers.

    The score is the attention that rating text tokens (`raters`) pay an image token in a layer,
    averaged over heads and raters. Of the dropped tokens the best 30 % are merged by density-peak
    clustering, ten to one, and recycled. Zhang et al., "SparseVLM" (arXiv 2410.04417).

    The paper derives how many to drop from the rank of the attention matrix; its code has fixed
    tables instead, and so have we: the default is the table for 192 tokens on average, 300/200/110
    and the recycled ones, after layers 2, 6 and 15. In the code, which handles one sample, scores
    come from the same layer's attention and the layers after it see the smaller set. Recycled
    tokens go behind the image there, with renumbered positions; here they take the place and
    position id of their cluster's centre, so what is left stays in its original order. The
    reference drops at least one token at every step, this none where there are few enough.

    Attributes:
        after: layers after which tokens are dropped, ascending.
        keep: image tokens kept after each of them, recycled ones not counted.
        recycle: whether dropped tokens are recycled.
    """

    name = "sparsevlm"
    needs = Needs.QUERY_KEY | Needs.MARKS | Needs.HIDDEN_STATES
    after: tuple[int, ...] = (2, 6, 15)
    keep: tuple[int, ...] = (300, 200, 110)
    recycle: bool = True

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in pairwise((-1, *self.after)))
        self.check("after", ascending and len(self.after) > 0, "layers from 0 on, ascending")
        good = len(self.keep) == len(self.after) and min(self.keep) >= 0
        self.check("keep", good, f"one count from 0 on for each of {len(self.after)} layers")

    @classmethod
    def at(cls, layer: int, keep: int, of: int) -> Self:
        """One step, without recycling, that keeps `keep` tokens from `layer` on."""
        return cls(after=(layer - 1,), keep=(keep,), recycle=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers after those that score."""
        return tuple(layer + 1 for layer in self.after)

    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """What is kept and recycled at each step."""
        left = []
        for keep in self.keep:
            kept = min(keep, tokens)
            tokens = kept + (recycled(tokens - kept)[1] if self.recycle else 0)
            left.append(tokens)
        return tuple(left)

    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """The raters' rows of attention and their mean, all text rating; before the first, fits."""
        text, keys = sizes.text_tokens, sizes.text_tokens + sizes.image_tokens
        scores: tuple[Product, ...] = ((text, keys, sizes.query), (1, keys, text))
        if layer == self.layers[0]:
            return (*scores, (sizes.image_tokens, text, sizes.hidden))
        return scores

    def mark(self, hidden_states: Tensor, image: Tensor, valid: Tensor) -> Tensor:
        """The rating text tokens."""
        return raters(hidden_states, image, valid)

    def select(self, inputs: DecoderInputs, layer: int) -> DecoderSelection:
        """Rank by the raters' rows of attention, then recycle."""
        query, key = supplied(inputs.query, "query"), supplied(inputs.key, "key")
        image, seq = inputs.image, inputs.image.shape[1]
        rows, rating = pack(supplied(inputs.marks, "marks"), "right")
        visible = visible_keys(rows, inputs.valid, inputs.attention_mask, seq)
        index = rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        attention = attention_rows(query.gather(2, index), key, visible, inputs.scaling).mean(1)
        weight = rating / rating.sum(1, keepdim=True).clamp(min=1)
        scores = torch.einsum("brk,br->bk", attention, weight.to(attention.dtype))[:, -seq:]
        keep = self.keep[self.layers.index(layer)]
        counts = torch.full((len(image),), keep, device=image.device)
        kept = top_mask(scores, image, counts)
        if not self.recycle:
            return DecoderSelection(~image | kept)
        hidden_states = supplied(inputs.hidden_states, "hidden_states")
        return recycle(hidden_states, image, kept, scores)
