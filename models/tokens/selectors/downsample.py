"""Downsample: patches averaged into a smaller grid."""

from __future__ import annotations

from math import isqrt

import torch
from torch.nn.functional import adaptive_avg_pool2d

from planner.models.tokens.selectors.rules import VisionInputs, VisionSelection, select_features
from planner.planning.selectors import Downsample


@select_features.register(Downsample)
def downsample(selector: Downsample, inputs: VisionInputs) -> VisionSelection:
    """All runs at once; a cell stands at the patch in its middle."""
    features = inputs.features
    runs, patches, width = features.shape
    selector.counts(patches)  # refuses pictures that have no such grid
    before, side = isqrt(patches), selector.side
    grid = features.mT.reshape(runs, width, before, before)
    pooled = adaptive_avg_pool2d(grid, side).flatten(2).mT
    middle = (2 * torch.arange(side, device=features.device) + 1) * before // (2 * side)
    places = (middle[:, None] * before + middle).flatten()
    return VisionSelection(tuple(pooled), (places,) * runs)
