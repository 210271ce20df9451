"""InternVL's Pixel-Shuffle (arXiv 2404.16821, v2 of its code): squares of patches side by side."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from planner.models.projectors.projector import Projector, Sizes


class PixelShuffle(Projector):
    """The patches of a square, row by row, become the channels of one; then LLaVA's MLP."""

    counts, default = "scale", 2

    def __init__(self, sizes: Sizes, number: int) -> None:
        super().__init__(sizes, number)
        joined = number**2 * sizes.width
        self.norm = nn.LayerNorm(joined)
        self.first = nn.Linear(joined, sizes.text_width)
        self.second = nn.Linear(sizes.text_width, sizes.text_width)

    @override
    def forward(self, features: Tensor) -> Tensor:
        joined = self.squares_of(features).flatten(2)
        tokens: Tensor = self.second(nn.functional.gelu(self.first(self.norm(joined))))
        return tokens
