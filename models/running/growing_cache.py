"""A dynamic cache layer that appends in place.

transformers' `DynamicLayer` copies all keys and values for every decoded token. Here there is room
for some more behind those stored, so a token costs a write of its own keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values as in `DynamicLayer`; here they are views into larger tensors."""

    # Tokens that memory is asked for ahead.
    ROOM = 64

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values, shape (rows, kv heads, tokens, head_dim); return all stored."""
        # Neither a traced graph nor autograd takes writes into memory that is in use elsewhere.
        differentiated = torch.is_grad_enabled() and key_states.requires_grad
        if torch.compiler.is_compiling() or differentiated:
            stored: tuple[Tensor, Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            return stored
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", key_states)
        self.values = self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: Tensor) -> Tensor:
        stored, room = getattr(self, name), self._rooms.get(name)
        # What `lazy_initialization` makes has one dimension.
        length = stored.shape[-2] if stored.ndim > 1 else 0
        total = length + new.shape[-2]
        if room is None or room.shape[-2] < total or not _starts(room, stored):
            room = new.new_empty(*new.shape[:2], total + self.ROOM, new.shape[-1])
            if length:
                room[..., :length, :] = stored
            self._rooms[name] = room
        room[..., length:total, :] = new
        return room[..., :total, :]

    def offload(self) -> None:
        """Move to the CPU."""
        self._rooms.clear()
        super().offload()

    def reset(self) -> None:
        """Forget all tokens."""
        self._rooms.clear()
        super().reset()


def _starts(room: Tensor, stored: Tensor) -> bool:
    """Whether what is stored is still the front of its room, and the room may be written to."""
    return (
        room.data_ptr() == stored.data_ptr()
        and room.stride() == stored.stride()
        and room.shape[:2] == stored.shape[:2]
        and (torch.is_inference_mode_enabled() or not room.is_inference())
    )
