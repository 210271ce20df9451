"""CDPruner: keep patches that matter to the question and are unlike each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from planner.models.tokens.selectors.rules import (
    VisionInputs,
    VisionSelection,
    embeddings,
    select_features,
    supplied,
)
from planner.planning.selectors import CDPruner

# Added to the smallest relevance, which would rule its patch out; and the least variance left.
_EPSILON = 1e-6
_LEAST = 1e-12


@select_features.register(CDPruner)
def cdpruner(selector: CDPruner, inputs: VisionInputs) -> VisionSelection:
    """All runs at once; they keep equal numbers."""
    patches, question = embeddings(selector, inputs)
    projected = supplied(inputs.projected, "projected")
    direction = normalize(_wide(projected), dim=-1)
    weight = relevance(patches, question)
    kernel = weight[:, :, None] * (direction @ direction.mT) * weight[:, None, :]
    kept = most_probable(kernel, min(selector.keep, kernel.shape[1])).sort(1).values
    return VisionSelection(tuple(projected.take_along_dim(kept[..., None], 1)), tuple(kept))


def relevance(patches: Tensor, question: Tensor) -> Tensor:
    """From 0, and a little more, to 1: (runs, patches, d) and (runs, d) to (runs, patches).

    1 is the patch least similar to the question, see `trim.similarity_scores`. Where all are as
    similar, all are 1.
    """
    cosine = torch.einsum("rpd,rd->rp", normalize(_wide(patches), dim=-1), _wide(question))
    low, high = (-cosine).aminmax(dim=1, keepdim=True)
    scaled = (-cosine - low + _EPSILON) / torch.where(high > low, high - low, _EPSILON)
    return torch.where(high > low, scaled, torch.ones_like(scaled))


def most_probable(kernel: Tensor, count: int) -> Tensor:
    """Sets of so many items of determinantal point processes, greedily the most probable.

    Each item adds most to the determinant of what is picked; ties go to the lower index. Chen et
    al., "Fast Greedy MAP Inference for Determinantal Point Process" (arXiv 1709.05135), algorithm
    1. Kernels (runs, n, n) to items in turn, (runs, count), int64.
    """
    runs, items = kernel.shape[:2]
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = kernel.new_zeros(runs, count, items)
    picked = torch.zeros(runs, count, dtype=torch.int64, device=kernel.device)
    every = torch.arange(runs, device=kernel.device)
    for turn in range(count):
        best = left.argmax(1)
        picked[:, turn] = best
        before = rows[:, :turn]
        known = torch.einsum("rt,rtn->rn", before[every, :, best], before)
        scale = left[every, best].clamp(min=_LEAST).sqrt()
        rows[:, turn] = (kernel[every, best] - known) / scale[:, None]
        left = left - rows[:, turn] ** 2
        left[every, best] = -torch.inf
    return picked


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
