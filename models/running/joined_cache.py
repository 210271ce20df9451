"""KV caches of running answers joined into one, and taken apart, as answers come and go.

Answers of one batch end at the same token, so shorter ones begin later: behind padding, which no
query sees. Every answer keeps its own plan, and a layer holds of each what its plan keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from planner.models.running.cache_layers import PlannedLayer
from planner.models.running.growing_cache import GrowingLayer
from planner.models.running.kv_cache import plan_cache
from planner.models.running.program import Program
from planner.models.tokens.kept_tokens import Keys


@dataclass(frozen=True, eq=False)
class CachedAnswer:
    """Where the keys and values of one answer are: a row of a cache, alone or with others'."""

    cache: Cache  # filled by a stock model or under a plan without a KV policy
    row: int  # of its batch
    length: int  # tokens that have passed, without padding


@dataclass(frozen=True, eq=False)
class _Stored:
    """What a layer holds of some answers; what stands in front of an answer's own is padding."""

    keys: Tensor  # (answers, kv heads, tokens, head_dim)
    values: Tensor
    places: Tensor | None  # (answers, tokens): as in `Keys`; None where nothing was dropped
    shift: Tensor | None = None  # (answers,): as in `Part`


def can_be_joined(model: Any) -> bool:
    """Whether a model's caches can be joined: keys of all tokens, and places that can be given.

    Models that count places by themselves, in more than one dimension, keep them for one batch.
    """
    layers = DynamicCache(config=model.config).layers
    own = any(hasattr(module, "rope_deltas") for module in model.modules())
    return not own and all(type(layer) is DynamicLayer for layer in layers)


def join(answers: Sequence[CachedAnswer], program: Program) -> DynamicCache:
    """One cache of several answers, the i-th of them in row i.

    `answers`: at least one; nothing of theirs is changed. `program`: of their plans, in this order.
    """
    total = max(answer.length for answer in answers)
    cache = DynamicCache()
    if program.is_dense:
        for index in range(len(program.layers)):
            layer = GrowingLayer()
            stored = _stored(answers, index, total, has_keys=False)
            layer.update(stored.keys, stored.values)
            cache.layers.append(layer)
        return cache
    device = _device(answers[0].cache)
    rows = [
        [
            None if len(layer.groups) == 1 else torch.tensor(group.samples, device=device)
            for group in layer.groups
        ]
        for layer in program.layers
    ]
    like = torch.empty(len(answers), device=device)
    for index, planned in enumerate(plan_cache(cache, program, rows, like)):
        assert isinstance(planned, PlannedLayer)
        for group, part in zip(program.layers[index].groups, planned.parts, strict=True):
            if part.store is None:
                continue
            members = range(len(answers)) if part.rows is None else group.samples
            chosen = [answers[row] for row in members]
            stored = _stored(chosen, index, total, group.has_keys)
            part.store.update(stored.keys, stored.values)
            if stored.places is not None:
                part.keys = Keys(stored.places, bool((stored.places < 0).any()))
            part.shift = stored.shift
        planned.advance(total)
    return cache


def _stored(answers: Sequence[CachedAnswer], layer: int, total: int, has_keys: bool) -> _Stored:
    """What a layer holds of answers for which it does the same."""
    by_cache: dict[int, list[int]] = {}
    for number, answer in enumerate(answers):
        by_cache.setdefault(id(answer.cache), []).append(number)
    pieces = [
        _taken([answers[number] for number in numbers], layer, total, has_keys)
        for numbers in by_cache.values()
    ]
    longest = max(piece.keys.shape[-2] for piece in pieces)
    order = [number for numbers in by_cache.values() for number in numbers]
    back = torch.tensor(order, device=pieces[0].keys.device).argsort()

    def joined(tensors: Sequence[Tensor], value: int = 0) -> Tensor:
        # Padding goes in front of the tokens: those of keys are the last dimension but one.
        after = (0, 0) if tensors[0].ndim == 4 else ()
        token_axis = -2 if after else -1
        padded = [
            pad(tensor, (*after, longest - tensor.shape[token_axis], 0), value=value)
            for tensor in tensors
        ]
        return torch.cat(padded)[back]

    places = [piece.places for piece in pieces if piece.places is not None]
    shift = None
    if any(piece.shift is not None for piece in pieces):
        none = back.new_zeros
        parts = [none(len(p.keys)) if p.shift is None else p.shift for p in pieces]
        shift = torch.cat(parts)[back]
    return _Stored(
        joined([piece.keys for piece in pieces]),
        joined([piece.values for piece in pieces]),
        joined(places, -1) if has_keys else None,
        shift,
    )


def _taken(answers: Sequence[CachedAnswer], layer: int, total: int, has_keys: bool) -> _Stored:
    """What a layer of one cache holds of some answers, for a batch of so many tokens."""
    cached = answers[0].cache.layers[layer]
    numbers = [answer.row for answer in answers]
    store, known, shift = cached, None, None
    rows = torch.tensor(numbers, device=_device(answers[0].cache))
    if isinstance(cached, PlannedLayer):
        part = next(p for p in cached.parts if p.rows is None or numbers[0] in p.rows.tolist())
        store, known = part.store, part.keys
        rows = rows if part.rows is None else torch.searchsorted(part.rows, rows)
        shift = None if part.shift is None else part.shift[rows]
    keys, values = store.keys[rows], store.values[rows]
    seen = cached.get_seq_length()
    if not has_keys:
        # The longest answer has left: what goes was its own, or padding.
        gone = max(0, seen - total)
        keys, values = keys[..., gone:, :], values[..., gone:, :]
        short = (0, 0, max(0, total - seen), 0)
        return _Stored(pad(keys, short), pad(values, short), None)
    if known is None:
        begins = torch.tensor([[seen - answer.length] for answer in answers], device=keys.device)
        places = torch.arange(seen, device=keys.device).expand(len(answers), -1)
        places = places.masked_fill(places < begins, -1)
    else:
        places = known.positions[rows]
    # Padding that all of them share goes.
    gone = int((places >= 0).any(0).long().argmax())
    places = places[:, gone:]
    places = (places + total - seen).masked_fill(places < 0, -1)
    return _Stored(keys[..., gone:, :], values[..., gone:, :], places, shift)


def _device(cache: Cache) -> torch.device:
    """Of the first keys there are."""
    keys: Tensor = next(layer.keys for layer in cache.layers if layer.keys is not None)
    return keys.device
