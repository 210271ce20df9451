"""FastV: drop the image tokens that the last prompt token attends to least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from planner.models.tokens.selectors.base import (
    DecoderInputs,
    DecoderSelection,
    DecoderSelector,
    Needs,
    supplied,
)
from planner.models.tokens.selectors.ranking import top_mask
from planner.models.tokens.selectors.scoring import last_query_attention, visible_keys

__all__ = ["FastV"]


@dataclass(frozen=True)
class FastV(DecoderSelector):
    """Keep round(n (1 - r)) image tokens from layer k on, by attention in layer k - 1.

    The score is the attention that the last prompt token pays each image token, averaged over
    heads. Order and position ids stay. Chen et al., "An Image is Worth 1/2 Tokens After Layer 2"
    (arXiv 2403.06764), section 4. The reference scores sample 0 of a batch and needs the whole
    attention matrix of one layer; here every sample is scored by its own last real token, from one
    row computed from q and K. Counts round half to even, as there.

    Attributes:
        k: the first layer that sees fewer tokens; at least 1.
        r: share of image tokens dropped.
    """

    name = "fastv"
    needs = Needs.QUERY_KEY
    k: int = 2
    r: float = 0.5

    def __post_init__(self) -> None:
        self.check("k", self.k >= 1, "a layer from 1 on, because it scores by the layer before")
        self.check("r", 0 <= self.r <= 1, "a share from 0 to 1")

    @classmethod
    def at(cls, layer: int, keep: int, of: int) -> Self:
        """The FastV that keeps `keep` of `of` tokens from `layer` on."""
        return cls(k=layer, r=1 - keep / of)

    @property
    def layers(self) -> tuple[int, ...]:
        """The one pruned layer."""
        return (self.k,)

    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """round(tokens (1 - r))."""
        return (round(tokens * (1 - self.r)),)

    def select(self, inputs: DecoderInputs, layer: int) -> DecoderSelection:
        """Rank each sample's image tokens by its last query row."""
        query, key = supplied(inputs.query, "query"), supplied(inputs.key, "key")
        image, seq = inputs.image, inputs.image.shape[1]
        tokens = inputs.valid[:, -seq:] * torch.arange(1, seq + 1, device=image.device)
        last = tokens.argmax(1, keepdim=True)
        row = query.gather(2, last[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        visible = visible_keys(last, inputs.valid, inputs.attention_mask, seq)[:, 0]
        scores = last_query_attention(row, key, visible, inputs.scaling).mean(1)[:, -seq:]
        counts = image.new_tensor(
            [self.counts(n)[0] for n in image.sum(1).tolist()], dtype=torch.int64
        )
        return DecoderSelection(~image | top_mask(scores, image, counts))
