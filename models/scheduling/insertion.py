"""One more token in a decoder's prompt, and what the model sees of the outcome as if without it.

The token stands before place `at` of the prompt, sample by sample: at the end when answering,
before the answer when training. The place before it predicts what comes next from the new token's
output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def end_of_prompt(mask: Any, batch: int, tokens: int, device: torch.device) -> Tensor:
    """The place behind the last token that is no padding, shape (batch,), int64.

    `mask` may have shape (batch, tokens), 0 for padding; anything else says nothing about padding.
    """
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return tokens - mask.to(device).bool().flip(1).long().argmax(1)
    return torch.full((batch,), tokens, device=device)


@dataclass(frozen=True, eq=False)
class Insertion:
    """A token before place `at`, shape (batch,), int64, 1 or more."""

    at: Tensor

    def index(self, length: int) -> tuple[Tensor, Tensor]:
        """(where each of length + 1 places comes from, which is new), shape (batch, length + 1)."""
        places = torch.arange(length + 1, device=self.at.device)[None]
        behind = places >= self.at[:, None]
        return places - behind.long(), places == self.at[:, None]

    def into_hidden(self, hidden: Tensor, token: Tensor) -> Tensor:
        """Embeddings (batch, tokens, width) with the token (batch, width) among them."""
        index, new = self.index(hidden.shape[1])
        moved = hidden.take_along_dim(index[:, :, None], 1)
        return torch.where(new[:, :, None], token[:, None].to(hidden.dtype), moved)

    def into_known(self, known: Tensor, value: Any) -> Tensor:
        """Something known of all tokens, (batch, tokens), with a value for the new one."""
        index, new = self.index(known.shape[1])
        return known.gather(1, index).masked_fill(new, value)

    def into_positions(self, positions: Tensor) -> Tensor:
        """Position ids, (..., batch or 1, tokens): the new token takes one, the rest move on."""
        index, _ = self.index(positions.shape[-1])
        behind = torch.arange(index.shape[1], device=self.at.device) >= self.at[:, None]
        return positions.take_along_dim(index.expand(*positions.shape[:-2], -1, -1), -1) + behind

    def into_mask(self, mask: Tensor, queries: bool) -> Tensor:
        """An attention mask, bool or additive, (batch or 1, 1, queries, keys).

        The new token sees what the place before it sees, and itself; later tokens see it. `queries`
        says whether it is among the queries, not just among the keys.
        """
        index, new = self.index(mask.shape[3])
        rows = mask.take_along_dim(index[:, None, None], 3)
        seen = torch.ones(len(self.at), mask.shape[2], dtype=torch.bool, device=mask.device)
        if queries:
            index, _ = self.index(mask.shape[2])
            rows = rows.take_along_dim(index[:, None, :, None], 2)
            seen = torch.arange(index.shape[1], device=mask.device) >= self.at[:, None]
        shown, hidden = (1, 0) if mask.dtype == torch.bool else (0, torch.finfo(mask.dtype).min)
        column = torch.where(seen, mask.new_tensor(shown), mask.new_tensor(hidden))
        return torch.where(new[:, None, None], column[:, None, :, None], rows)

    def into_any_mask(self, mask: Any, seen: int | None = None) -> Any:
        """A decoder's attention mask, of any kind that transformers passes, with the token.

        `mask`: a tensor, several by kind of layer, or None. `seen`: tokens seen so far, the new
        ones and the inserted one among them; None for a prompt.
        """
        if isinstance(mask, dict):
            return {kind: self.into_any_mask(value, seen) for kind, value in mask.items()}
        if not isinstance(mask, Tensor):
            return mask
        if mask.ndim == 2:
            return self.into_known(mask, 1)
        if seen is None:
            return self.into_mask(mask, True)
        passed = seen - 1 - mask.shape[3]
        if passed <= 0:
            return self.into_mask(mask, False)
        # A sliding window: its keys begin at `passed`, and it is full, so one more pushes one out.
        if bool((self.at < passed).any()):
            return mask
        return Insertion(self.at - passed).into_mask(mask, False)[..., 1:]

    def take(self, hidden: Tensor) -> Tensor:
        """The new token's row of (batch, tokens + 1, width); shape (batch, width)."""
        rows = torch.arange(len(self.at), device=hidden.device)
        return hidden[rows, self.at]

    def out_of(self, hidden: Tensor) -> Tensor:
        """Outputs (batch, tokens + 1, width) as those of the tokens alone.

        The output of the place before the new token gives way to the new token's.
        """
        places = torch.arange(hidden.shape[1] - 1, device=hidden.device)[None]
        index = places + (places >= self.at[:, None] - 1).long()
        return hidden.take_along_dim(index[:, :, None], 1)
