"""Token selection: score image tokens by one row of attention, choose, gather or merge.

Source: FastV (Chen et al., arXiv 2403.06764), section 4.1: tokens are ranked by the attention that
the last query pays them, averaged over heads. That needs one row of the attention matrix, which is
computed here from the last query and the cached keys, whatever kernel computed the layer itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from planner.kernels.launch import launch
from planner.kernels.records import KVCache, Survivors
from planner.kernels.tiles import power_of_two

__all__ = [
    "choose_kernel",
    "choose_tokens",
    "gather_kernel",
    "gather_tokens",
    "merge_kernel",
    "merge_tokens",
    "score_kernel",
    "score_tokens",
]


@triton.jit(do_not_specialize=["tokens", "slots"])
def score_kernel(
    queries,  # [batch, slots * GROUP, HEAD_DIM]
    keys,  # [cache rows, HEAD_DIM]
    positions,  # [batch, tokens] int32, negative for padding
    counts,  # [plans] int32
    first,  # [batch] int32
    room,  # [batch] int32
    scores,  # [batch, slots, tokens] float32
    tokens,
    slots,
    plan_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """scores[slot, t] = sum over the group's heads of softmax_t(scale q k_t), padding excluded.

    Two passes over the keys: softmax sums, then probabilities. All of a sample's tokens are seen
    by its last query. bf16, fp16 or fp32 in, float32 inside and out.
    """
    slot = tl.program_id(0)
    sample = tl.program_id(1)
    if slot >= tl.load(counts + sample * plan_stride):
        return
    start_row = tl.load(first + sample).to(tl.int64) + slot * tl.load(room + sample).to(tl.int64)
    keys += start_row * HEAD_DIM
    positions += sample.to(tl.int64) * tokens
    member = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_D)
    real_lane = lane < HEAD_DIM
    real_member = member < GROUP
    head = (sample * slots + slot).to(tl.int64) * GROUP + member
    mask = real_member[:, None] & real_lane[None, :]
    q = tl.load(queries + head[:, None] * HEAD_DIM + lane[None, :], mask=mask, other=0.0)
    factor = scale * 1.4426950408889634  # exponentials are in base 2
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for n in range(0, tokens, BLOCK_N):
        index = n + tl.arange(0, BLOCK_N)
        present = tl.load(positions + index, mask=index < tokens, other=-1) >= 0
        key_cell = index[:, None] * HEAD_DIM + lane[None, :]
        k = tl.load(keys + key_cell, mask=present[:, None] & real_lane[None, :], other=0.0)
        row = tl.dot(q, tl.trans(k), input_precision="ieee") * factor  # [BLOCK_M, BLOCK_N]
        row = tl.where(present[None, :], row, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(row, axis=1))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        total = total * tl.exp2(highest - shift) + tl.sum(tl.exp2(row - shift[:, None]), axis=1)
        highest = new_highest
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    inverse = tl.where(real_member & (total > 0.0), 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
    for n in range(0, tokens, BLOCK_N):
        index = n + tl.arange(0, BLOCK_N)
        present = tl.load(positions + index, mask=index < tokens, other=-1) >= 0
        key_cell = index[:, None] * HEAD_DIM + lane[None, :]
        k = tl.load(keys + key_cell, mask=present[:, None] & real_lane[None, :], other=0.0)
        row = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        share = tl.exp2(row - shift[:, None]) * inverse[:, None]
        share = tl.where(present, tl.sum(share, axis=0), 0.0)
        out = (sample * slots + slot).to(tl.int64) * tokens + index
        tl.store(scores + out, share, mask=index < tokens)


@triton.jit
def order_of(score):
    """Integers in the order of float32 scores (negative floats count downwards in their bits)."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=["tokens", "slots", "length"])
