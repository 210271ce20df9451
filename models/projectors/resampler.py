"""Honeybee's Resampler (arXiv 2312.06742), whose layers are mPLUG-Owl's (arXiv 2304.14178)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from planner.models.projectors.projector import Projector, Sizes

_LAYERS = 6
_EPS = 1e-6


class _Layer(nn.Module):
    """Queries attend to themselves and the image; the residual is of the normed queries."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 4 * width
        self.query_norm, self.image_norm, self.mlp_norm = (
            nn.LayerNorm(width, eps=_EPS) for _ in range(3)
        )
        self.attention = nn.MultiheadAttention(width, max(1, width // 64), batch_first=True)
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.hidden_norm = nn.LayerNorm(hidden, eps=_EPS)
        self.down = nn.Linear(hidden, width)

    @override
    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        queries = self.query_norm(queries)
        seen = torch.cat([queries, self.image_norm(image)], 1)
        queries = queries + self.attention(queries, seen, seen, need_weights=False)[0]
        normed = self.mlp_norm(queries)
        hidden = nn.functional.silu(self.gate(normed)) * self.up(normed)
        added: Tensor = self.down(self.hidden_norm(hidden))
        return queries + added


class Resampler(Projector):
    """Six layers of queries between two linears.

    Queries start at random; in the reference they start at zero, and those that are alike stay so.
    """

    counts, default = "tokens", 144

    def __init__(self, sizes: Sizes, number: int) -> None:
        super().__init__(sizes, number)
        width = sizes.width
        self.queries = nn.Parameter(torch.zeros(1, number, width))
        nn.init.normal_(self.queries, std=0.02)
        self.input = nn.Linear(width, width)
        self.layers = nn.ModuleList(_Layer(width) for _ in range(_LAYERS))
        self.output = nn.Linear(width, sizes.text_width)

    @override
    def forward(self, features: Tensor) -> Tensor:
        image = self.input(features)
        queries = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, image)
        tokens: Tensor = self.output(queries)
        return tokens
