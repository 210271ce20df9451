"""KV caches that hold what a plan keeps, and nothing else.

`plan_cache` swaps the layers of a stock `Cache` for those of `planner.models.running.cache_layers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from planner.ir.errors import InputError
from planner.models.running.cache_layers import (
    Cached,
    Part,
    PlannedHybridLayer,
    PlannedLayer,
    StockLayer,
)
from planner.models.running.growing_cache import GrowingLayer
from planner.models.running.program import LayerProgram, Program
from planner.models.tokens.answer_cache import AnswerTally
from planner.models.tokens.selectors import HeavyHitters
from planner.planning.selectors import H2O, AnswerPolicy, KVPolicy

_DYNAMIC = (DynamicLayer, DynamicSlidingWindowLayer)
_STATIC = (StaticLayer, StaticSlidingWindowLayer)
_HYBRID = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
# Where a cache without keys notes under which plan it was filled.
_KEY = "_planner_key"


def plan_cache(
    cache: Cache, program: Program, rows: Sequence[Sequence[Tensor | None]], like: Tensor
) -> list[Cached]:
    """The layers of a stock cache, empty or seen here before, made to obey the program.

    `rows` are those of the batch, for each layer and group; None for all. `like` is of its hidden
    states, shape (batch, ...). Raises InputError where
    the cache was filled under another plan or by the base model, or cannot hold the plan.
    """
    layers: list[Any] = cache.layers
    first = first_keyed(layers)
    # Where no layer has keys, the cache itself has to know.
    key = getattr(cache, _KEY, None) if first is None else first.key
    if key is not None:
        if key != program.key:
            raise InputError(
                "this cache was filled under another plan; a plan is fixed for the life of a "
                "cache, so activate that plan again or start with a new cache"
            )
        return _told_apart(layers, program, like)
    if _is_filled(layers):
        raise InputError(
            "this cache was filled by the base model; start with a new cache to run under a plan"
        )
    if type(cache).__len__ is not Cache.__len__:
        raise InputError(
            f"a {type(cache).__name__} keeps states beside its layers, which no plan can fill: "
            "call the model with use_cache=False"
        )
    count = len(program.layers)
    if cache.layer_class_to_replicate is not None:
        layers.extend(cache.layer_class_to_replicate() for _ in range(count - len(layers)))
    for layer, stock in zip(program.layers, layers, strict=False):
        _check_kind(stock, layer, program)
    for index, (layer, stock) in enumerate(zip(program.layers, layers, strict=False)):
        if type(stock) in (*_DYNAMIC, *_STATIC, *_HYBRID):
            kind = PlannedHybridLayer if isinstance(stock, _HYBRID) else PlannedLayer
            planned = kind(stock, program.key, _parts(layer, stock, rows[index]))
            heads = layer.layer.heads
            # A layer of cross-attention alone, as Mllama's, is called so.
            planned.is_crossed = heads is not None and "cross" in heads.site.module.split(".")[-1]
            layers[index] = planned
    if first_keyed(layers) is None:
        setattr(cache, _KEY, program.key)
    return _told_apart(layers, program, like)


def tokens_seen(layers: Iterable[Cached]) -> int:
    """Tokens that have passed a planned cache."""
    for layer in layers:
        if isinstance(layer, PlannedLayer) or layer.keeps_keys:
            return layer.total
    return 0


def first_keyed(layers: Iterable[Any]) -> PlannedLayer | None:
    """The first layer that has keys, None where there is none."""
    for layer in layers:
        if isinstance(layer, PlannedLayer):
            return layer
    return None


def _told_apart(layers: Sequence[Any], program: Program, like: Tensor) -> list[Cached]:
    """Planned layers as they are, the others told whether they are off.

    Layers that attend to the keys of earlier ones may have no place in the cache.
    """
    found: list[Cached] = []
    for index, layer in enumerate(program.layers):
        stock = layers[index] if index < len(layers) else None
        if not isinstance(stock, PlannedLayer):
            stock = StockLayer(stock, layer, like)
        found.append(stock)
    return found


def _is_filled(layers: Sequence[Any]) -> bool:
    """Whether tokens have passed a stock cache."""
    for layer in layers:
        if isinstance(layer, CacheLayerMixin):
            return bool(layer.get_seq_length())
    return any(any(getattr(layer, "has_previous_state", {}).values()) for layer in layers)


def redirect_cache(
    layers: Sequence[Cached],
    program: Program,
    rows: Sequence[Sequence[Tensor | None]],
) -> None:
    """Let layers that nothing has passed yet obey another program; the others must do as before."""
    for index, (layer, cached) in enumerate(zip(program.layers, layers, strict=True)):
        if isinstance(cached, StockLayer):
            cached.follow(layer)
            continue
        cached.key = program.key
        if not cached.total:
            cached.parts = _parts(layer, cached.stock, rows[index])


def _parts(
    layer: LayerProgram, stock: CacheLayerMixin, rows: Sequence[Tensor | None]
) -> list[Part]:
    """Empty parts, one per group of a layer."""
    parts = []
    for group, members in zip(layer.groups, rows, strict=True):
        store = None
        if group.on and group.heads != ():
            # Behind a token stage a sliding window counts dropped tokens too: see `_forget`.
            store = GrowingLayer() if group.has_keys else _like(stock)
        parts.append(Part(members, store, keeper=_keeper(group.kv)))
    return parts


def _keeper(policy: KVPolicy | None) -> HeavyHitters | AnswerTally | None:
    if isinstance(policy, AnswerPolicy):
        return AnswerTally(policy)
    return HeavyHitters(policy) if isinstance(policy, H2O) else None


def _like(layer: CacheLayerMixin) -> CacheLayerMixin:
    """Another empty layer; by its constructor, which torch.compile can see through."""
    if type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
        return GrowingLayer()
    if isinstance(layer, DynamicSlidingWindowLayer):
        sliding = DynamicSlidingWindowLayer(layer.sliding_window)
        sliding.record_past = layer.record_past
        return sliding
    if type(layer) is StaticLayer:
        return StaticLayer(layer.max_cache_len)
    return StaticSlidingWindowLayer(layer.max_cache_len, layer.max_cache_len)


def _check_kind(layer: Any, planned: LayerProgram, program: Program) -> None:
    if program.has_tokens and type(layer) in _STATIC:
        raise InputError(
            "a static cache is as long as the whole prompt in every layer, so it cannot hold a "
            "plan that drops tokens; leave cache_implementation at its default"
        )
    if len(planned.groups) > 1 and hasattr(layer, "has_previous_state"):
        raise InputError(
            f"layer {planned.layer.index} keeps one state for all samples of a batch, so all "
            f"of them must run it alike; give one plan, or a batch of one"
        )
    if not isinstance(layer, CacheLayerMixin):
        return
    if program.evicts and type(layer) is not DynamicLayer:
        raise InputError(
            f"nothing can be evicted from a cache of {type(layer).__name__}; leave "
            f"cache_implementation at its default"
        )
    is_known = type(layer) in (*_DYNAMIC, *_STATIC, *_HYBRID)
    if not is_known and (program.has_tokens or len(planned.groups) > 1):
        raise InputError(
            f"a cache of {type(layer).__name__} holds the same tokens in every layer, of all "
            f"samples alike; give one plan without token stages"
        )


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a stock ``forward`` calls its KV cache: since transformers 5.24 `cache`."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def cache_among(kwargs: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the arguments of a stock ``forward``, whatever it is called there.

    Where there are two, that of the decoder's own tokens: what a layer attends to besides is whole.
    """
    found = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
    return found.self_attention_cache if isinstance(found, EncoderDecoderCache) else found


