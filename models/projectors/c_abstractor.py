"""Honeybee's C-Abstractor (arXiv 2312.06742): convolutions around a mean over squares."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from planner.models.projectors.projector import Projector, Sizes, tokens_of

_EPS = 1e-6
_BLOCKS = 3


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, channels, rows, columns)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=_EPS)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Excitation(nn.Module):
    """Channels times a gate that their means make (squeeze and excitation, arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    @override
    def forward(self, image: Tensor) -> Tensor:
        mean = image.mean((2, 3), keepdim=True)
        gate: Tensor = self.up(nn.functional.silu(self.down(mean))).sigmoid()
        return image * gate


def _block(channels: int) -> nn.Module:
    """RegNet's bottleneck (arXiv 2003.13678), one channel a group."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 1, bias=False),
        _ChannelNorm(channels),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        _ChannelNorm(channels),
        nn.SiLU(),
        _Excitation(channels),
        nn.Conv2d(channels, channels, 1, bias=False),
        _ChannelNorm(channels),
    )


class CAbstractor(Projector):
    """Three blocks, a mean over squares, three blocks, and LLaVA's MLP with SiLU."""

    counts, default = "side", 12

    def __init__(self, sizes: Sizes, number: int) -> None:
        super().__init__(sizes, number)
        width, text_width = sizes.width, sizes.text_width
        self.places = nn.Parameter(torch.zeros(1, sizes.grid**2, width))
        nn.init.trunc_normal_(self.places, std=0.02)
        self.before = nn.ModuleList(_block(width) for _ in range(_BLOCKS))
        self.mean = nn.AdaptiveAvgPool2d(number)
        self.after = nn.ModuleList(_block(width) for _ in range(_BLOCKS))
        self.output = nn.Sequential(
            nn.Linear(width, text_width), nn.SiLU(), nn.Linear(text_width, text_width)
        )

    @override
    def forward(self, features: Tensor) -> Tensor:
        image = self.image_of(features + self.places)
        for block in self.before:
            image = nn.functional.silu(image + block(image))
        image = self.mean(image)
        for block in self.after:
            image = nn.functional.silu(image + block(image))
        tokens: Tensor = self.output(tokens_of(image))
        return tokens
