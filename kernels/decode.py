"""Attention of one new token per sample against a ragged, head-sparse KV cache.

A decode step reads every surviving key once and computes little, so the GPU must be filled with
loads: the keys of each surviving group are split among programs (split-K), and a second kernel
joins the parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from planner.kernels.launch import launch, target_for
from planner.kernels.prefill import softmax_step, visible_keys
from planner.kernels.records import KVCache, Survivors
from planner.kernels.tiles import AttentionTile, decode_splits, decode_tile, power_of_two

__all__ = ["attend_split_kernel", "decode", "join_splits_kernel"]


@triton.jit(do_not_specialize=["slots", "splits", "position_stride", "window"])
def attend_split_kernel(
    queries,  # [batch, slots * GROUP, HEAD_DIM]
    keys,  # [cache rows, HEAD_DIM]
    values,  # [cache rows, HEAD_DIM]
    positions,  # [batch] int32
    key_positions,  # [batch, >= keys] int32
    counts,  # [plans] int32
    first,  # [batch] int32
    room,  # [batch] int32
    lengths,  # [batch] int32, before this token
    out,  # [batch, slots * GROUP, splits, HEAD_DIM]; float32 where it is partial
    weight,  # [batch, slots * GROUP, splits] float32, or None with a single split
    slots,
    splits,
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
):
    """One split's softmax(scale q k^T) v, and the base-2 logarithm of its softmax sum.

    A program serves one surviving KV group: its GROUP query heads are the rows of a tile, so keys
    and values are read once. Visibility as in `attend_kernel`. Splits of a sample are equal in
    keys, by that sample's own length. bf16, fp16 or fp32; softmax and accumulation in float32.
    Source: Flash-Decoding (Dao et al., 2023), after arXiv 2307.08691.
    """
    split = tl.program_id(0)
    slot = tl.program_id(1)
    sample = tl.program_id(2)
    if slot >= tl.load(counts + sample * plan_stride):
        return
    length = tl.load(lengths + sample) + 1
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, length)
    start_row = tl.load(first + sample).to(tl.int64) + slot * tl.load(room + sample).to(tl.int64)
    keys += start_row * HEAD_DIM
    values += start_row * HEAD_DIM
    key_positions += sample.to(tl.int64) * position_stride

    member = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_D)
    real_lane = lane < HEAD_DIM
    head = (sample * slots + slot).to(tl.int64) * GROUP + member
    mask = (member < GROUP)[:, None] & real_lane[None, :]
    cell = head[:, None] * HEAD_DIM + lane[None, :]
    q = tl.load(queries + cell, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    q_position = tl.full([BLOCK_M], 0, dtype=tl.int32) + tl.load(positions + sample)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    factor = scale * 1.4426950408889634  # exponentials are in base 2
    for n in range(begin, end, BLOCK_N):
        index = n + tl.arange(0, BLOCK_N)
        inside = index < end
        key_cell = index[:, None] * HEAD_DIM + lane[None, :]
        present = inside[:, None] & real_lane[None, :]
        k = tl.load(keys + key_cell, mask=present, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(values + key_cell, mask=present, other=0.0)
        k_position = tl.load(key_positions + index, mask=inside, other=-1)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        seen = visible_keys(q_position, k_position, window, CAUSAL)
        scores = tl.where(seen, scores, float("-inf"))
        accumulator, highest, total = softmax_step(scores, v, accumulator, highest, total)
    empty = total == 0.0
    result = tl.where(empty[:, None], 0.0, accumulator / tl.where(empty, 1.0, total)[:, None])
    cell = (head * splits + split)[:, None] * HEAD_DIM + lane[None, :]
    tl.store(out + cell, result.to(out.dtype.element_ty), mask=mask)
    if weight is not None:
        logarithm = tl.where(empty, float("-inf"), highest + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(weight + head * splits + split, logarithm, mask=member < GROUP)


@triton.jit(do_not_specialize=["slots", "splits"])
def join_splits_kernel(
    partial,  # [batch, slots * GROUP, splits, HEAD_DIM] float32
    weight,  # [batch, slots * GROUP, splits] float32
    counts,  # [plans] int32
    out,  # [batch, slots * GROUP, HEAD_DIM]
    slots,
    splits,
    plan_stride,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out = sum over splits of 2^(weight - max) partial / sum over splits of 2^(weight - max).

    Joins softmax sums over disjoint keys exactly; a head whose splits are all empty gets 0.
    """
    head = tl.program_id(0)
    sample = tl.program_id(1)
    if head >= tl.load(counts + sample * plan_stride) * GROUP:
        return
    row = (sample * slots).to(tl.int64) * GROUP + head
    split = tl.arange(0, BLOCK_S)
    lane = tl.arange(0, BLOCK_D)
    real_split = split < splits
    real_lane = lane < HEAD_DIM
    log = tl.load(weight + row * splits + split, mask=real_split, other=float("-inf"))
    highest = tl.max(log, axis=0)
    share = tl.exp2(log - tl.where(highest == float("-inf"), 0.0, highest))  # [BLOCK_S]
    cell = (row * splits + split)[:, None] * HEAD_DIM + lane[None, :]
    part = tl.load(partial + cell, mask=real_split[:, None] & real_lane[None, :], other=0.0)
    total = tl.sum(share, axis=0)
    result = tl.sum(part * share[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * HEAD_DIM + lane, result.to(out.dtype.element_ty), mask=real_lane)


def decode(
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
    splits: int | None = None,
) -> Tensor:
    """`prefill.attend` for one token per sample. Twin: `naive.attend`.

    Args and result as there, with tokens = 1; `splits` is for tests, by default
    `tiles.decode_splits` chooses from ``key_positions.shape[1]``, the most keys there can be.
    """
    batch, _, heads, head_dim = queries.shape
    slots = survivors.slots
    group = heads // slots
    target = target_for(queries)
    tile = tile or decode_tile(head_dim, target, element_bytes=queries.element_size())
    splits = splits or decode_splits(
        batch * slots, key_positions.shape[1], target, block_n=tile.block_n
    )
    out = queries.new_empty(queries.shape)
    partial, weight = out, None
    if splits > 1:
        partial = queries.new_empty((batch, heads, splits, head_dim), dtype=torch.float32)
        weight = queries.new_empty((batch, heads, splits), dtype=torch.float32)
    common = {
        "counts": survivors.counts,
        "slots": slots,
        "splits": splits,
        "plan_stride": int(survivors.plans > 1),
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "BLOCK_D": max(16, power_of_two(head_dim)),
    }
    launch(
        attend_split_kernel,
        (splits, slots, batch),
        common
        | {
            "queries": queries,
            "keys": cache.keys,
            "values": cache.values,
            "positions": positions,
            "key_positions": key_positions,
            "first": cache.first,
            "room": cache.room,
            "lengths": cache.lengths,
            "out": partial,
            "weight": weight,
            "position_stride": key_positions.stride(0),
            "scale": scale,
            "window": 2**31 - 1 if window is None else window,
            "CAUSAL": causal,
            "BLOCK_M": max(16, power_of_two(group)),
            "BLOCK_N": tile.block_n,
        },
        warps=tile.warps,
        stages=tile.stages,
    )
    if weight is not None:
        launch(
            join_splits_kernel,
            (heads, batch),
            common
            | {"partial": partial, "weight": weight, "out": out, "BLOCK_S": power_of_two(splits)},
        )
    return out
