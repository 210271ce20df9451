"""Attention over surviving heads where stock code keeps them: (batch, heads, tokens, head_dim).

One kernel serves prompts and single tokens: a program has one KV head, and the rows of its tile are
the query heads that share it, token by token, so that keys and values are read once for all of
them. For a single token the keys are split among programs, to fill the GPU with loads, and
`join_splits` joins the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import override

from planner.kernels.ops.attend import Attend
from planner.kernels.survivors import Survivors
from planner.kernels.triton.join_splits import Splits, join_splits
from planner.kernels.triton.kernel import Case, Kernel, require, strides, tensor_bytes
from planner.kernels.triton.launch import Launch, target_for
from planner.kernels.triton.primitives import softmax_step
from planner.kernels.triton.tiles import (
    AttentionTile,
    Target,
    attention_tile,
    decode_splits,
    decode_tile,
    power_of_two,
)


@triton.jit
def mask_range(
    mask, row_cell, real_row, context, key_stride, ADDED: tl.constexpr, SCAN: tl.constexpr
):
    """(begin, clear, end): keys outside [begin, end) are seen by no row of the tile, keys in
    [begin, clear) by every one with nothing added. `row_cell` is where a row's mask begins."""
    begin = context
    clear = context
    end = 0
    for start in tl.range(0, context, SCAN, num_stages=1):
        index = start + tl.arange(0, SCAN)
        cell = row_cell[:, None] + index[None, :] * key_stride
        present = real_row[:, None] & (index < context)[None, :]
        if ADDED:
            value = tl.load(mask + cell, mask=present, other=float("-inf")).to(tl.float32)
            seen, plain = value > float("-inf"), value == 0
        else:
            seen = tl.load(mask + cell, mask=present, other=0) != 0
            plain = seen
        some = tl.max(seen.to(tl.int32), axis=0) != 0
        every = tl.min((plain | (real_row == 0)[:, None]).to(tl.int32), axis=0) != 0
        begin = tl.minimum(begin, tl.min(tl.where(some, index, context)))
        end = tl.maximum(end, tl.max(tl.where(some, index + 1, 0)))
        broken = (index >= begin) & (index < context) & (every == 0)
        clear = tl.minimum(clear, tl.min(tl.where(broken, index, context)))
    return begin, tl.minimum(clear, end), end