def choose_kernel(
    scores,  # [batch, slots, tokens] float32
    counts,  # [plans] int32: rows of scores to add, or None for all
    candidates,  # [batch, tokens] int8: tokens that compete
    positions,  # [batch, tokens] int32, negative for padding
    keep,  # [batch] int32: candidates kept
    index,  # [batch, length] int32
    tokens,
    slots,
    length,
    plan_stride,
    BLOCK_T: tl.constexpr,
):
    """index = tokens kept, ascending, aligned to the right; -1 in front of them.

    Kept are all tokens that are no candidates and no padding, and the `keep` best candidates; of
    equal scores the earlier token wins. The threshold is found bit by bit from the top, so the
    choice is exact and takes 32 passes over registers. One program per sample.
    """
    sample = tl.program_id(0)
    token = tl.arange(0, BLOCK_T)
    real = token < tokens
    rows = slots
    if counts is not None:
        rows = tl.load(counts + sample * plan_stride)
    score = tl.zeros([BLOCK_T], dtype=tl.float32)
    for slot in range(rows):
        cell = (sample * slots + slot).to(tl.int64) * tokens + token
        score += tl.load(scores + cell, mask=real, other=0.0)
    position = tl.load(positions + sample * tokens + token, mask=real, other=-1)
    competes = tl.load(candidates + sample * tokens + token, mask=real, other=0) != 0
    competes = competes & (position >= 0)
    wanted = tl.load(keep + sample)
    order = order_of(score)
    # The largest threshold that at least `wanted` candidates reach. The sign bit comes first.
    reached = tl.sum((competes & (order >= 0)).to(tl.int32), axis=0) >= wanted
    threshold = tl.where(reached, 0, -2147483648)
    for bit in range(31):
        higher = threshold + (1 << (30 - bit))
        reached = tl.sum((competes & (order >= higher)).to(tl.int32), axis=0) >= wanted
        threshold = tl.where(reached, higher, threshold)
    above = competes & (order > threshold)
    level = competes & (order == threshold)
    free = wanted - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | (level & (tl.cumsum(level.to(tl.int32), axis=0) <= free))
    kept = (chosen | (competes == 0)) & (position >= 0)
    total = tl.sum(kept.to(tl.int32), axis=0)
    place = length - total + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    index += sample.to(tl.int64) * length
    tl.store(index + place, token, mask=kept & (place >= 0))
    tl.store(index + token, tl.full([BLOCK_T], -1, dtype=tl.int32), mask=token < length - total)


@triton.jit(do_not_specialize=["tokens", "length"])
def gather_kernel(
    x,  # [batch, tokens, width]
    index,  # [batch, length] int32
    out,  # [batch, length, width]
    tokens,
    length,
    width,
    BLOCK: tl.constexpr,
):
    """out[t] = x[index[t]], exactly; rows whose index is negative become 0."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // length
    source = tl.load(index + row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = (sample * tokens + source) * width
    value = tl.load(x + start + column, mask=column < tl.where(source < 0, 0, width), other=0.0)
    tl.store(out + row * width + column, value, mask=column < width)


@triton.jit(do_not_specialize=["tokens", "length"])
def merge_kernel(
    x,  # [batch, tokens, width]
    target,  # [batch, tokens] int32, negative for none
    weight,  # [batch, tokens] float32, not negative
    out,  # [batch, length, width]
    tokens,
    length,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[t] = sum over j with target[j] = t of weight[j] x[j] / sum of those weights.

    A one-hot product, so it needs no atomics and gives the same bits every time; tokens nobody
    targets become 0. bf16, fp16 or fp32, weights and accumulation in float32.
    Source: ToMe (Bolya et al., arXiv 2210.09461), section 3, size-weighted average.
    """
    # Half precision fits into tf32, so only the weights are rounded, to 11 bits.
    PRECISION: tl.constexpr = "ieee" if x.dtype.element_ty == tl.float32 else "tf32"
    sample = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, tokens, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        inside = j < tokens
        goes_to = tl.load(target + sample * tokens + j, mask=inside, other=-1)
        share = tl.load(weight + sample * tokens + j, mask=inside, other=0.0)
        share = tl.where(goes_to[None, :] == t[:, None], share[None, :], 0.0)  # [BLOCK_M, BLOCK_K]
        total += tl.sum(share, axis=1)
        cell = (sample * tokens + j)[:, None] * width + column[None, :]
        value = tl.load(x + cell, mask=inside[:, None] & (column < width)[None, :], other=0.0)
        accumulator = tl.dot(share, value.to(tl.float32), accumulator, input_precision=PRECISION)
    result = accumulator / tl.where(total > 0.0, total, 1.0)[:, None]
    mask = (t < length)[:, None] & (column < width)[None, :]
    cell = (sample * length + t)[:, None] * width + column[None, :]
    tl.store(out + cell, result.to(out.dtype.element_ty), mask=mask)


