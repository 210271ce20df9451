"""TRIM: keep the patches that stand out against the prompt in CLIP's joint space."""

from __future__ import annotations

import torch
from torch import Tensor

from planner.kernels.ops.choose_tokens import top_mask
from planner.models.tokens.selectors.rules import (
    VisionInputs,
    VisionSelection,
    embeddings,
    select_features,
)
from planner.models.tokens.selectors.scoring import outliers
from planner.planning.selectors import TRIM
from planner.planning.selectors.in_vision import capped


def similarity_scores(patch_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """Softmax over patches of the *negated* dot product with the prompt's embedding.

    The sign is the released code's: in CLIP's joint space the patches of what a text names are
    the least similar to it ("opposite visualisation", Li et al., CLIP Surgery, arXiv 2304.05653).
    Shapes: (runs, patches, d) and (runs, d) to (runs, patches), float32 or wider.
    """
    dtype = torch.promote_types(patch_embeddings.dtype, torch.float32)
    dots = torch.einsum("rpd,rd->rp", patch_embeddings.to(dtype), text_embeddings.to(dtype))
    return (-dots).softmax(-1)


@select_features.register(TRIM)
def trim(selector: TRIM, inputs: VisionInputs) -> VisionSelection:
    """Score, choose, and average what is left."""
    scores = similarity_scores(*embeddings(selector, inputs))
    runs, patches = scores.shape
    adaptive = selector.ratio is None
    kept = outliers(scores) if adaptive else torch.ones_like(scores, dtype=torch.bool)
    most = patches if selector.ratio is None else int(patches * selector.ratio)
    if selector.max is not None:
        # One token is for the mean of the others.
        most = capped(patches, selector.max) - 1
    kept = top_mask(scores, kept, torch.full((runs,), most, device=scores.device))
    features, indices = [], []
    for run, mask in zip(inputs.features, kept, strict=True):
        index, others = mask.nonzero().flatten(), run[~mask]
        summary = others.mean(0, keepdim=True) if len(others) else others
        features.append(torch.cat([run[index], summary]))
        indices.append(torch.cat([index, index.new_full((len(summary),), -1)]))
    return VisionSelection(tuple(features), tuple(indices))
