"""One layer of a KV cache that holds what a plan keeps, in the place of a stock one.

A plan changes what a layer of a stock transformers cache may hold: one that is off stores nothing,
one behind a token stage stores fewer tokens, and in a batch of several plans the samples store
different heads. Layers here do that, and still tell the stock code the lengths it reckons with: all
tokens seen, dropped or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticSlidingWindowLayer,
)

from planner.ir.errors import InputError
from planner.models.running.attention_calls import Recorded
from planner.models.running.program import LayerProgram
from planner.models.tokens.answer_cache import (
    AnswerTally,
    forget_before,
    forget_last,
    forget_places,
)
from planner.models.tokens.kept_tokens import Keys, select_rows
from planner.models.tokens.selectors import HeavyHitters
from planner.models.tokens.selectors.h2o import attention_received
from planner.models.tokens.selectors.scoring import visible_keys

if TYPE_CHECKING:
    from planner.models.running.forward_pass import Call

PlanKey = tuple[object, ...]


@dataclass
class Part:
    """Keys and values of the samples of one group."""

    rows: Tensor | None  # of the batch, ascending, shape (rows,); None for all
    store: CacheLayerMixin | None  # the stock layer that holds them; None where the layer is off
    # Which tokens are stored; None while nothing was dropped. Where heads hold different tokens it
    # shows those of the first one: as many, and all of them earlier than any query.
    keys: Keys | None = None
    keeper: HeavyHitters | AnswerTally | None = None  # what is left out of the store
    # How far the position ids of new tokens lie before those that stock code gives, shape (rows,);
    # None while they are the same.
    shift: Tensor | None = None


class PlannedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a cache filled under a plan, in the place of an empty stock layer.

    It has a part for each group, and the program's key: a plan is fixed for the life of a cache.
    """

    def __init__(self, stock: CacheLayerMixin, key: PlanKey, parts: Sequence[Part]) -> None:
        # `keys` and `values` are properties here, so the stock constructor has nothing to set.
        self.stock = stock
        self.key = key
        self.parts = list(parts)
        self.is_crossed = False  # whether what is stored is of an image, not of these tokens
        self.total = 0  # tokens that have passed, stored or not
        self.ends_in_image = False  # whether the last token of some sample's last prompt was
        self.is_sliding = stock.is_sliding
        self.is_compileable = stock.is_compileable
        self._writing: Part | None = None
        self._is_recording = bool(getattr(stock, "record_past", False))

    def begin(self, group: int) -> None:
        """Direct the next `update` to a group."""
        self._writing = self.parts[group]

    def advance(self, tokens: int) -> None:
        """Count tokens that have passed the layer, kept or not, for all groups."""
        self.total += tokens
        # The stock layer is never filled, but asked for the sizes of masks.
        if isinstance(self.stock, DynamicSlidingWindowLayer):
            self.stock.cumulative_length = self.total
        elif isinstance(self.stock, StaticSlidingWindowLayer):
            self.stock.cumulative_length_int = self.total
        if not self.record_past:
            self._forget()

    @property
    def record_past(self) -> bool:
        """Whether tokens that a window has passed stay until the next `crop`."""
        return self._is_recording

    @record_past.setter
    def record_past(self, recording: bool) -> None:
        self._is_recording = recording
        for layer in (self.stock, *(part.store for part in self.parts)):
            if hasattr(layer, "record_past"):
                layer.record_past = recording

    def activate_past_recording(self) -> None:
        """Set `record_past`."""
        self.record_past = True

    def remember(self, group: int, positions: Tensor, padded: bool) -> Keys:
        """Note where the tokens about to be stored stood; return all that will be stored.

        Call before `advance`. `positions` has shape (rows, tokens), -1 for padding.
        """
        self._forget()
        part = self.parts[group]
        if part.keys is None:
            stored = torch.arange(self.total, device=positions.device)
            part.keys = Keys(stored.expand(len(positions), -1), False)
        padded |= part.keys.padded
        part.keys = Keys(torch.cat([part.keys.positions, positions], 1), padded)
        return part.keys

    def shift(self, group: int, more: Tensor | None = None) -> Tensor | None:
        """See `Part.shift`, as it is before `more` are added, shape (rows,)."""
        part = self.parts[group]
        before = part.shift
        if more is not None:
            part.shift = more if before is None else before + more
        return before

    def _forget(self) -> None:
        """Free tokens behind a token stage that no later one can see: the window has passed them.

        Rows lose unlike numbers of them where the stage left them unlike ones.
        """
        window = getattr(self.stock, "sliding_window", None)
        if window is None:
            return
        first = self.total - window + 1
        for part in self.parts:
            if part.store is None or part.keys is None or not part.store.is_initialized:
                continue
            seen = part.keys.positions >= max(first, 0)
            if int(seen.sum(1).max()) < seen.shape[1]:
                places = part.keys.positions.new_full((len(seen),), first)
                part.keys = forget_before(part.store, part.keys, places)

    def evict(self, layer: int, group: int, seen: Recorded | None, call: Call) -> None:
        """Keep of a group's store what its policy keeps, after its attention block has run.

        Args:
            layer: that this is, for errors.
            group: of the layer, with a policy.
            seen: what the block computed with, where the policy asks for it.
        """
        part = self.parts[group]
        if part.store is None or part.keys is None:
            return
        if isinstance(part.keeper, AnswerTally):
            if call.stored is not None:
                mine = select_rows(call.stored, part.rows, 0)
                part.keys = forget_last(part.store, part.keys, mine)
                gone = part.keeper.outdated(self.total)
                if len(gone):
                    part.keys = forget_places(part.store, part.keys, gone)
            return
        if part.keeper is None and call.summed_up is not None:
            first = select_rows(call.summed_up.first, part.rows, 0)
            part.keys = forget_before(part.store, part.keys, first)
        if part.keeper is None:
            return
        if seen is None:
            raise InputError(
                f"the cache of layer {layer} evicts by attention, and this model's attention "
                f"cannot be seen from outside; plan without a KV policy"
            )
        valid = _visible(seen, part.keys)
        mask = None if seen.mask is None or seen.mask.ndim == 2 else seen.mask
        received = attention_received(seen.query, seen.key, valid, mask, seen.rule)
        index, left = part.keeper.observe(received, valid)
        places = index[..., None]
        part.store.keys = part.store.keys.take_along_dim(places, -2)
        part.store.values = part.store.values.take_along_dim(places, -2)
        positions = part.keys.positions.gather(1, index[:, 0]).masked_fill(~left, -1)
        part.keys = Keys(positions, not bool(left.all()))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values, shape (rows, kv heads, tokens, head_dim); return all stored."""
        part, self._writing = self._writing, None
        if part is None or part.store is None:
            raise InputError(
                "this cache was filled under a plan that is not active now; a plan is fixed for "
                "the life of a cache, so activate that plan again or start with a new cache"
            )
        stored: tuple[Tensor, Tensor] = part.store.update(key_states, value_states, *args, **kwargs)
        return stored

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do ahead: each part starts with its first `update`."""

    @property
    def is_initialized(self) -> bool:
        """Whether anything is stored, or need not be, in cross-attention."""
        return bool(self._stores()) or self._is_passed

    @property
    def _is_passed(self) -> bool:
        """Whether tokens have passed cross-attention of which no part stores anything."""
        nothing = all(part.store is None for part in self.parts)
        return self.is_crossed and nothing and self.total > 0

    def _tensors(self, name: str) -> Tensor | None:
        # Cross-attention reads keys of the image in every pass, and stores some in the first alone.
        writing = None if self._writing is None else self._writing.store
        for store in (writing, *self._stores()):
            if store is not None and store.is_initialized:
                tensor: Tensor = getattr(store, name)
                return tensor
        # Stock code leaves out cross-attention layers without keys, MLP and all.
        return torch.zeros(1) if self._is_passed else None

    @property
    def keys(self) -> Tensor | None:
        """Stored keys of the group that runs, or of any; one number where cross-attention stores
        nothing, else None."""
        return self._tensors("keys")

    @property
    def values(self) -> Tensor | None:
        """Stored values, as `keys`."""
        return self._tensors("values")

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: what positions are counted by."""
        return self.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the masks that stock code builds, as if nothing were dropped."""
        # Also where there is a state beside the keys.
        if isinstance(self.stock, DynamicLayer) and not self.is_sliding:
            return self.total + query_length, 0
        sizes: tuple[int, int] = self.stock.get_mask_sizes(query_length)
        return sizes

    def get_max_length(self) -> int:
        """As the stock layer."""
        return int(self.stock.get_max_length())

    def _stores(self) -> list[CacheLayerMixin]:
        return [p.store for p in self.parts if p.store is not None and p.store.is_initialized]

    def offload(self) -> None:
        """Move to the CPU."""
        for store in self._stores():
            store.offload()

    def prefetch(self) -> None:
        """Move back to the device."""
        for store in self._stores():
            store.prefetch()

    def reset(self) -> None:
        """Forget all tokens."""
        for part in self.parts:
            part.keys = part.shift = None
            if part.keeper is not None:
                part.keeper = part.keeper.fresh()
            if part.store is not None:
                part.store.reset()
        self.total = 0
        self.advance(0)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back tokens behind a prompt; asked since transformers 5.24."""
        stores = [part.store for part in self.parts if part.store is not None]
        evicts = any(part.keeper is not None for part in self.parts)
        return not evicts and all(getattr(store, "is_croppable", True) for store in stores)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, none of which may have been dropped."""
        count = abs(tokens_to_remove)
        if not count and not self.record_past:
            return
        window = getattr(self.stock, "sliding_window", None)
        if window is not None and self.total >= window and not self.record_past:
            raise InputError(
                "the cache cannot be cropped: tokens that its sliding window has passed are gone; "
                "call activate_past_recording before the tokens that may be taken back"
            )
        for part in self.parts:
            if part.keeper is not None:
                raise InputError("a cache that evicts cannot be cropped: what it evicted is gone")
            if part.keys is not None:
                positions = part.keys.positions
                last = torch.arange(self.total - count, self.total, device=positions.device)
                newest = positions[:, positions.shape[1] - count :]
                if not torch.equal(newest, last.expand(len(positions), -1)):
                    raise InputError(
                        "the cache cannot be cropped into a prompt whose tokens were dropped"
                    )
                part.keys = Keys(positions[:, : positions.shape[1] - count], part.keys.padded)
            if part.store is not None:
                part.store.crop(-count)
        self.total -= count
        self.advance(0)
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r continues row ``beam_idx[r]``; a beam stays within its sample, hence its group."""
        for part in self.parts:
            rows = part.rows
            _take(part, beam_idx if rows is None else torch.searchsorted(rows, beam_idx[rows]))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes `repeats` rows."""
        for part in self.parts:
            if part.store is not None:
                part.store.batch_repeat_interleave(repeats)
            if part.keys is not None:
                positions = part.keys.positions.repeat_interleave(repeats, 0)
                part.keys = Keys(positions, part.keys.padded)
            if part.shift is not None:
                part.shift = part.shift.repeat_interleave(repeats, 0)
            if part.keeper is not None:
                part.keeper.repeat(repeats)
            if part.rows is not None:
                copies = torch.arange(repeats, device=part.rows.device)
                part.rows = (part.rows[:, None] * repeats + copies).flatten()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in the given order."""
        for part in self.parts:
            if part.rows is None:
                _take(part, indices)
            else:
                mine = torch.isin(indices, part.rows)
                _take(part, torch.searchsorted(part.rows, indices[mine]))
                part.rows = mine.nonzero().flatten()


class PlannedHybridLayer(PlannedLayer, LinearAttentionLayer):  # type: ignore[misc]
    """A layer that keeps a state beside its keys (Bamba, Falcon-H1); the state is kept as in stock.

    All samples share a state, so a layer of several groups cannot have one.
    """

    def __init__(self, stock: Any, key: PlanKey, parts: Sequence[Part]) -> None:
        PlannedLayer.__init__(self, stock, key, parts)
        LinearAttentionLayer.__init__(self, stock.number_of_states)

    def advance(self, tokens: int) -> None:
        """Count tokens; where the layer is off nothing else would note that a prompt was read."""
        super().advance(tokens)
        if all(part.store is None for part in self.parts):
            states: Any = self
            states.has_previous_state.update(dict.fromkeys(self.conv_states, self.total > 0))

    def lazy_initialization(self, *args: Tensor, **kwargs: Any) -> None:
        """States begin with the first of their own; keys as in every planned layer."""
        if not args:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def offload(self) -> None:
        """Move keys and state to the CPU."""
        PlannedLayer.offload(self)
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        """Move them back to the device."""
        PlannedLayer.prefetch(self)
        LinearAttentionLayer.prefetch(self)

    def reset(self) -> None:
        """Forget all tokens."""
        LinearAttentionLayer.reset(self)
        PlannedLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r continues row ``beam_idx[r]``."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        PlannedLayer.reorder_cache(self, beam_idx)

    @property
    def is_croppable(self) -> bool:
        """Never: a state cannot go back."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused."""
        raise InputError("a cache that keeps states cannot be cropped")