def score_tokens(
    queries: Tensor, cache: KVCache, survivors: Survivors, positions: Tensor, *, scale: float
) -> Tensor:
    """Attention the given queries pay each token, summed over a group's heads.

    Twin: `naive.score_tokens`.

    Args:
        queries: (batch, slots * group, head_dim): the last token's, rotated.
        cache: keys of all tokens, from row 0 of each group.
        survivors: surviving KV groups; one plan, or one per sample.
        positions: (batch, tokens) int32, negative for padding.
        scale: factor on q k^T.

    Returns:
        (batch, slots, tokens) float32; rows beyond a plan's count are undefined.
    """
    batch, heads, head_dim = queries.shape
    slots, tokens = survivors.slots, positions.shape[1]
    scores = torch.empty(batch, slots, tokens, dtype=torch.float32, device=queries.device)
    launch(
        score_kernel,
        (slots, batch),
        {
            "queries": queries,
            "keys": cache.keys,
            "positions": positions,
            "counts": survivors.counts,
            "first": cache.first,
            "room": cache.room,
            "scores": scores,
            "tokens": tokens,
            "slots": slots,
            "plan_stride": int(survivors.plans > 1),
            "scale": scale,
            "HEAD_DIM": head_dim,
            "GROUP": heads // slots,
            "BLOCK_D": max(16, power_of_two(head_dim)),
            "BLOCK_M": max(16, power_of_two(heads // slots)),
            "BLOCK_N": 64,
        },
        stages=2,
    )
    return scores


def choose_tokens(
    scores: Tensor,
    candidates: Tensor,
    positions: Tensor,
    keep: Tensor,
    length: int,
    counts: Tensor | None = None,
) -> Tensor:
    """Tokens to keep: everything but the worst candidates, in order. Twin: `naive.choose_tokens`.

    Args:
        scores: (batch, slots, tokens) float32, summed over slots.
        candidates: (batch, tokens) bool.
        positions: (batch, tokens) int32, negative for padding.
        keep: (batch,) int32: candidates to keep, at most as many as there are.
        length: tokens per sample of the result; the most that any sample keeps.
        counts: (plans,) int32: slots that count; None for all.

    Returns:
        (batch, length) int32, -1 in front where a sample keeps fewer.
    """
    batch, slots, tokens = scores.shape
    index = torch.empty(batch, length, dtype=torch.int32, device=scores.device)
    block = power_of_two(max(tokens, length))
    launch(
        choose_kernel,
        (batch,),
        {
            "scores": scores,
            "counts": counts,
            "candidates": candidates.to(torch.int8),
            "positions": positions,
            "keep": keep,
            "index": index,
            "tokens": tokens,
            "slots": slots,
            "length": length,
            "plan_stride": int(counts is not None and len(counts) > 1),
            "BLOCK_T": block,
        },
        warps=4 if block <= 1024 else 8,
    )
    return index


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x, (batch, tokens, width), by (batch, length) int32. Twin: `naive.gather_tokens`."""
    x = x.contiguous()
    batch, tokens, width = x.shape
    length = index.shape[1]
    out = x.new_empty(batch, length, width)
    block = min(1024, power_of_two(width))
    launch(
        gather_kernel,
        (batch * length, triton.cdiv(width, block)),
        {
            "x": x,
            "index": index,
            "out": out,
            "tokens": tokens,
            "length": length,
            "width": width,
            "BLOCK": block,
        },
    )
    return out


def merge_tokens(x: Tensor, target: Tensor, weight: Tensor, length: int) -> Tensor:
    """Weighted means of tokens by target. Twin: `naive.merge_tokens`.

    Args:
        x: (batch, tokens, width).
        target: (batch, tokens) int32: row of the result a token goes into; negative for none.
        weight: (batch, tokens) float32, not negative.
        length: rows of the result.

    Returns:
        (batch, length, width).
    """
    x = x.contiguous()
    batch, tokens, width = x.shape
    out = x.new_empty(batch, length, width)
    block_m, block_n = 64, 64
    launch(
        merge_kernel,
        (triton.cdiv(length, block_m), triton.cdiv(width, block_n), batch),
        {
            "x": x,
            "target": target,
            "weight": weight,
            "out": out,
            "tokens": tokens,
            "length": length,
            "width": width,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": 64,
        },
        stages=2,
    )
    return out
