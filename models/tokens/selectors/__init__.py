"""What token selectors compute, one small file per rule; `planner.planning.selectors` lists them.

In: tensors that an executor took from a stock model. Out: `DecoderSelection` or
`VisionSelection`, by `select_tokens` and `select_features`, or patches, by `select_patches`.

    rules                               what a rule is given and what it returns
    scoring                             rows of attention to score with; from scores to choices
    fastv, sparsevlm, pyramiddrop, dart, divprune, dynamic_llava, random, uniform
                                        rules in the decoder
    learned                             what a trained controller has chosen
    prumerge, visionzip, hired, trim, vispruner, downsample
                                        rules before the projector; prumerge+ is in prumerge,
                                        fastervlm in vispruner
    cdpruner                            a rule right behind it
    ivtp                                a rule in the tower, and in the decoder
    h2o                                 the cache that evicts
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from planner.models.tokens.selectors.h2o import HeavyHitters
from planner.models.tokens.selectors.rules import (
    DecoderInputs,
    DecoderSelection,
    LayerAttention,
    TowerAttention,
    VisionInputs,
    VisionSelection,
    mark_tokens,
    select_features,
    select_patches,
    select_tokens,
)

__all__ = [
    "DecoderInputs",
    "DecoderSelection",
    "HeavyHitters",
    "LayerAttention",
    "TowerAttention",
    "VisionInputs",
    "VisionSelection",
    "mark_tokens",
    "select_features",
    "select_patches",
    "select_tokens",
]

# A rule registers itself when its file is imported.
for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
