"""TRIM: keep the patches that stand out against the prompt in CLIP's joint space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planner.ir.errors import InputError
from planner.models.tokens.selectors.base import (
    Needs,
    Product,
    Sizes,
    VisionInputs,
    VisionSelection,
    VisionSelector,
    check_cap,
)
from planner.models.tokens.selectors.ranking import capped, outliers, top_mask

__all__ = ["TRIM", "similarity_scores"]


def similarity_scores(patch_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """Softmax over patches of the *negated* dot product with the prompt's embedding.

    The sign is the released code's: in CLIP's joint space the patches of what a text names are
    the least similar to it ("opposite visualisation", Li et al., CLIP Surgery, arXiv 2304.05653).

    Args:
        patch_embeddings: shape (runs, patches, d).
        text_embeddings: shape (runs, d).

    Returns:
        Shape (runs, patches), float32 or wider.
    """
    dtype = torch.promote_types(patch_embeddings.dtype, torch.float32)
    dots = torch.einsum("rpd,rd->rp", patch_embeddings.to(dtype), text_embeddings.to(dtype))
    return (-dots).softmax(-1)


@dataclass(frozen=True)
class TRIM(VisionSelector):
    """Keep patches by CLIP similarity to the prompt, in order, and the mean of all others.

    Adaptive (no ratio): those whose score lies above Q3 + 1.5 IQR of their own picture; else the
    best int(n ratio). Song et al., "Less is More: A Simple yet Effective Token Reduction Method for
    Efficient Multi-modal LLMs" (arXiv 2409.10994), after the released code's ``TextSim+``, which
    takes one quartile over the whole batch and keeps equally many of each picture. With a cap at
    most int(n max) tokens are left of a picture, the mean of the others among them: where the rule
    says more, the patches with the highest scores.

    Needs CLIP's text encoder and both projections; a checkpoint whose vision tower came without
    them cannot supply these.

    Attributes:
        ratio: share of patches kept; None is adaptive.
        max: largest share of tokens that the adaptive rule leaves; None is no cap.
    """

    name = "trim"
    needs = Needs.TEXT_EMBEDDING
    ratio: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        self.check("ratio", self.ratio is None or 0 <= self.ratio <= 1, "a share from 0 to 1")
        check_cap(self, self.max, self.ratio)

    @property
    def is_adaptive(self) -> bool:
        """Unless there is a fixed ratio."""
        return self.ratio is None

    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """int(tokens ratio) and one for the others; where adaptive at most the cap."""
        if self.ratio is None:
            return (None if self.max is None else capped(tokens, self.max),)
        kept = int(tokens * self.ratio)
        return (kept + (kept < tokens),)

    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """The scores, in a joint space no wider than the tower."""
        return ((1, sizes.image_tokens, sizes.tower),)

    def select(self, inputs: VisionInputs) -> VisionSelection:
        """Score, choose, and average what is left."""
        if inputs.patch_embeddings is None or inputs.text_embeddings is None:
            raise InputError(
                f"{self.name} compares patches with the prompt in CLIP's joint space, but this"
                " model has no CLIP text encoder; take another selector, such as visionzip."
            )
        scores = similarity_scores(inputs.patch_embeddings, inputs.text_embeddings)
        runs, patches = scores.shape
        adaptive = self.ratio is None
        kept = outliers(scores) if adaptive else torch.ones_like(scores, dtype=torch.bool)
        most = patches if self.ratio is None else int(patches * self.ratio)
        if self.max is not None:
            # One token is for the mean of the others.
            most = capped(patches, self.max) - 1
        kept = top_mask(scores, kept, torch.full((runs,), most, device=scores.device))
        features, indices = [], []
        for run, mask in zip(inputs.features, kept, strict=True):
            index, others = mask.nonzero().flatten(), run[~mask]
            summary = others.mean(0, keepdim=True) if len(others) else others
            features.append(torch.cat([run[index], summary]))
            indices.append(torch.cat([index, index.new_full((len(summary),), -1)]))
        return VisionSelection(tuple(features), tuple(indices))
