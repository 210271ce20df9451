"""SparseVLM: text tokens that fit the image rate image tokens, in several steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from planner.kernels.ops.choose_tokens import ChooseTokens
from planner.models.tokens.selectors.rules import (
    DecoderInputs,
    DecoderSelection,
    mark_tokens,
    select_tokens,
    supplied,
)
from planner.models.tokens.selectors.scoring import attention_rows, descending, pack, visible_keys
from planner.planning.selectors import SparseVLM


@mark_tokens.register(SparseVLM)
def raters(selector: SparseVLM, hidden_states: Tensor, image: Tensor, valid: Tensor) -> Tensor:
    """Text tokens that may rate: those that fit the image better than the average text token.

    Every image token spreads a softmax of its dot products over the text after the last image
    token; a text token's fit is its mean share, and it rates if that exceeds the mean fit. With no
    text after the image the last token rates.
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
    1e-6 to break ties in density; here ties go to the lower index. Returns positions of the
    centres, shape (clusters,), and the centre of each of n tokens (n, width), shape (n,); int64.
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


def recycle(
    hidden_states: Tensor, image: Tensor, kept: Tensor, scores: Tensor, behind: bool
) -> DecoderSelection:
    """Keep the best dropped image tokens as well, merged into a few.

    `kept`, shape (batch, seq), are image tokens that stay as they are; `scores` has that shape too.
    Merged tokens go `behind` what is left of their picture, the best centre first, or else to their
    centres' places.
    """
    hidden_states, keep = hidden_states.clone(), ~image | kept
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    pictures = (image & ~pad(image, (1, -1))).cumsum(1)
    for sample in range(len(image)):
        dropped = (image[sample] & ~kept[sample]).nonzero().flatten()
        reused, clusters = SparseVLM.recycled(len(dropped))
        if not reused:
            continue
        best = dropped[descending(scores[sample, dropped])[:reused]]
        tokens = hidden_states[sample, best].to(dtype)
        centres, members = cluster(tokens, clusters)
        sums = tokens.new_zeros(clusters, tokens.shape[1]).index_add_(0, members, tokens)
        means = sums / members.bincount(minlength=clusters)[:, None]
        places = best[centres]
        hidden_states[sample, places] = means.to(hidden_states.dtype)
        keep[sample, places] = True
        if behind:
            order = torch.cat([kept[sample].nonzero().flatten(), places])
            order = order[pictures[sample, order].sort(stable=True).indices]
            hidden_states[sample, order.sort().values] = hidden_states[sample, order]
    return DecoderSelection(keep, hidden_states)


@select_tokens.register(SparseVLM)
def sparsevlm(selector: SparseVLM, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    """Rank by the raters' rows of attention, then recycle."""
    query, key = supplied(inputs.query, "query"), supplied(inputs.key, "key")
    image, seq = inputs.image, inputs.image.shape[1]
    rows, rating = pack(supplied(inputs.marks, "marks"), "right")
    visible = visible_keys(rows, inputs.valid, inputs.attention_mask, seq)
    raters_query = query.take_along_dim(rows[:, None, :, None], 2)
    attention = attention_rows(raters_query, key, visible, inputs.rule).mean(1)
    weight = rating / rating.sum(1, keepdim=True).clamp(min=1)
    scores = torch.einsum("brk,br->bk", attention, weight.to(attention.dtype))[:, -seq:]
    keep = selector.keep[selector.layers.index(layer)]
    counts = torch.full((len(image),), keep, device=image.device)
    kept = ChooseTokens(scores, image, counts).run(triton=inputs.triton)
    if not selector.recycle:
        return DecoderSelection(~image | kept)
    hidden_states = supplied(inputs.hidden_states, "hidden_states")
    return recycle(hidden_states, image, kept, scores, behind=selector.renumbers)