def check_encoded(kwargs: Mapping[str, Any], program: Program) -> None:
    """Raise InputError where layers that run by group share the keys of what was encoded."""
    if any(isinstance(value, EncoderDecoderCache) for value in kwargs.values()):
        for layer in program.layers:
            if len(layer.groups) > 1:
                raise InputError(
                    f"layer {layer.layer.index} keeps what was encoded for all samples of a batch, "
                    f"so all of them must run it alike; give one plan, or a batch of one"
                )


def answers_stored(cache: Cache | None) -> list[int] | None:
    """How many tokens of each sample's answer a cache stores behind a policy's first layer.

    None where no policy decides about them.
    """
    layers = [] if cache is None else cache.layers
    parts = (p for layer in layers if isinstance(layer, PlannedLayer) for p in layer.parts)
    keepers = (part.keeper for part in parts)
    tallies = (keeper for keeper in keepers if isinstance(keeper, AnswerTally))
    return next((tally.stored.tolist() for tally in tallies if tally.stored is not None), None)


def kv_bytes(cache: Cache | None) -> int:
    """Bytes of all keys and values that a cache really holds, planned or stock; 0 without one."""
    stores: list[Any] = []
    for layer in [] if cache is None else cache.layers:
        stores += [p.store for p in layer.parts] if isinstance(layer, PlannedLayer) else [layer]
    tensors = [
        tensor
        for store in stores
        for tensor in (getattr(store, "keys", None), getattr(store, "values", None))
        if tensor is not None
    ]
    return sum(tensor.nbytes for tensor in tensors)
