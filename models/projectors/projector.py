"""What a projector is: a module that its name with a number builds for a tower and a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """What a projector is built for."""

    width: int  # of the features of one layer of the vision tower
    grid: int  # patches along a side
    text_width: int  # of the decoder


class Projector(nn.Module):
    """Tokens (batch, tokens, text_width) of features (batch, grid^2, width)."""

    # What the number in its name is: "scale", patches along the side of a token's square; "side",
    # tokens along a side; or "tokens".
    counts: ClassVar[str]
    default: ClassVar[int]

    def __init__(self, sizes: Sizes, number: int) -> None:
        super().__init__()
        self.sizes, self.number = sizes, number

    @staticmethod
    def feature_layers(depth: int) -> list[int] | None:
        """The layers of a tower whose features come side by side; None for the model's own one."""
        return None

    def image_of(self, patches: Tensor) -> Tensor:
        """(batch, grid^2, channels) -> (batch, channels, grid, grid)."""
        side = self.sizes.grid
        image: Tensor = patches.transpose(1, 2).unflatten(2, (side, side))
        return image

    def squares_of(self, patches: Tensor) -> Tensor:
        """(batch, grid^2, channels) -> (batch, squares, scale^2, channels)."""
        side = self.sizes.grid // self.number
        apart: Tensor = patches.unflatten(1, (side, self.number, side, self.number))
        return apart.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def tokens_of(image: Tensor) -> Tensor:
    """(batch, channels, rows, columns) -> (batch, rows * columns, channels)."""
    return image.flatten(2).transpose(1, 2)
