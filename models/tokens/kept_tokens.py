"""Which tokens of a batch go on, and how the arguments of a layer shrink with them.

Between layers the hidden states keep their stock length; a layer behind a token stage gathers the
rows that are left, runs on those alone, and writes its results back. What the stock code does
between and after layers (DeepStack features, labels, `output_hidden_states`) then still fits, and
rows of dropped tokens rest at the value they had when they were dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Kept:
    """The tokens that are left, per sample, of those in one call."""

    # (rows, longest), int64: places, ascending; padding, at the end, repeats some place of the row.
    index: Tensor
    lengths: tuple[int, ...]  # how many of each row are real

    @staticmethod
    def of(keep: Tensor) -> Kept:
        """From flags, shape (rows, seq)."""
        lengths = tuple(keep.sum(1).tolist())
        order = keep.sort(dim=1, stable=True, descending=True).indices
        return Kept(order[:, : max(lengths)], lengths)

    def rows(self, rows: Tensor | None) -> Kept:
        """The same for some rows of the batch."""
        if rows is None:
            return self
        lengths = tuple(self.lengths[row] for row in rows.tolist())
        return Kept(self.index[rows, : max(lengths)], lengths)

    @property
    def is_ragged(self) -> bool:
        """Whether some rows are padded."""
        return len(set(self.lengths)) > 1

    @property
    def valid(self) -> Tensor:
        """Shape (rows, longest), bool: False for padding."""
        lengths = torch.tensor(self.lengths, device=self.index.device)
        return torch.arange(self.index.shape[1], device=self.index.device) < lengths[:, None]

    def positions(self, past: int) -> Tensor:
        """Places among all tokens seen when `past` came before; -1 for padding."""
        positions = self.index + past
        return torch.where(self.valid, positions, -1) if self.is_ragged else positions


def gather(tensor: Tensor, index: Tensor, axis: int) -> Tensor:
    """Pick places along a negative axis, each batch row its own; rows are the axis before.

    `tensor` may have one row for all; `index` has shape (rows, picked).
    """
    if len(index) == 1:
        return tensor.index_select(axis, index[0])
    view = [1] * tensor.ndim
    view[axis - 1], view[axis] = index.shape
    return tensor.take_along_dim(index.view(view), axis)


def select_rows(tensor: Tensor, rows: Tensor | None, axis: int) -> Tensor:
    """Pick batch rows, unless one row serves all of them."""
    if rows is None or tensor.shape[axis] == 1:
        return tensor
    return tensor.index_select(axis, rows)


def narrow_argument(
    value: Any,
    batch: int,
    tokens: int,
    rows: Tensor | None,
    index: Tensor | None,
    leading: int | None = None,
) -> Any:
    """Shrink what a decoder hands its layers beside the hidden states.

    Works by shape: position ids are integers, shape (..., batch or 1, tokens); rotary embeddings
    and other per-token values are floats, shape (..., batch or 1, tokens, width). Others belong to
    samples where their first dimension counts those, such as an image that is attended to, shape
    (batch, features, width), or biases by head, shape (batch * heads, 1, keys); all that is left is
    returned as it is.

    Args:
        batch: rows of the pass.
        rows: to pick; None for all.
        index: of the tokens to pick, shape (rows, picked); None for all.
        leading: first dimension of the argument where there is one sample; None where unknown.
    """
    if isinstance(value, tuple | list):
        return type(value)(narrow_argument(item, batch, tokens, rows, index) for item in value)
    if not isinstance(value, Tensor):
        return value
    axis = -2 if value.is_floating_point() or value.is_complex() else -1
    by_token = value.ndim >= 1 - axis and value.shape[axis] == tokens
    if by_token and value.shape[axis - 1] in (1, batch):
        if value.ndim == 4 and value.shape[1] == 1:
            # A mask.
            value = select_rows(value, rows, 0)
        value = select_rows(value, rows, axis - 1)
        return value if index is None else gather(value, index, axis)
    by_sample = value.ndim > 0 and value.shape[0] % batch == 0
    if by_sample and leading is not None:
        by_sample = value.shape[0] == leading * batch
    if rows is not None and batch > 1 and by_sample:
        return value.unflatten(0, (batch, -1)).index_select(0, rows).flatten(0, 1)
    return value


@dataclass(frozen=True, eq=False)
class Keys:
    """What the queries of one call can attend to, behind a token stage."""

    positions: Tensor  # (rows, keys): places among all tokens seen, -1 for padding
    padded: bool  # whether any is padding


def narrow_mask(
    mask: Tensor | None,
    rows: Tensor | None,
    queries: Tensor | None,
    keys: Keys | None,
    seen: int,
    *,
    causal: bool = True,
    flash: bool = False,
) -> Tensor | None:
    """Shrink an attention mask to the tokens that are left.

    Args:
        mask: None (everything, or causal where several tokens enter an empty cache), or shape
            (batch or 1, keys) for flash attention, or (batch or 1, 1, tokens, keys), bool or
            additive.
        rows: rows of the group, None for all.
        queries: places in this call of the queries that are left, shape (rows, left); None for all.
        keys: those that are left; None where nothing was dropped.
        seen: tokens seen, those of this call included.
        causal: whether the attention block is causal where it is given no mask.
        flash: whether it takes masks of flash attention.
    """
    if mask is not None:
        mask = select_rows(mask, rows, 0)
    if keys is None or (mask is None and not keys.padded):
        return mask
    places = keys.positions
    if mask is None:
        visible = places >= 0
        if flash or queries is None:
            return visible if flash else visible[:, None, None, :]
        if not causal:
            return visible[:, None, None, :].expand(-1, -1, queries.shape[1], -1)
        # Without a mask the cache was empty, so places in the call are places among all tokens.
        return (visible[:, None, :] & (places[:, None, :] <= queries[:, :, None]))[:, None]
    # The columns of a mask end with this call's last token; those of a sliding window start late.
    # Padding falls before the first column, as do tokens that such a window has left behind.
    columns = places - (seen - mask.shape[-1])
    outside = columns < 0
    columns = columns.clamp(min=0)
    if mask.ndim == 2:
        return gather(mask, columns, -1).masked_fill(outside, 0)
    mask = mask.squeeze(1)
    if queries is not None:
        mask = gather(mask, queries, -2)
    mask = mask.take_along_dim(columns[:, None, :], -1)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(outside[:, None, :], hidden)[:, None]


def scatter(hidden: Tensor, rows: Tensor | None, kept: Kept | None, results: Tensor) -> Tensor:
    """Write a group's results (rows, left, width) into those of the batch, in place.

    `rows` of the batch and tokens `kept` of them were processed; None means all.
    """
    if kept is None:
        return results if rows is None else hidden.index_copy_(0, rows, results)
    if len(hidden) == 1:
        return hidden.index_copy_(1, kept.index[0], results)
    if rows is None:
        rows = torch.arange(len(hidden), device=hidden.device)
    if not kept.is_ragged:
        hidden[rows[:, None], kept.index] = results
        return hidden
    valid = kept.valid
    hidden[rows[:, None].expand_as(kept.index)[valid], kept.index[valid]] = results[valid]
    return hidden
