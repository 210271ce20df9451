"""Queries, keys and values of surviving heads: norm, projection, bias, head norm and rotation.

One kernel, two places to write to: packed queries and a ragged cache (`project_qkv`), or
the features of stock linear layers, zeros where a head does not survive (`project_in_place`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from planner.kernels.launch import launch, target_for
from planner.kernels.norm import normalize
from planner.kernels.primitives import pair_lane, surviving_features, tile_order, unit_in_order
from planner.kernels.records import AttentionWeights, KVCache, Survivors
from planner.kernels.tiles import Tile, fold_norm, matmul_tile, power_of_two

__all__ = ["project_in_place", "project_qkv", "project_qkv_kernel"]


@triton.jit(do_not_specialize=["rows", "tokens", "slots"])
def project_qkv_kernel(
    x,  # [samples, rows, depth]
    norm_weight,  # [depth] or None: x is taken as it is
    query_weight,  # [kv_heads * GROUP * HEAD_DIM, depth]
    key_weight,  # [kv_heads * HEAD_DIM, depth] or None: queries alone
    value_weight,  # [kv_heads * HEAD_DIM, depth] or None, as key_weight
    query_bias,  # [kv_heads * GROUP * HEAD_DIM] or None
    key_bias,  # [kv_heads * HEAD_DIM] or None
    value_bias,  # [kv_heads * HEAD_DIM] or None
    query_norm,  # [HEAD_DIM] or None
    key_norm,  # [HEAD_DIM] or None
    cos,  # [batch, tokens, >= ROTARY / 2], or one sample for all
    sin,  # as cos
    units,  # [samples, slots] int32
    counts,  # [samples] int32
    queries,  # [batch, tokens, slots * GROUP, HEAD_DIM]
    keys,  # [cache rows, HEAD_DIM]
    values,  # [cache rows, HEAD_DIM]
    first,  # [batch] int32 or None where IN_PLACE
    room,  # [batch] int32 or None where IN_PLACE
    lengths,  # [batch] int32 or None where IN_PLACE
    rows,
    tokens,
    depth,
    slots,
    angle_sample_stride,
    angle_token_stride,
    norm_eps,
    norm_offset,
    head_norm_eps,
    head_norm_offset,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROTARY: tl.constexpr,
    IN_PLACE: tl.constexpr,
    SLOT_BITS: tl.constexpr,
    VECTOR: tl.constexpr,
    STEP: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """q, k, v = rotate(headnorm(n(x) @ W.T + b)) for the heads of surviving KV groups.

    Virtual columns run over all surviving query lanes, then key lanes, then value lanes; a tile
    takes STEP of them (HEAD_DIM, one whole head, where heads are normed; else BLOCK_N). Values are
    neither normed nor rotated. Keys and values go straight into the cache, token t of a sample to
    row ``first + slot * room + lengths + t``. A sample here is a plan: with one plan for the batch,
    rows are batch * tokens and samples is 1. bf16, fp16 or fp32, accumulated in float32.
    Sources: RoPE arXiv 2104.09864 eq. 34, GQA 2305.13245, norm of q and k 2302.05442 sec. 2.
    """
    PAIRED: tl.constexpr = ROTARY if ROTARY > 0 else HEAD_DIM
    sample = tl.program_id(1)
    query_tiles = tl.cdiv(slots * (GROUP * HEAD_DIM), STEP)
    key_tiles = 0 if key_weight is None else tl.cdiv(slots * HEAD_DIM, STEP)
    row_tile, column_tile = tile_order(
        tl.program_id(0), tl.cdiv(rows, BLOCK_M), query_tiles + 2 * key_tiles, GROUP_ROWS
    )
    is_query = column_tile < query_tiles
    is_value = column_tile >= query_tiles + key_tiles
    is_key = (is_query == 0) & (is_value == 0)
    column_tile -= tl.where(is_query, 0, query_tiles) + tl.where(is_value, key_tiles, 0)
    width = tl.where(is_query, GROUP * HEAD_DIM, HEAD_DIM)
    survivors = tl.load(counts + sample) * width
    if IN_PLACE:
        # Queries, keys and values are [samples, rows, slots * width], every feature where the
        # weight has it. Virtual columns go on over groups that do not survive and get zeros.
        steps = tl.where(column_tile * STEP < survivors, depth, 0)
    else:
        if column_tile * STEP >= survivors:
            return
    if key_weight is not None:
        # Alignment does not survive the choice between pointers unless it is stated.
        weight = tl.where(is_query, query_weight, tl.where(is_key, key_weight, value_weight))
        weight = tl.multiple_of(weight, 16)
        chosen = tl.where(is_query, queries, tl.where(is_key, keys, values))
        destination = tl.multiple_of(chosen, 16)
    else:
        weight, destination = query_weight, queries

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows beyond the end read the last one; they are not stored.
    x_row = x + (sample * rows + tl.minimum(row, rows - 1)).to(tl.int64) * depth
    offset = tl.arange(0, BLOCK_N)
    column = column_tile * STEP + offset
    kept = (offset < STEP) & (column < survivors)
    position = column % HEAD_DIM
    lane = pair_lane(position // 2, position % 2, PAIRED, HEAD_DIM)
    units += sample * slots
    feature = surviving_features(units, column, kept, width)
    feature = tl.where(kept, feature - position + lane, 0)
    k = tl.arange(0, BLOCK_K)
    x_tile = x_row[:, None] + k[None, :]  # [BLOCK_M, BLOCK_K]
    weight_tile = weight + feature.to(tl.int64)[:, None] * depth + k[None, :]  # [BLOCK_N, BLOCK_K]

    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, steps if IN_PLACE else depth, BLOCK_K):
        inside = (start + k) < depth
        if EVEN_DEPTH:
            a = tl.load(x_tile + start)
            w = tl.load(weight_tile + start)
        else:
            a = tl.load(x_tile + start, mask=inside[None, :], other=0.0)
            w = tl.load(weight_tile + start, mask=inside[None, :], other=0.0)
        if norm_weight is not None:
            gain = tl.load(norm_weight + start + k, mask=inside, other=0.0).to(tl.float32)
            value = a.to(tl.float32)
            squares += tl.sum(value * value, axis=1)
            a = (value * (gain + norm_offset)[None, :]).to(w.dtype)
        accumulator = tl.dot(a, tl.trans(w), accumulator, input_precision="ieee")
    if norm_weight is not None:
        accumulator *= tl.rsqrt(squares / depth + norm_eps)[:, None]

    if query_bias is not None:
        mine = kept & (column < tl.where(is_query, survivors, 0))
        bias = tl.load(query_bias + feature, mask=mine, other=0.0)
        accumulator += bias.to(tl.float32)[None, :]
    if key_bias is not None:
        mine = kept & (column < tl.where(is_key, survivors, 0))
        bias = tl.load(key_bias + feature, mask=mine, other=0.0)
        accumulator += bias.to(tl.float32)[None, :]
    if value_bias is not None:
        mine = kept & (column < tl.where(is_value, survivors, 0))
        bias = tl.load(value_bias + feature, mask=mine, other=0.0)
        accumulator += bias.to(tl.float32)[None, :]
    if query_norm is not None:
        head = tl.where(kept[None, :], accumulator, 0.0)
        inverse = tl.rsqrt(tl.sum(head * head, axis=1) / HEAD_DIM + head_norm_eps)
        gain = tl.load(tl.where(is_query, query_norm, key_norm) + lane).to(tl.float32)
        factor = inverse[:, None] * (gain + head_norm_offset)[None, :]
        accumulator *= tl.where(is_value, 1.0, factor)

    # The two members of a pair sit in neighbouring columns.
    HALF: tl.constexpr = BLOCK_N // 2
    one, other = tl.split(tl.reshape(accumulator, [BLOCK_M, HALF, 2]))
    offset = tl.arange(0, HALF)
    pairs = column_tile * (STEP // 2) + offset
    pair = pairs % (HEAD_DIM // 2)
    half_width = tl.where(is_query, GROUP * HEAD_DIM // 2, HEAD_DIM // 2)
    kept = (offset < STEP // 2) & (pairs < tl.load(counts + sample) * half_width)
    batch = sample + row // tokens
    token = row % tokens
    mask = (row < rows)[:, None] & kept[None, :]
    if ROTARY > 0:
        turns = mask & (pair < tl.where(is_value, 0, ROTARY // 2))[None, :]
        angle = (batch.to(tl.int64) * angle_sample_stride + token * angle_token_stride)[:, None]
        angle += pair[None, :]
        c = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
        one, other = one * c - other * s, other * c + one * s

    if IN_PLACE:
        # Columns that do not survive may hold anything by now.
        one, other = tl.where(kept[None, :], one, 0.0), tl.where(kept[None, :], other, 0.0)
        place = pairs // half_width
        mask = (row < rows)[:, None] & ((offset < STEP // 2) & (place < slots))[None, :]
        unit = unit_in_order(units, tl.load(counts + sample), place, SLOT_BITS)
        start = (sample * rows + row).to(tl.int64) * (slots * width)
        address = start[:, None] + (unit * width)[None, :]
    else:
        written = row < rows
        cache_row = tl.load(first + batch, mask=written, other=0)
        cache_row += tl.load(lengths + batch, mask=written, other=0) + token
        slot_stride = tl.load(room + batch, mask=written, other=0).to(tl.int64) * HEAD_DIM
        slot_stride = tl.where(is_query, GROUP * HEAD_DIM, slot_stride)
        query_row = (batch.to(tl.int64) * tokens + token) * (slots * GROUP)
        start_row = tl.where(is_query, query_row, cache_row.to(tl.int64)) * HEAD_DIM
        address = start_row[:, None] + (pairs // half_width)[None, :] * slot_stride[:, None]
    head_start = (pairs % half_width - pair) * 2
    for member in tl.static_range(2):
        cell = address + (head_start + pair_lane(pair, member, PAIRED, HEAD_DIM))[None, :]
        # Runs of VECTOR pairs stay in one head, so their lanes are neighbours in memory.
        cell = tl.max_contiguous(tl.multiple_of(cell, [1, VECTOR]), [1, VECTOR])
        value = one if member == 0 else other
        tl.store(destination + cell, value.to(x.dtype.element_ty), mask=mask)


def project_qkv(
    x: Tensor,
    weights: AttentionWeights,
    survivors: Survivors,
    angles: tuple[Tensor, Tensor] | None,
    cache: KVCache,
    tile: Tile | None = None,
) -> Tensor:
    """Project, norm and rotate; keys and values are written behind what `cache` holds.

    Twin: `naive.project_qkv`.

    Args:
        x: (batch, tokens, hidden).
        weights: the attention block's; its norm is applied.
        survivors: surviving KV groups; one plan, or one per sample.
        angles: cosines and sines, (batch or 1, tokens, rotary lanes) each, as transformers'
            rotary embeddings give them, the second half of the lanes repeating the first; or None.
        cache: receives keys and values.
        tile: for tests; by default `tiles.matmul_tile` chooses.

    Returns:
        Queries, (batch, tokens, slots * group, head_dim), undefined beyond a plan's count.
    """
    batch, tokens, depth = x.shape
    samples = survivors.plans
    rows = batch * tokens // samples
    head_dim, group = weights.head_dim, weights.group
    norm = weights.norm
    if norm is not None and not (norm.kind == "rms" and fold_norm(rows)):
        x, norm = normalize(x, norm), None
    query_lanes = survivors.slots * group * head_dim
    key_lanes = survivors.slots * head_dim
    whole_heads = weights.query_norm is not None
    tile = tile or matmul_tile(
        rows,
        query_lanes + 2 * key_lanes,
        depth,
        target_for(x),
        samples=samples,
        element_bytes=x.element_size(),
        block_n=power_of_two(head_dim) if whole_heads else None,
    )
    step = head_dim if whole_heads else tile.block_n
    column_tiles = triton.cdiv(query_lanes, step) + 2 * triton.cdiv(key_lanes, step)
    cos, sin = angles or (None, None)
    rotary = 0 if cos is None else cos.shape[-1]
    queries = x.new_empty(batch, tokens, survivors.slots * group, head_dim)
    launch(
        project_qkv_kernel,
        (triton.cdiv(rows, tile.block_m) * column_tiles, samples),
        {
            "x": x,
            "norm_weight": None if norm is None else norm.weight,
            "query_weight": weights.query,
            "key_weight": weights.key,
            "value_weight": weights.value,
            "query_bias": weights.query_bias,
            "key_bias": weights.key_bias,
            "value_bias": weights.value_bias,
            "query_norm": weights.query_norm,
            "key_norm": weights.key_norm,
            "cos": cos,
            "sin": sin,
            "units": survivors.units,
            "counts": survivors.counts,
            "queries": queries,
            "keys": cache.keys,
            "values": cache.values,
            "first": cache.first,
            "room": cache.room,
            "lengths": cache.lengths,
            "rows": rows,
            "tokens": tokens,
            "depth": depth,
            "slots": survivors.slots,
            "angle_sample_stride": 0 if cos is None or cos.shape[0] == 1 else cos.stride(0),
            "angle_token_stride": 0 if cos is None else cos.stride(1),
            "norm_eps": 0.0 if norm is None else norm.eps,
            "norm_offset": 0.0 if norm is None else norm.offset,
            "head_norm_eps": weights.head_norm_eps,
            "head_norm_offset": weights.head_norm_offset,
            "HEAD_DIM": head_dim,
            "GROUP": group,
            "ROTARY": rotary,
            "IN_PLACE": False,
            "SLOT_BITS": 0,
            "VECTOR": min(math.gcd(rotary // 2, (head_dim - rotary) // 2) & 7 or 8, 8),
            "STEP": step,
            "EVEN_DEPTH": depth % tile.block_k == 0,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_ROWS": tile.group_rows,
        },
        warps=tile.warps,
        stages=tile.stages,
    )
    return queries


def project_in_place(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    survivors: Survivors,
    outputs: Sequence[Tensor],
    tile: Tile | None = None,
) -> None:
    """Linear layers over surviving KV groups, each feature where the stock layer has it.

    Args:
        x: (batch, tokens, hidden).
        weights: (out, hidden): one, or those of queries, keys and values; KV group g has rows
            ``g * width`` to ``(g + 1) * width``, width = out / groups, an even number.
        biases: (out,) or None, for each weight.
        survivors: surviving KV groups, of `slots` in all; one plan, or one per sample.
        outputs: (batch, tokens, out) for each weight, written: features of groups that do not
            survive become 0.
        tile: for tests; by default `tiles.matmul_tile` chooses.
    """
    batch, tokens, depth = x.shape
    samples, slots = survivors.plans, survivors.slots
    rows = batch * tokens // samples
    widths = [weight.shape[0] // slots for weight in weights]
    columns = sum(weight.shape[0] for weight in weights)
    tile = tile or matmul_tile(
        rows, columns, depth, target_for(x), samples=samples, element_bytes=x.element_size()
    )
    query_weight, key_weight, value_weight = _three(weights)
    query_bias, key_bias, value_bias = _three(biases)
    queries, keys, values = _three(outputs)
    launch(
        project_qkv_kernel,
        (
            triton.cdiv(rows, tile.block_m)
            * sum(triton.cdiv(slots * width, tile.block_n) for width in widths),
            samples,
        ),
        {
            "x": x,
            "norm_weight": None,
            "query_weight": query_weight,
            "key_weight": key_weight,
            "value_weight": value_weight,
            "query_bias": query_bias,
            "key_bias": key_bias,
            "value_bias": value_bias,
            "query_norm": None,
            "key_norm": None,
            "cos": None,
            "sin": None,
            "units": survivors.units,
            "counts": survivors.counts,
            "queries": queries,
            "keys": keys,
            "values": values,
            "first": None,
            "room": None,
            "lengths": None,
            "rows": rows,
            "tokens": tokens,
            "depth": depth,
            "slots": slots,
            "angle_sample_stride": 0,
            "angle_token_stride": 0,
            "norm_eps": 0.0,
            "norm_offset": 0.0,
            "head_norm_eps": 0.0,
            "head_norm_offset": 0.0,
            "HEAD_DIM": widths[-1],
            "GROUP": widths[0] // widths[-1],
            "ROTARY": 0,
            "IN_PLACE": True,
            "SLOT_BITS": slots.bit_length(),
            "VECTOR": widths[-1] // 2 & 7 or 8,
            "STEP": tile.block_n,
            "EVEN_DEPTH": depth % tile.block_k == 0,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_ROWS": tile.group_rows,
        },
        warps=tile.warps,
        stages=tile.stages,
    )


def _three(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [*tensors, *[None] * (3 - len(tensors))]
