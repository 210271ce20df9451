"""DivPrune: keep image tokens that are as different from each other as can be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from planner.models.tokens.selectors.rules import (
    DecoderInputs,
    DecoderSelection,
    select_tokens,
    supplied,
)
from planner.planning.selectors import DivPrune


@select_tokens.register(DivPrune)
def divprune(selector: DivPrune, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    """Sample by sample."""
    states, image = supplied(inputs.hidden_states, "hidden_states"), inputs.image
    keep = ~image
    for sample, pictures in enumerate(image):
        tokens = pictures.nonzero().flatten()
        count = selector.counts(len(tokens))[0]
        if count:
            keep[sample, tokens[diverse(states[sample, tokens], count)]] = True
    return DecoderSelection(keep)


def diverse(features: Tensor, count: int) -> Tensor:
    """Which of n features are picked, in turn: (n, width) to (count,), int64.

    First the one whose nearest neighbour is farthest by 1 - cosine, then the one farthest from all
    that were picked; ties go to the lower index.
    """
    direction = normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    similar = direction @ direction.mT
    # Two that are each other's nearest are equally far, to the last bit as well: a product of
    # matrices need not be symmetric in it.
    distance = 1 - similar.maximum(similar.mT)
    nearest = distance.fill_diagonal_(torch.inf).amin(0)
    picked = [nearest.argmax()]
    nearest = torch.full_like(nearest, torch.inf)
    for _ in range(count - 1):
        nearest = nearest.minimum(distance[picked[-1]])
        nearest[picked[-1]] = -torch.inf
        picked.append(nearest.argmax())
    return torch.stack(picked)
