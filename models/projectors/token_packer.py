"""TokenPacker (arXiv 2407.02392): each token attends to its own square of patches."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from planner.models.projectors.projector import Projector, Sizes, tokens_of

_EPS = 1e-6
_LAYERS = 4


class TokenPacker(Projector):
    """One token for each square of patches.

    A token's query is its square in a smaller image of the last features, resized; keys and values
    are the square's patches, of four layers of the tower. Nothing is added to what is attended.
    """

    counts, default = "scale", 2

    def __init__(self, sizes: Sizes, number: int) -> None:
        super().__init__(sizes, number)
        width, text_width = sizes.width, sizes.text_width
        self.query = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.LayerNorm(width, eps=_EPS)
        )
        self.key, self.value = (
            nn.Sequential(
                nn.Linear(_LAYERS * width, width),
                nn.GELU(),
                nn.Linear(width, width),
                nn.LayerNorm(width, eps=_EPS),
            )
            for _ in range(2)
        )
        self.attention = nn.MultiheadAttention(width, max(1, width // 128), batch_first=True)
        self.output = nn.Sequential(
            nn.Linear(width, text_width), nn.GELU(), nn.Linear(text_width, text_width)
        )

    @staticmethod
    @override
    def feature_layers(depth: int) -> list[int]:
        """12, 16, 22 and 23 of a tower of 24."""
        return [depth // 2, 2 * depth // 3, depth - 2, depth - 1]

    @override
    def forward(self, features: Tensor) -> Tensor:
        """Features are those of four layers side by side, (batch, grid^2, 4 * width)."""
        side = self.sizes.grid // self.number
        last = self.image_of(features[..., -self.sizes.width :])
        small = nn.functional.interpolate(last, size=(side, side), mode="bilinear")
        query = self.query(tokens_of(small))
        attended, _ = self.attention(
            query.flatten(0, 1)[:, None],
            self.squares_of(self.key(features)).flatten(0, 1),
            self.squares_of(self.value(features)).flatten(0, 1),
            need_weights=False,
        )
        tokens: Tensor = self.output(attended.reshape_as(query))
        return tokens
