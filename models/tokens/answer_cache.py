"""A KV cache that stores of an answer what is worth keeping, or of a prompt its end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from planner.models.tokens.kept_tokens import Keys
from planner.models.tokens.selectors.scoring import pack
from planner.planning.selectors import AnswerPolicy, AnswerRule


class AnswerTally:
    """How many tokens of each sample's answer were decoded, and stored."""

    def __init__(self, policy: AnswerPolicy) -> None:
        self.policy = policy
        self.decoded = 0
        # Of the cache layer that this is of, where old tokens go again: how many tokens have
        # passed, and where those stand that are left.
        self.passed = 0
        self.places: list[int] = []
        self.stored: Tensor | None = None  # (rows,), int64; None before the first token

    @property
    def _forgets(self) -> bool:
        """Whether tokens that are stored go again."""
        return isinstance(self.policy, AnswerRule) and self.policy.rule == "recent"

    def fresh(self) -> AnswerTally:
        """The same before any prompt."""
        return AnswerTally(self.policy)

    def count(self, wanted: Tensor) -> Tensor:
        """Count one more token of every sample: which are stored of those wanted, (rows,), bool."""
        if self.stored is None:
            self.stored = torch.zeros_like(wanted, dtype=torch.int64)
        self.decoded += 1
        if self._forgets:
            self.stored = torch.full_like(self.stored, self.policy.most(self.decoded))
            return wanted
        wanted = wanted & (self.stored < self.policy.most(self.decoded))
        self.stored = self.stored + wanted
        return wanted

    def outdated(self, place: int) -> Tensor:
        """Note where a decoded token stands; which of those before go, (n,), int64."""
        if not self._forgets:
            return torch.empty(0, dtype=torch.int64)
        self.passed += 1
        self.places.append(place)
        left = self.policy.most(self.passed)
        gone, self.places = self.places[:-left], self.places[-left:]
        return torch.tensor(gone, dtype=torch.int64)

    def reorder(self, samples: Tensor) -> None:
        """Follow a beam search that replaced the batch by these samples, shape (batch,), int64."""
        if self.stored is not None:
            self.stored = self.stored[samples]

    def repeat(self, repeats: int) -> None:
        """Every sample becomes `repeats` samples, one after the other."""
        if self.stored is not None:
            self.stored = self.stored.repeat_interleave(repeats)


def forget_last(store: Any, keys: Keys, stored: Tensor) -> Keys:
    """Take the newest entry out of a cache layer, of the samples that do not store it.

    An entry that stays goes where its sample has room, so a layer is as long as the sample that
    holds most. What a sample does not hold has position -1.

    Args:
        store: a cache layer with `keys` and `values`, shape (rows, kv heads, n, head_dim).
        keys: where its entries stood, shape (rows, n).
        stored: shape (rows,), bool.

    Returns where they stand now.
    """
    if stored.all():
        return keys
    positions = keys.positions.clone()
    room = positions[:, :-1] < 0
    moves = stored & room.any(1)
    if moves.any():
        rows = moves.nonzero().flatten()
        slots = room[rows].int().argmax(1)
        for name in ("keys", "values"):
            entries = getattr(store, name)
            if entries.requires_grad:
                entries = entries.clone()
            entries[rows, :, slots] = entries[rows, :, -1]
            setattr(store, name, entries)
        positions[rows, slots] = positions[rows, -1]
    stays = stored & ~moves
    positions[~stays, -1] = -1
    if not stays.any():
        store.keys, store.values = store.keys[..., :-1, :], store.values[..., :-1, :]
        positions = positions[:, :-1]
    return Keys(positions, bool((positions < 0).any()))


def forget_before(store: Any, keys: Keys, first: Tensor) -> Keys:
    """Take out of a cache layer, see `forget_last`, what stands before a place, shape (rows,)."""
    return _keep(store, keys, keys.positions >= first[:, None].clamp(min=0))


def forget_places(store: Any, keys: Keys, places: Tensor) -> Keys:
    """Take out of a cache layer, see `forget_last`, what stands at places, shape (n,)."""
    gone = torch.isin(keys.positions, places.to(keys.positions.device))
    return _keep(store, keys, ~gone & (keys.positions >= 0))


def _keep(store: Any, keys: Keys, keep: Tensor) -> Keys:
    index, left = pack(keep, "right")
    store.keys = store.keys.take_along_dim(index[:, None, :, None], 2)
    store.values = store.values.take_along_dim(index[:, None, :, None], 2)
    positions = keys.positions.gather(1, index).masked_fill(~left, -1)
    return Keys(positions, not bool(left.all()))