@triton.jit(do_not_specialize=["tokens", "context", "slots", "splits"])
def attend_kernel(
    queries,  # [batch, kv_heads * GROUP, tokens, HEAD_DIM], strided
    keys,  # [batch, kv_heads, context, HEAD_DIM], strided
    values,  # [batch, kv_heads, context, HEAD_DIM], strided
    mask,  # [batch, kv_heads * GROUP, tokens, context], strided, or None
    units,  # [plans, slots] int32
    counts,  # [plans] int32
    out,  # [batch, tokens, slots * UNIT * GROUP, splits, HEAD_DIM]; float32 where it is partial
    weight,  # [batch, tokens, slots * UNIT * GROUP, splits] float32, or None with a single split
    tokens,
    context,
    slots,
    splits,
    plan_stride,
    query_sample,  # strides, in elements
    query_head,
    query_token,
    key_sample,
    key_head,
    key_token,
    value_sample,
    value_head,
    value_token,
    mask_sample,
    mask_head,
    mask_token,
    mask_key,
    scale,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
):
    """out = softmax(scale q k^T + mask) v for the heads of surviving units, packed by slot.

    A unit has UNIT KV heads, a KV head GROUP query heads. A mask is added where ADDED, otherwise
    its bytes say what is seen (not 0); without one, CAUSAL lets token i see keys 0 to i. A query
    that sees nothing gets 0. Blocks of keys that no row of the tile sees are not read. With splits,
    a program takes its share of the keys, and gives the base-2 logarithm of its softmax sum as
    well. bf16, fp16 or fp32; softmax and accumulation in float32.
    Sources: FlashAttention-2, arXiv 2307.08691, algorithm 1; Flash-Decoding (Dao et al., 2023).
    """
    # Later tiles see more keys; starting them first leaves the short ones to fill the tail.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, split = program // splits, program % splits
    place = tl.program_id(1)
    sample = tl.program_id(2)
    slot = place // UNIT
    if slot >= tl.load(counts + sample * plan_stride):
        return
    kv_head = tl.load(units + sample * plan_stride * slots + slot) * UNIT + place % UNIT
    batch = sample.to(tl.int64)
    keys += batch * key_sample + kv_head.to(tl.int64) * key_head
    values += batch * value_sample + kv_head.to(tl.int64) * value_head

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real_row = row < tokens * GROUP
    token = row // GROUP
    member = row % GROUP
    head = kv_head * GROUP + member
    lane = tl.arange(0, BLOCK_D)
    real_lane = lane < HEAD_DIM
    inside_tile = real_row[:, None] & real_lane[None, :]
    cell = batch * query_sample + head.to(tl.int64) * query_head + token.to(tl.int64) * query_token
    q = tl.load(queries + cell[:, None] + lane[None, :], mask=inside_tile, other=0.0)

    begin = 0
    clear = context
    end = context
    row_cell = token
    if mask is not None:
        # Offsets within the tile fit 32 bits, which saves registers.
        first = tile * BLOCK_M // GROUP
        mask += batch * mask_sample + (kv_head * GROUP).to(tl.int64) * mask_head
        mask += first.to(tl.int64) * mask_token
        row_cell = member * mask_head + (token - first) * mask_token
        begin, clear, end = mask_range(mask, row_cell, real_row, context, mask_key, ADDED, SCAN)
    elif CAUSAL:
        last = tl.minimum(tile * BLOCK_M + BLOCK_M, tokens * GROUP) - 1
        clear = tl.minimum(tile * BLOCK_M // GROUP + 1, context)
        end = tl.minimum(last // GROUP + 1, context)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_N) * BLOCK_N
    begin += split * share
    end = tl.minimum(begin + share, end)

    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    factor = scale * 1.4426950408889634  # exponentials are in base 2
    whole = tl.maximum(tl.minimum(clear, end) - begin, 0) // BLOCK_N * BLOCK_N
    for n in range(begin, begin + whole, BLOCK_N):
        index = (n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        present = real_lane[None, :]
        k = tl.load(keys + index * key_token + lane[None, :], mask=present, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        v = tl.load(values + index * value_token + lane[None, :], mask=present, other=0.0)
        accumulator, highest, total = softmax_step(scores, v, accumulator, highest, total)
    for n in tl.range(begin + whole, end, BLOCK_N, num_stages=1):
        offset = n + tl.arange(0, BLOCK_N)
        inside = offset < end
        index = offset.to(tl.int64)[:, None]
        present = inside[:, None] & real_lane[None, :]
        k = tl.load(keys + index * key_token + lane[None, :], mask=present, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        seen = real_row[:, None] & inside[None, :]
        if mask is not None:
            mask_cell = row_cell[:, None] + offset[None, :] * mask_key
            if ADDED:
                shift = tl.load(mask + mask_cell, mask=seen, other=float("-inf")).to(tl.float32)
                seen = shift > float("-inf")
                # The least finite number must stay finite: a row of nothing else is even.
                scores += tl.maximum(shift, -2.0e38) * 1.4426950408889634
            else:
                seen = tl.load(mask + mask_cell, mask=seen, other=0) != 0
        elif CAUSAL:
            seen = seen & (offset[None, :] <= token[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        v = tl.load(values + index * value_token + lane[None, :], mask=present, other=0.0)
        accumulator, highest, total = softmax_step(scores, v, accumulator, highest, total)
    empty = total == 0.0
    result = tl.where(empty[:, None], 0.0, accumulator / tl.where(empty, 1.0, total)[:, None])
    packed = (batch * tokens + token) * (slots * UNIT * GROUP) + place * GROUP + member
    cell = (packed * splits + split)[:, None] * HEAD_DIM + lane[None, :]
    tl.store(out + cell, result.to(out.dtype.element_ty), mask=inside_tile)
    if weight is not None:
        logarithm = tl.where(empty, float("-inf"), highest + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(weight + packed * splits + split, logarithm, mask=real_row)


class AttendKernel(Kernel):
    """Launches `attend_kernel`, and `join_splits` behind it where keys are split."""

    function = attend_kernel
    computes = Attend
    of_plan = frozenset({"slots", "plan_stride"})

    @override
    def __call__(
        self, inputs: Attend, tile: AttentionTile | None = None, splits: int | None = None
    ) -> Tensor:
        query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
        survivors = inputs.survivors
        batch, heads, tokens, head_dim = query.shape
        kv_heads, context = key.shape[1:3]
        units = survivors.slots
        require(value.shape == key.shape, f"values {tuple(value.shape)}, keys {tuple(key.shape)}.")
        require(heads % kv_heads == 0, f"{heads} heads do not share {kv_heads} KV heads evenly.")
        require(kv_heads % units == 0, f"{units} units do not divide {kv_heads} KV heads.")
        group, target, size = heads // kv_heads, target_for(query), query.element_size()
        rows = tokens * group
        if tokens == 1:
            tile = tile or decode_tile(head_dim, target, element_bytes=size)
            block_m = max(tile.block_m, power_of_two(rows))
            most = decode_splits(batch * kv_heads, context, target, block_n=tile.block_n)
            splits = splits or most
        else:
            tile = tile or attention_tile(rows, head_dim, target, element_bytes=size)
            block_m, splits = tile.block_m, 1
            if mask is not None:
                # A mask needs registers too: fewer keys a step, and rows read as vectors.
                tile = replace(tile, block_n=min(tile.block_n, 32))
                mask = _aligned(mask)
        query, key, value = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)
        )
        added = mask is not None and mask.dtype != torch.bool
        if mask is not None:
            mask = (mask if added else mask.view(torch.uint8)).expand(batch, heads, tokens, context)
        out = inputs.empty()
        partial, weight = out, None
        if splits > 1:
            partial = query.new_empty((batch, heads, splits, head_dim), dtype=torch.float32)
            weight = query.new_empty((batch, heads, splits), dtype=torch.float32)
        tensors = {"queries": query, "keys": key, "values": value, "mask": mask}
        axes = ("sample", "head", "token")
        placed = strides("query", query, *axes) | strides("key", key, *axes)
        placed |= strides("value", value, *axes) | strides("mask", mask, *axes, "key")
        sizes = {"tokens": tokens, "context": context, "splits": splits, "scale": inputs.scale}
        constants = {
            "HEAD_DIM": head_dim,
            "GROUP": group,
            "UNIT": kv_heads // units,
            "CAUSAL": inputs.causal,
            "ADDED": added,
            "BLOCK_D": max(16, power_of_two(head_dim)),
            "BLOCK_M": block_m,
            "BLOCK_N": tile.block_n,
            "SCAN": 32 if tokens > 1 else 512,
        }
        self.start(
            (triton.cdiv(rows, block_m) * splits, kv_heads, batch),
            tensors | {"out": partial, "weight": weight} | sizes | placed | constants,
            warps=tile.warps,
            stages=tile.stages,
            survivors=survivors,
        )
        if weight is None:
            return out
        return join_splits(Splits(partial, weight, survivors), query.dtype)[:, None]

    @override
    def seconds(self, launch: Launch, target: Target) -> float:
        given = launch.arguments
        batch, heads, tokens, head_dim = given["queries"].shape
        context = given["context"]
        pairs = tokens * (2 * context - tokens + 1) // 2 if given["CAUSAL"] else tokens * context
        return target.roofline(4 * batch * heads * head_dim * pairs, tensor_bytes(launch))

    @override
    def cases(self) -> Iterator[Case]:
        for form in MASKS:
            keys = 21 if form == "causal" else 37
            yield _case(form, 21, keys, plans=[[0, 1, 4]], group=2, head_dim=20)
            yield _case(form, 21, keys, plans=[[1, 3], [], [2]])
            yield _case(form, 1, 53, plans=[[0, 1, 3], [], [2]], group=2, splits=1)
            yield _case(form, 1, 53, plans=[[0, 1, 3], [], [2]], group=2, splits=3)
        for tokens, splits in ((9, None), (1, 2)):
            plans = [[0, 2], [4], []]
            yield _case("padded", tokens, 20, plans=plans, group=2, unit=2, splits=splits)
        # Causality is counted from the first key, as F.scaled_dot_product_attention counts.
        for tokens, keys in ((21, 37), (21, 8), (1, 37)):
            yield _case("causal", tokens, keys, plans=[[0, 4]])


def _aligned(mask: Tensor) -> Tensor:
    """A mask whose rows begin at multiples of 16 elements, the given one or a copy."""
    if mask.stride(-1) == 1 and all(stride % 16 == 0 for stride in mask.stride()[:-1]):
        return mask
    keys = mask.shape[-1]
    wide = mask.new_empty(*mask.shape[:-1], triton.cdiv(keys, 16) * 16)
    return wide[..., :keys].copy_(mask)


# -- cases ----------------------------------------------------------------------------------------

MASKS = ("none", "causal", "padded", "one for all", "room behind", "added", "by head")
_UNITS, _BATCH = 5, 3


def _case(
    form: str,
    tokens: int,
    keys: int,
    *,
    plans: list[list[int]],
    group: int = 1,
    unit: int = 1,
    head_dim: int = 16,
    splits: int | None = None,
) -> Case:
    """`unit` KV heads to a plan's unit, `group` queries to a KV head; the dead are not read."""
    kv_heads = _UNITS * unit
    # Queries and values lie token by token, as projections leave them.
    query = torch.randn(_BATCH, tokens, kv_heads * group, head_dim).transpose(1, 2)
    key = torch.randn(_BATCH, kv_heads, keys, head_dim)
    value = torch.randn(_BATCH, keys, kv_heads, head_dim).transpose(1, 2)
    for sample in range(_BATCH):
        kept = plans[min(sample, len(plans) - 1)]
        dead = sorted(set(range(_UNITS)) - set(kept))
        for operand in (query, key, value):
            operand[sample].unflatten(0, (_UNITS, -1))[dead] = torch.nan
    mask = _mask(form, kv_heads * group, tokens, keys)
    survivors = Survivors.of(plans, _UNITS)
    inputs = Attend(query, key, value, mask, survivors, 0.3, form == "causal")
    options = {"tile": AttentionTile(16, 16, warps=4, stages=1), "splits": splits}
    name = f"{form}, {tokens} x {keys}, {len(plans)} plans, {splits or 1} splits"
    return Case(name, inputs, options)


def _mask(form: str, heads: int, tokens: int, keys: int) -> Tensor | None:
    """As stock code makes them, and as it might."""
    seen = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    padded = seen.expand(_BATCH, 1, -1, -1).clone()
    padded[0, :, :, :5] = False
    if tokens > 1:
        padded[0, :, :2] = False  # queries that see nothing
    # Holes in the middle, and finite numbers that hide as well as infinite ones.
    added = torch.randn(_BATCH, 1, tokens, keys)
    added[torch.rand(added.shape) < 0.3] = -torch.inf
    added[..., 0] = 0
    added[:, :, 1:2, 1:] = torch.finfo(added.dtype).min
    by_head = torch.rand(1, heads, tokens, keys) < 0.4
    by_head[..., keys // 2] = True
    forms = {
        "padded": padded,
        "one for all": seen[None, None],
        # The rows of a static cache's mask: longer than what is read of them.
        "room behind": torch.nn.functional.pad(padded, (0, 11))[..., :keys],
        "added": added,
        "by head": by_head,
    }
    return forms.get(form)


attend = AttendKernel()
