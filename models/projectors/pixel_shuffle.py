"""InternVL's Pixel-Shuffle (arXiv 2404.16821, v2 of its code): squares of patches side by side."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override


class PixelShuffle(nn.Module):
    """The patches of a square, row by row, become the channels of one; then LLaVA's MLP.

    Args:
        width: of the features.
        grid: patches along a side, a multiple of `scale`.
        text_width: of the decoder.
        scale: patches along a square's side.
    """

    def __init__(self, width: int, grid: int, text_width: int, scale: int) -> None:
        super().__init__()
        self.grid, self.scale = grid, scale
        joined = scale * scale * width
        self.norm = nn.LayerNorm(joined)
        self.first = nn.Linear(joined, text_width)
        self.second = nn.Linear(text_width, text_width)

    @override
    def forward(self, features: Tensor) -> Tensor:
        """Tokens (batch, (grid / scale)^2, text_width) of features (batch, grid^2, width)."""
        side = self.grid // self.scale
        apart = features.reshape(len(features), side, self.scale, side, self.scale, -1)
        joined = apart.transpose(2, 3).reshape(len(features), side * side, -1)
        tokens: Tensor = self.second(nn.functional.gelu(self.first(self.norm(joined))))
        return tokens
