"""Random: the baseline that every selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from planner.models.tokens.selectors.base import DecoderInputs, DecoderSelection, DecoderSelector
from planner.models.tokens.selectors.ranking import top_mask

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(DecoderSelector):
    """Keep a random subset of each sample's image tokens.

    The i-th image token of a sample draws the i-th number of the seeded stream, so a choice depends
    on nothing but the seed and the number of image tokens: not on the batch, padding or device.

    Attributes:
        keep: image tokens kept per sample.
        seed: of the stream.
        k: the first layer that sees fewer tokens; 0 is the whole decoder.
    """

    name = "random"
    keep: int
    seed: int = 0
    k: int = 0

    def __post_init__(self) -> None:
        self.check("keep", self.keep >= 0, "a count from 0 on")
        self.check("seed", self.seed >= 0, "a number from 0 on")
        self.check("k", self.k >= 0, "a layer from 0 on")

    @classmethod
    def at(cls, layer: int, keep: int, of: int) -> Self:
        """The selector that keeps `keep` tokens from `layer` on."""
        return cls(keep=keep, k=layer)

    @property
    def layers(self) -> tuple[int, ...]:
        """The one pruned layer."""
        return (self.k,)

    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """As many as asked for, or all."""
        return (min(self.keep, tokens),)

    def select(self, inputs: DecoderInputs, layer: int) -> DecoderSelection:
        """Rank image tokens by one random number each."""
        image = inputs.image
        draws = np.random.default_rng(self.seed).random(image.shape[1])
        ordinal = (image.cumsum(1) - 1).clamp(min=0)
        scores = torch.from_numpy(draws).to(image.device)[ordinal]
        counts = torch.full((image.shape[0],), self.keep, device=image.device)
        return DecoderSelection(~image | top_mask(scores, image, counts))
