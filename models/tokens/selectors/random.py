"""Random: one random number for each image token."""

from __future__ import annotations

import numpy as np
import torch

from planner.kernels.ops.choose_tokens import top_mask
from planner.models.tokens.selectors.rules import DecoderInputs, DecoderSelection, select_tokens
from planner.planning.selectors import Random


@select_tokens.register(Random)
def random(selector: Random, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    """Rank image tokens by one random number each."""
    image = inputs.image
    draws = np.random.default_rng(selector.seed).random(image.shape[1])
    ordinal = (image.cumsum(1) - 1).clamp(min=0)
    scores = torch.from_numpy(draws).to(image.device)[ordinal]
    counts = torch.full((image.shape[0],), selector.keep, device=image.device)
    return DecoderSelection(~image | top_mask(scores, image, counts))
