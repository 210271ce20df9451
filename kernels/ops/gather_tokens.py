"""The tokens that are left of each sample, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from planner.kernels.ops.op import Gradients, Op


@dataclass(frozen=True, eq=False)
class GatherTokens(Op, name="gather_tokens"):
    """Rows of x by index, exactly: (batch, picked, width). Differentiable in x."""

    x: Tensor  # (batch, tokens, width)
    index: Tensor  # (batch or 1, picked): places, each sample its own

    @override
    def twin(self) -> Tensor:
        rows = self.index.expand(len(self.x), -1)
        return torch.stack([self.x[row, places] for row, places in enumerate(rows)])

    @override
    def by_pytorch(self) -> Tensor:
        return torch.take_along_dim(self.x, self.index[:, :, None], dim=1)

    @override
    def empty(self) -> Tensor:
        return self.x.new_empty(self.x.shape[0], self.index.shape[1], self.x.shape[2])

    @override
    def gradients(self, gradient: Tensor, wanted: list[str]) -> Gradients:
        place = self.index[:, :, None].expand_as(gradient)
        return {"x": torch.zeros_like(self.x).scatter_add(1, place, gradient)}
