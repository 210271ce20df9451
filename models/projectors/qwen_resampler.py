"""Qwen-VL's resampler (arXiv 2308.12966): one layer of queries, with sines of their places."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from planner.models.projectors.projector import Projector, Sizes

_EPS = 1e-6


def _sines(side: int, width: int) -> Tensor:
    """Sines and cosines of columns, then of rows; shape (side^2, width)."""
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], -1)
    columns = line[None].expand(side, -1, -1)
    rows = line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1).float()


class QwenResampler(Projector):
    """Queries at the places of a square grid attend to the patches.

    The decoder's width is a multiple of 4.
    """

    counts, default = "side", 16
    places: Tensor
    patch_places: Tensor

    def __init__(self, sizes: Sizes, number: int) -> None:
        super().__init__(sizes, number)
        grid, text_width = sizes.grid, sizes.text_width
        places = _sines(number, text_width)
        self.register_buffer("places", places, persistent=False)
        image = places.T.reshape(1, text_width, number, number)
        resized = nn.functional.interpolate(image, size=(grid, grid), mode="bicubic")
        self.register_buffer("patch_places", resized.flatten(2)[0].T, persistent=False)
        self.queries = nn.Parameter(torch.zeros(number**2, text_width))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.input = nn.Linear(sizes.width, text_width, bias=False)
        self.query_norm, self.image_norm, self.output_norm = (
            nn.LayerNorm(text_width, eps=_EPS) for _ in range(3)
        )
        heads = max(1, text_width // 128)
        self.attention = nn.MultiheadAttention(text_width, heads, batch_first=True)
        self.output = nn.Linear(text_width, text_width, bias=False)

    @override
    def forward(self, features: Tensor) -> Tensor:
        image = self.image_norm(self.input(features))
        queries = self.query_norm(self.queries) + self.places.to(image.dtype)
        attended, _ = self.attention(
            queries.expand(len(features), -1, -1),
            image + self.patch_places.to(image.dtype),
            image,
            need_weights=False,
        )
        tokens: Tensor = self.output(self.output_norm(attended))
        return tokens
