"""KV caches of running answers joined into one, and taken apart, as answers come and go.

Answers of one batch end at the same token, so shorter ones begin later: behind padding, which no
query sees. Every answer keeps its own plan, and a layer holds of each what its plan keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from planner.models.running.growing_cache import GrowingLayer
from planner.models.running.kv_cache import Part, PlannedLayer, plan_cache
from planner.models.running.program import Program
from planner.models.tokens.kept_tokens import Keys


@dataclass(frozen=True, eq=False)
class CachedAnswer:
    """Where the keys and values of one answer are: a row of a cache, alone or with others'.

    Attributes:
        cache: filled by a stock model or under a plan without a KV policy.
        row: of its batch.
        length: tokens that have passed, without padding.
    """

    cache: Cache
    row: int
    length: int


@dataclass(frozen=True, eq=False)
class _Stored:
    """What a layer holds of one answer."""

    keys: Tensor  # (kv heads, tokens, head_dim)
    values: Tensor
    places: Tensor  # (tokens,): of those stored, among all that have passed


def can_be_joined(model: Any) -> bool:
    """Whether a model's caches can be joined: keys of all tokens, and places that can be given.

    Models that count places by themselves, in more than one dimension, keep them for one batch.
    """
    layers = DynamicCache(config=model.config).layers
    own = any(hasattr(module, "rope_deltas") for module in model.modules())
    return not own and all(type(layer) is DynamicLayer for layer in layers)


def join(answers: Sequence[CachedAnswer], program: Program) -> DynamicCache:
    """One cache of several answers, the i-th of them in row i.

    Args:
        answers: at least one; nothing of theirs is changed.
        program: of their plans, in this order.
    """
    total = max(answer.length for answer in answers)
    cache = DynamicCache()
    if program.is_dense:
        for index in range(len(program.layers)):
            layer = GrowingLayer()
            stored = [_stored(answer, index) for answer in answers]
            layer.update(*_padded([one for one in stored if one is not None], total))
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
    for index, planned in enumerate(plan_cache(cache, program, rows)):
        assert isinstance(planned, PlannedLayer)
        for group, part in zip(program.layers[index].groups, planned.parts, strict=True):
            members = range(len(answers)) if part.rows is None else group.samples
            if part.store is not None:
                _fill(part, [answers[row] for row in members], index, total, group.has_keys)
        planned.advance(total)
    return cache


def _fill(
    part: Part, answers: Sequence[CachedAnswer], layer: int, total: int, has_keys: bool
) -> None:
    """Give a part what a layer holds of its answers."""
    assert part.store is not None
    stored = [one for answer in answers if (one := _stored(answer, layer)) is not None]
    longest = max(len(one.places) for one in stored) if has_keys else total
    part.store.update(*_padded(stored, longest))
    if has_keys:
        # Among all tokens of the batch, an answer's stand behind its padding.
        places = [
            pad(one.places + total - answer.length, (longest - len(one.places), 0), value=-1)
            for one, answer in zip(stored, answers, strict=True)
        ]
        positions = torch.stack(places)
        part.keys = Keys(positions, bool((positions < 0).any()))


def _padded(stored: Sequence[_Stored], longest: int) -> tuple[Tensor, Tensor]:
    """Keys and values of several answers, shape (answers, kv heads, longest, head_dim)."""

    def stacked(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([pad(t, (0, 0, longest - t.shape[-2], 0)) for t in tensors])

    return stacked(one.keys for one in stored), stacked(one.values for one in stored)


def _stored(answer: CachedAnswer, layer: int) -> _Stored | None:
    """What a layer holds of an answer; None where its plan leaves the layer out."""
    cached = answer.cache.layers[layer]
    store, row, places = cached, answer.row, None
    if isinstance(cached, PlannedLayer):
        part = next(p for p in cached.parts if p.rows is None or bool((p.rows == row).any()))
        if part.store is None:
            return None
        store = part.store
        row = row if part.rows is None else int(torch.searchsorted(part.rows, row))
        places = None if part.keys is None else part.keys.positions[row]
    total = cached.get_seq_length()
    keys, values = store.keys[row], store.values[row]
    if places is None:
        places = torch.arange(total, device=keys.device)
    places = places - (total - answer.length)
    real = places >= 0
    return _Stored(keys[:, real], values[:, real], places[real])


def _device(cache: Cache) -> torch.device:
    """Of the first keys there are."""
    keys: Tensor = next(layer.keys for layer in cache.layers if layer.keys is not None)
    return keys.device
