"""MobileVLM's LDP-v2 (arXiv 2402.03766): a mean over squares, and a convolution for places."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override


class LdpV2(nn.Module):
    """LLaVA's MLP on every patch, the mean over squares, and a depthwise convolution beside it.

    Args:
        width: of the features.
        grid: patches along a side.
        text_width: of the decoder.
        side: tokens along a side.
    """

    def __init__(self, width: int, grid: int, text_width: int, side: int) -> None:
        super().__init__()
        self.grid = grid
        self.first = nn.Linear(width, text_width)
        self.second = nn.Linear(text_width, text_width)
        self.mean = nn.AdaptiveAvgPool2d(side)
        self.places = nn.Conv2d(text_width, text_width, 3, padding=1, groups=text_width)

    @override
    def forward(self, features: Tensor) -> Tensor:
        """Tokens (batch, side^2, text_width) of features (batch, grid^2, width)."""
        patches = self.second(nn.functional.gelu(self.first(features)))
        image = self.mean(patches.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        return _tokens(image) + _tokens(self.places(image))


def _tokens(image: Tensor) -> Tensor:
    """(batch, channels, rows, columns) -> (batch, rows * columns, channels)."""
    return image.flatten(2).transpose(1, 2)
