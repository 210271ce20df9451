"""Attention of many queries per sample over the surviving heads (prefill), online softmax."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from planner.kernels.launch import launch, target_for
from planner.kernels.records import KVCache, Survivors
from planner.kernels.tiles import AttentionTile, attention_tile, power_of_two

__all__ = ["attend", "attend_kernel"]


@triton.jit
def visible_keys(q_position, k_position, window, CAUSAL: tl.constexpr):
    """Which keys each query sees: [queries, keys]. Negative positions are padding."""
    seen = (q_position >= 0)[:, None] & (k_position >= 0)[None, :]
    if CAUSAL:
        ahead = q_position[:, None] - k_position[None, :]
        seen = seen & (ahead >= 0) & (ahead < window)
    return seen


@triton.jit
def softmax_step(scores, values, accumulator, highest, total):
    """Fold one block of scores (base 2, -inf where masked) into running softmax sums.

    Source: Dao, arXiv 2307.08691, algorithm 1; the division by `total` waits until the end.
    """
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    # A row that has seen no key yet has -inf here; 0 keeps the exponentials at 0, not NaN.
    shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(highest - shift)
    total = total * decay + tl.sum(weights, axis=1)
    accumulator = tl.dot(
        weights.to(values.dtype), values, accumulator * decay[:, None], input_precision="ieee"
    )
    return accumulator, new_highest, total


@triton.jit
def key_range(positions, tokens, q_low, q_high, window, CAUSAL: tl.constexpr, SCAN: tl.constexpr):
    """(begin, clear, end): keys outside [begin, end) are seen by no query of the tile, keys in
    [begin, clear) by every one, so only [clear, end) needs masks. `q_low` and `q_high` are the
    lowest and highest position among the tile's queries."""
    begin = tokens
    clear = tokens
    end = 0
    for start in range(0, tokens, SCAN):
        index = start + tl.arange(0, SCAN)
        position = tl.load(positions + index, mask=index < tokens, other=-1)
        some = position >= 0
        every = some
        if CAUSAL:
            some = some & (position <= q_high) & (q_low - position < window)
            every = every & (position <= q_low) & (q_high - position < window)
        begin = tl.minimum(begin, tl.min(tl.where(some, index, tokens)))
        end = tl.maximum(end, tl.max(tl.where(some, index + 1, 0)))
        broken = (index >= begin) & (index < tokens) & (every == 0)
        clear = tl.minimum(clear, tl.min(tl.where(broken, index, tokens)))
    return begin, tl.minimum(clear, end), end