class StockLayer:
    """A layer that stays in its cache as it is, and what a plan notes about it.

    It keeps no keys but a state (linear attention, a convolution), or nothing at all; or it is of a
    class that is not known here (DeepSeek's sparse attention), which all samples run alike. What it
    keeps of the heads that are on does not depend on a plan otherwise.
    """

    def __init__(self, stock: Any, layer: LayerProgram, like: Tensor) -> None:
        self.stock = stock
        self.keeps_keys = isinstance(stock, CacheLayerMixin)
        self.like = like  # hidden states of the pass
        self.follow(layer)

    def follow(self, layer: LayerProgram) -> None:
        """Obey a program from here on."""
        on = [group for group in layer.groups if group.on]
        self.is_off = not any(group.heads != () for group in on) if self.keeps_keys else not on

    @property
    def total(self) -> int:
        """Tokens that have passed."""
        return int(self.stock.get_seq_length()) if self.keeps_keys else 0

    def begin(self, group: int) -> None:
        """Nothing is directed: all rows share a state."""

    def advance(self, tokens: int) -> None:
        """Tokens have passed: where the layer is off nothing else would note that.

        Stock code asks one layer for all whether a prompt was read already, and how long it was.
        """
        if not self.is_off:
            return
        if self.keeps_keys:
            # Stock layers measure what they hold: a number for each token.
            counted = self.like.new_zeros(len(self.like), 1, tokens, 1)
            self.stock.update(counted, counted)
            return
        states = getattr(self.stock, "has_previous_state", None)
        if states is not None:
            states.update(dict.fromkeys(states, True))

    def remember(self, group: int, positions: Tensor, padded: bool) -> Keys:
        """Tokens of this pass alone: no others are stored."""
        return Keys(positions, padded)

    def shift(self, group: int, more: Tensor | None = None) -> Tensor | None:
        """None: no tokens but those of this pass are known."""
        return None


Cached = PlannedLayer | StockLayer


def _take(part: Part, rows: Tensor) -> None:
    """Keep some rows of a part, numbered within it."""
    if part.store is not None and part.store.is_initialized:
        part.store.reorder_cache(rows)
    if part.keys is not None:
        part.keys = Keys(part.keys.positions[rows], part.keys.padded)
    if part.shift is not None:
        part.shift = part.shift[rows]
    if part.keeper is not None:
        part.keeper.reorder(rows)


def _visible(seen: Recorded, keys: Keys) -> Tensor:
    """Which keys are no padding: those that some query sees; shape (rows, keys), bool."""
    valid = keys.positions >= 0
    if seen.mask is None:
        return valid
    if seen.mask.ndim == 2:
        return valid & seen.mask.bool()
    queries = seen.query.shape[2]
    rows = torch.arange(queries, device=valid.device).expand(len(valid), -1)
    return visible_keys(rows, valid, seen.mask, queries).any(1)
