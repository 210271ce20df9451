"""TokenPacker (arXiv 2407.02392): each token attends to its own square of patches."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

_EPS = 1e-6


class TokenPacker(nn.Module):
    """One token for each `scale` x `scale` patches.

    A token's query is its square in a smaller image of the last features, resized; keys and values
    are the square's patches, of several layers of the tower. Nothing is added to what is attended.

    Args:
        width: of one layer's features.
        layers: how many layers' features come side by side, the last one last.
        grid: patches along a side; a multiple of `scale`.
        text_width: of the decoder.
        scale: patches along a square's side.
    """

    def __init__(self, width: int, layers: int, grid: int, text_width: int, scale: int) -> None:
        super().__init__()
        self.width, self.grid, self.scale = width, grid, scale
        self.query = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.LayerNorm(width, eps=_EPS)
        )
        self.key, self.value = (
            nn.Sequential(
                nn.Linear(layers * width, width),
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

    @override
    def forward(self, features: Tensor) -> Tensor:
        """Tokens (batch, squares, text_width) of features (batch, grid^2, layers * width)."""
        batch, side = len(features), self.grid // self.scale
        last = features[..., -self.width :].transpose(1, 2)
        last = last.reshape(batch, self.width, self.grid, self.grid)
        small = nn.functional.interpolate(last, size=(side, side), mode="bilinear")
        query = self.query(small.flatten(2).transpose(1, 2))
        attended, _ = self.attention(
            query.reshape(batch * side * side, 1, self.width),
            self._squares(self.key(features)),
            self._squares(self.value(features)),
            need_weights=False,
        )
        tokens: Tensor = self.output(attended.reshape(batch, side * side, self.width))
        return tokens

    def _squares(self, patches: Tensor) -> Tensor:
        """(batch, grid^2, width) -> (batch * squares, scale^2, width)."""
        side = self.grid // self.scale
        apart = patches.reshape(len(patches), side, self.scale, side, self.scale, self.width)
        return apart.transpose(2, 3).reshape(-1, self.scale**2, self.width)
