"""DART: drop the image tokens that say what a few pivots say already."""

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
from planner.models.tokens.selectors.scoring import descending
from planner.planning.selectors import DART


@select_tokens.register(DART)
def dart(selector: DART, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    """Sample by sample: pivots by norm, then what differs from them."""
    image, seq = inputs.image, inputs.image.shape[1]
    key = supplied(inputs.key, "key")[:, :, -seq:]
    states = supplied(inputs.normed_states, "normed_states")
    dtype = torch.promote_types(key.dtype, torch.float32)
    norms = key.to(dtype).abs().sum((1, 3))
    text = inputs.valid[:, -seq:] if inputs.prompt is None else inputs.prompt
    keep = ~image
    for sample, pictures in enumerate(image):
        tokens = pictures.nonzero().flatten()
        if len(tokens):
            behind = text[sample].nonzero().flatten()
            behind = behind[behind > tokens[-1]]
            keep[sample, _different(selector, tokens, behind, norms[sample], states[sample])] = True
    return DecoderSelection(keep)


def _different(
    selector: DART, tokens: Tensor, behind: Tensor, norms: Tensor, states: Tensor
) -> Tensor:
    """Image tokens of one sample to keep, among (n,) places `tokens`; `behind` are text."""
    picked = tokens[descending(norms[tokens])[: selector.image_pivots]]
    asked = behind[descending(norms[behind])[: selector.text_pivots]]
    pivots = torch.cat([picked, asked])
    pivots = pivots[descending(norms[pivots])]
    features = normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)
    cosines = features[pivots] @ features[tokens].mT
    cosines[:, torch.isin(tokens, picked)] = torch.inf
    share = selector.keep // selector.pivots
    left, kept = len(tokens) - len(picked), [picked]
    for number, row in enumerate(cosines):
        missing = selector.pivots - len(pivots) if number == len(pivots) - 1 else 0
        taken = row.sort(stable=True).indices[: min(share * (1 + missing), left)]
        cosines[:, taken] = torch.inf
        left -= len(taken)
        kept.append(tokens[taken])
    return torch.cat(kept)
