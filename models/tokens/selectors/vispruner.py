"""VisPruner and FasterVLM: patches that CLS attends to, and patches that are no duplicates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from planner.models.tokens.selectors.rules import VisionInputs, VisionSelection, select_features
from planner.models.tokens.selectors.scoring import descending
from planner.planning.selectors import FasterVLM, VisPruner


@select_features.register(FasterVLM)
def fastervlm(selector: FasterVLM, inputs: VisionInputs) -> VisionSelection:
    """All runs at once; they keep equal numbers."""
    attention = inputs.attention(selector.tower_layers[0], selector.name).received().mean(1)
    kept = order = descending(attention)
    if isinstance(selector, VisPruner):
        chosen, wanted = selector.split(order.shape[1])
        rest = _thinned(selector, inputs.features, order[:, chosen:])
        kept = torch.cat([order[:, :chosen], rest[:, :wanted]], 1)
    kept = kept[:, : selector.keep].sort(1).values
    return VisionSelection(tuple(inputs.features.take_along_dim(kept[..., None], 1)), tuple(kept))


def _thinned(selector: VisPruner, features: Tensor, patches: Tensor) -> Tensor:
    """What the rounds leave of patches, shape (runs, left), of features (runs, patches, width)."""
    direction = normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    for _, dropped in selector.rounds(features.shape[1]):
        even, odd = patches[:, ::2], patches[:, 1::2]
        first, second = (direction.take_along_dim(p[..., None], 1) for p in (even, odd))
        alike = descending((first @ second.mT).amax(-1))
        patches = torch.cat([even.gather(1, alike[:, dropped:]), odd], 1)
    return patches