@triton.jit(do_not_specialize=["tokens", "slots", "position_stride", "window"])
def attend_kernel(
    queries,  # [batch, tokens, slots * GROUP, HEAD_DIM]
    keys,  # [cache rows, HEAD_DIM]
    values,  # [cache rows, HEAD_DIM]
    positions,  # [batch, tokens] int32
    key_positions,  # [batch, >= keys] int32
    counts,  # [plans] int32
    first,  # [batch] int32
    room,  # [batch] int32
    lengths,  # [batch] int32, before this call's tokens
    out,  # [batch, tokens, slots * GROUP, HEAD_DIM]
    tokens,
    slots,
    plan_stride,
    position_stride,
    scale,
    window,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
):
    """out = softmax(scale q k^T, over visible keys) v, for the heads of surviving KV groups.

    A key is visible if neither it nor the query is padding (position < 0) and, when CAUSAL, its
    position is at most the query's and less than `window` behind. Positions are the tokens' places
    in the sequence before any were dropped, so kept tokens keep their causality; any order works.
    A query that sees nothing gets 0. bf16, fp16 or fp32; softmax and accumulation in float32.
    Source: FlashAttention-2, arXiv 2307.08691, algorithm 1.
    """
    # Later tiles see more keys; starting them first leaves the short ones to fill the tail.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sample = tl.program_id(2)
    slot = head // GROUP
    if slot >= tl.load(counts + sample * plan_stride):
        return
    length = tl.load(lengths + sample) + tokens
    start_row = tl.load(first + sample).to(tl.int64) + slot * tl.load(room + sample).to(tl.int64)
    keys += start_row * HEAD_DIM
    values += start_row * HEAD_DIM
    key_positions += sample.to(tl.int64) * position_stride

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_D)
    real_lane = lane < HEAD_DIM
    q_position = tl.load(positions + sample * tokens + row, mask=row < tokens, other=-1)
    q_high = tl.max(q_position)
    q_low = tl.min(tl.where(q_position < 0, 2147483647, q_position))
    begin, clear, end = key_range(key_positions, length, q_low, q_high, window, CAUSAL, SCAN)
    if q_high < 0:
        end = begin

    address = ((sample.to(tl.int64) * tokens + row) * (slots * GROUP) + head)[:, None] * HEAD_DIM
    mask = (row < tokens)[:, None] & real_lane[None, :]
    q = tl.load(queries + address + lane[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    factor = scale * 1.4426950408889634  # exponentials are in base 2
    first_masked = begin + tl.maximum(clear - begin, 0) // BLOCK_N * BLOCK_N
    for n in range(begin, first_masked, BLOCK_N):
        index = n + tl.arange(0, BLOCK_N)
        cell = index[:, None] * HEAD_DIM + lane[None, :]
        k = tl.load(keys + cell, mask=real_lane[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        v = tl.load(values + cell, mask=real_lane[None, :], other=0.0)
        accumulator, highest, total = softmax_step(scores, v, accumulator, highest, total)
    for n in range(first_masked, end, BLOCK_N):
        index = n + tl.arange(0, BLOCK_N)
        inside = index < end
        cell = index[:, None] * HEAD_DIM + lane[None, :]
        present = inside[:, None] & real_lane[None, :]
        k = tl.load(keys + cell, mask=present, other=0.0)
        k_position = tl.load(key_positions + index, mask=inside, other=-1)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        seen = visible_keys(q_position, k_position, window, CAUSAL)
        scores = tl.where(seen, scores, float("-inf"))
        v = tl.load(values + cell, mask=present, other=0.0)
        accumulator, highest, total = softmax_step(scores, v, accumulator, highest, total)
    empty = (total == 0.0) | (q_position < 0)
    result = tl.where(empty[:, None], 0.0, accumulator / tl.where(empty, 1.0, total)[:, None])
    tl.store(out + address + lane[None, :], result.to(out.dtype.element_ty), mask=mask)


def attend(
    queries: Tensor,
    cache: KVCache,
    survivors: Survivors,
    positions: Tensor,
    key_positions: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    tile: AttentionTile | None = None,
) -> Tensor:
    """Attention over the cache, the call's own tokens included. Twin: `naive.attend`.

    Args:
        queries: (batch, tokens, slots * group, head_dim).
        cache: with this call's keys and values already written behind `lengths`.
        survivors: surviving KV groups; one plan, or one per sample.
        positions: (batch, tokens) int32, negative for padding.
        key_positions: (batch, keys) int32 of everything in the cache; keys >= lengths + tokens.
        scale: factor on q k^T.
        causal: whether later positions are hidden.
        window: how far back a query sees, itself included; None for all the way. Causal only.
        tile: for tests; by default `tiles.attention_tile` chooses.

    Returns:
        (batch, tokens, slots * group, head_dim); heads beyond a plan's count are undefined.
    """
    batch, tokens, heads, head_dim = queries.shape
    tile = tile or attention_tile(
        tokens, head_dim, target_for(queries), element_bytes=queries.element_size()
    )
    out = queries.new_empty(queries.shape)
    launch(
        attend_kernel,
        (triton.cdiv(tokens, tile.block_m), heads, batch),
        {
            "queries": queries,
            "keys": cache.keys,
            "values": cache.values,
            "positions": positions,
            "key_positions": key_positions,
            "counts": survivors.counts,
            "first": cache.first,
            "room": cache.room,
            "lengths": cache.lengths,
            "out": out,
            "tokens": tokens,
            "slots": survivors.slots,
            "plan_stride": int(survivors.plans > 1),
            "position_stride": key_positions.stride(0),
            "scale": scale,
            "window": 2**31 - 1 if window is None else window,
            "HEAD_DIM": head_dim,
            "GROUP": heads // survivors.slots,
            "CAUSAL": causal,
            "BLOCK_D": max(16, power_of_two(head_dim)),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "SCAN": 512,
        },
        warps=tile.warps,
        stages=tile.stages,
    )
    return out
