"""One forward pass of the decoder under a plan: what all its layers need to know."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from planner.models.running.kv_cache import PlannedLayer
from planner.models.running.recording import Recorded
from planner.models.tokens.kept_tokens import Kept
from planner.planning.selectors import Selector

__all__ = ["Call", "Record"]


@dataclass(frozen=True, eq=False)
class Record:
    """What an attention block computed with, for which rows of the batch.

    `valid` has shape (rows, keys), bool: False for padding; None where there is none.
    """

    rows: Tensor | None
    valid: Tensor | None
    seen: Recorded


@dataclass(eq=False)
class Call:
    """One forward pass, from the first layer to the last.

    Attributes:
        batch: rows.
        tokens: tokens of this pass, before any is dropped.
        device: where it runs.
        past: tokens before them.
        cache: the planned cache layers, None where there is no cache.
        rows: for each layer and group the batch rows, None for all.
        image: shape (batch, tokens), bool; None where no image token is among them.
        valid: shape (batch, past + tokens), bool: False for padding; None where there is none.
        unwanted: shape (batch, tokens), bool: what a vision selector dropped; None without one.
        left: shape (batch, tokens), bool: tokens not dropped; None before the first stage.
        kept: the same as indices.
        marks: selector -> what it marked before layer 0, shape (batch, tokens), bool.
        records: layer -> what its attention computed with.
    """

    batch: int
    tokens: int
    device: torch.device
    past: int
    cache: list[PlannedLayer] | None
    rows: list[list[Tensor | None]]
    image: Tensor | None = None
    valid: Tensor | None = None
    unwanted: Tensor | None = None
    left: Tensor | None = None
    kept: Kept | None = None
    marks: dict[Selector, Tensor] = field(default_factory=dict)
    records: dict[int, list[Record]] = field(default_factory=dict)

    def new_valid(self) -> Tensor:
        """Which of this pass's tokens are no padding, shape (batch, tokens), bool."""
        assert self.image is not None
        if self.valid is None:
            return torch.ones_like(self.image)
        return self.valid[:, -self.tokens :].clone()
