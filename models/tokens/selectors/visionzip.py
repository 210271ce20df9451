"""VisionZip: dominant patches as they are, the others merged into a few contextual tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from planner.kernels.ops.choose_tokens import top_mask
from planner.models.tokens.selectors.rules import (
    VisionInputs,
    VisionSelection,
    select_features,
    supplied,
)
from planner.models.tokens.selectors.scoring import pack
from planner.planning.selectors import VisionZip


def contextual_tokens(features: Tensor, keys: Tensor, targets: int) -> tuple[Tensor, Tensor]:
    """Merge patches into evenly spaced target patches by key similarity.

    Every patch that is no target joins the target whose key has the highest cosine to its own; a
    target gains the mean of those that joined it.

    `features` have shape (runs, n, width), `keys` (runs, n, key width); of n targets at most.
    Returns tokens, shape (runs, targets, width), and which patches they were, shape (targets,),
    int64.
    """
    n = features.shape[1]
    dtype = torch.promote_types(features.dtype, torch.float32)
    positions = torch.arange(n, device=features.device)[:: max(1, n // max(1, targets))][:targets]
    if not targets:
        return features[:, :0], positions
    joins = torch.ones(n, dtype=torch.bool, device=features.device).index_fill_(0, positions, False)
    direction = normalize(keys.to(dtype), dim=-1)
    nearest = (direction[:, joins] @ direction[:, positions].mT).argmax(-1)
    membership = one_hot(nearest, targets).to(dtype)
    size = membership.sum(1).clamp(min=1)[..., None]
    gained = membership.mT @ features[:, joins].to(dtype) / size
    return (features[:, positions].to(dtype) + gained).to(features.dtype), positions


@select_features.register(VisionZip)
def visionzip(selector: VisionZip, inputs: VisionInputs) -> VisionSelection:
    """All runs at once; they keep equal numbers."""
    tower = inputs.attention(selector.tower_layers[0], selector.name)
    features = inputs.features
    runs, patches = features.shape[:2]
    scores = tower.received().sum(1)
    counts = torch.full((runs,), selector.dominant - tower.has_cls, device=scores.device)
    dominant = top_mask(scores, torch.ones_like(scores, dtype=torch.bool), counts)
    kept, _ = pack(dominant, "right")
    rest, _ = pack(~dominant, "right")
    keys = tower.patch_keys.view(runs, patches, tower.heads, -1).mean(2)
    tokens, targets = contextual_tokens(
        features.take_along_dim(rest[..., None], 1),
        keys.take_along_dim(rest[..., None], 1),
        min(selector.contextual, rest.shape[1]),
    )
    picked = features.take_along_dim(kept[..., None], 1)
    nowhere = kept.new_full((runs, 1), -1)
    first, place = features[:, :0], nowhere[:, :0]
    if tower.has_cls:
        first, place = supplied(inputs.cls_feature, "cls_feature")[:, None], nowhere
    return VisionSelection(
        tuple(torch.cat([first, picked, tokens], dim=1)),
        tuple(torch.cat([place, kept, nowhere.expand(-1, len(targets))], dim=1)),
    )
