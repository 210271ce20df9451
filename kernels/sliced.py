"""Whole blocks in PyTorch on sliced weights: the CPU side of the custom ops.

What does not survive is not computed. Survivors are read as contiguous runs of weight rows and
columns without a copy where runs are long, and gathered where they are short: matrix products want
long runs, and a gather costs as much as reading the weights twice. Slices are not kept from call to
call; a plan that stays is better served by an executor that slices once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from planner.kernels.naive import (
    ACTIVATIONS,
    apply_norm,
    gather_tokens,
    normalize,
    rotate,
    visible,
)
from planner.kernels.ops.kept_linear import kept_linear
from planner.kernels.records import AttentionWeights, KVCache, MLPWeights, Norm, Survivors

__all__ = [
    "angles_of",
    "attention",
    "choose_tokens",
    "features",
    "merge_shares",
    "merge_tokens",
    "mlp",
    "parts_of",
    "plan_groups",
    "project_columns",
    "rows_of",
    "select_tokens",
]

# Mean run, in weight rows, from which views beat a gather (measured on a CPU, prefill and decode).
LONG_RUN = 32

Part = slice | Tensor
"""Features of a weight: a run, read in place, or a list, gathered."""


def mlp(
    hidden: Tensor, weights: MLPWeights, survivors: Survivors, residual: Tensor | None = None
) -> Tensor:
    """The MLP block over surviving neurons; arguments and result as `naive.mlp`."""

    def run(samples: Part, kept: Tensor) -> Tensor:
        x = apply_norm(hidden[samples], weights.norm).flatten(end_dim=-2)
        act = ACTIVATIONS[weights.activation]
        inner = []
        (parts,) = parts_of(kept, 1)
        for part in parts:
            value = rows_of(x, weights.up, weights.up_bias, part)
            if weights.gate is None:
                inner.append(act(value))
            else:
                inner.append(value.mul_(act(rows_of(x, weights.gate, weights.gate_bias, part))))
        return project_columns(inner, x, weights.down, weights.down_bias, parts)

    return _each_plan(run, hidden, survivors, residual)


def attention(
    hidden: Tensor,
    weights: AttentionWeights,
    survivors: Survivors,
    angles: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    residual: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    cache: KVCache | None = None,
    key_positions: Tensor | None = None,
) -> Tensor:
    """The attention block over surviving KV groups; arguments and result as `fused.attention`."""
    head_dim, group = weights.head_dim, weights.group
    attend = partial(_attend, scale=weights.softmax_scale, causal=causal, window=window)

    def run(samples: Part, kept: Tensor) -> Tensor:
        x = apply_norm(hidden[samples], weights.norm)
        turn = angles_of(angles, samples)
        wide, narrow = parts_of(kept, group * head_dim, head_dim)
        q = _heads(x, weights.query, weights.query_bias, wide, head_dim)
        k = _heads(x, weights.key, weights.key_bias, narrow, head_dim)
        v = _heads(x, weights.value, weights.value_bias, narrow, head_dim)
        eps, offset = weights.head_norm_eps, weights.head_norm_offset
        if weights.query_norm is not None:
            q = normalize(q, Norm(weights.query_norm, eps=eps, offset=offset))
        if weights.key_norm is not None:
            k = normalize(k, Norm(weights.key_norm, eps=eps, offset=offset))
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        places = positions[samples]
        if cache is None or key_positions is None:
            mixed = attend(q, k, v, places, places)
        else:
            chosen = torch.arange(len(hidden))[samples].tolist()
            rows = [
                _attend_cached(attend, q[i], k[i], v[i], places[i], cache, key_positions, sample)
                for i, sample in enumerate(chosen)
            ]
            mixed = torch.stack(rows)
        flat = mixed.flatten(start_dim=-2).flatten(end_dim=-2)
        sizes = [p.stop - p.start if isinstance(p, slice) else len(p) for p in wide]
        inner = list(flat.split(sizes, dim=-1))
        return project_columns(inner, flat, weights.output, weights.output_bias, wide)

    return _each_plan(run, hidden, survivors, residual)


def select_tokens(
    hidden: Tensor,
    queries: Tensor,
    cache: KVCache,
    survivors: Survivors,
    positions: Tensor,
    candidates: Tensor,
    keep: Tensor,
    length: int,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """FastV: score, choose and gather; see `ops.select_tokens`."""
    group = queries.shape[1] // survivors.slots
    tokens = positions.shape[1]
    scores = []
    for sample in range(len(hidden)):
        count = int(survivors.counts[sample if survivors.plans > 1 else 0])
        keys = _cached(cache.keys, cache, sample, count, tokens).float()
        q = queries[sample, : count * group].float().unflatten(0, (count, group))
        logits = (q @ keys.transpose(-1, -2) * scale).masked_fill(positions[sample] < 0, -torch.inf)
        scores.append(torch.softmax(logits, dim=-1).sum(dim=(0, 1)))
    index = choose_tokens(torch.stack(scores), candidates, positions, keep, length)
    return gather_tokens(hidden, index), index


def choose_tokens(
    scores: Tensor, candidates: Tensor, positions: Tensor, keep: Tensor, length: int
) -> Tensor:
    """Everything but the worst candidates, in order, aligned to the right; -1 in front.

    Args:
        scores: (batch, tokens).
        candidates: (batch, tokens) bool.
        positions: (batch, tokens), negative for padding.
        keep: (batch,): candidates to keep; of equal scores the earlier token wins.
        length: tokens per sample of the result.

    Returns:
        (batch, length) int32.
    """
    real = positions >= 0
    competing = candidates & real
    order = scores.masked_fill(~competing, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    kept = (real & ~candidates) | (competing & (rank < keep[:, None]))
    # A stable sort by "kept" moves the kept tokens to the right end and leaves them in order.
    index = kept.int().argsort(dim=-1, stable=True)
    index = index.masked_fill(~kept.gather(-1, index), -1)
    index = F.pad(index, (max(0, length - index.shape[1]), 0), value=-1)
    return index[:, index.shape[1] - length :].int()


def merge_shares(target: Tensor, weight: Tensor, length: int) -> Tensor:
    """What part of its row each token makes up, (batch, tokens); 0 for tokens without a target."""
    weight = weight * (target >= 0)
    place = target.long().clamp(min=0)
    total = weight.new_zeros(len(target), length).scatter_add(1, place, weight)
    return weight / total.gather(1, place).where(weight > 0, 1.0)


def merge_tokens(x: Tensor, target: Tensor, weight: Tensor, length: int) -> Tensor:
    """Weighted means of tokens by target; arguments and result as `naive.merge_tokens`."""
    share = merge_shares(target, weight, length).to(x.dtype)
    place = target.long().clamp(min=0)[:, :, None].expand_as(x)
    out = x.new_zeros(x.shape[0], length, x.shape[2])
    return out.scatter_add(1, place, x * share[:, :, None])


def plan_groups(survivors: Survivors) -> list[tuple[Part, Tensor]]:
    """(samples, surviving lanes) for each distinct plan; a plan that all share serves all."""
    if survivors.plans == 1:
        return [(slice(None), survivors.kept(0))]
    groups: dict[tuple[int, ...], tuple[list[int], Tensor]] = {}
    for plan in range(survivors.plans):
        kept = survivors.kept(plan)
        groups.setdefault(tuple(kept.tolist()), ([], kept))[0].append(plan)
    if len(groups) == 1:
        return [(slice(None), kept) for _, kept in groups.values()]
    return [(torch.tensor(s, device=kept.device), kept) for s, kept in groups.values()]


def angles_of(angles: tuple[Tensor, Tensor] | None, samples: Part) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of some samples; a single row serves all."""
    if angles is None or angles[0].shape[0] == 1:
        return angles
    return angles[0][samples], angles[1][samples]


def features(kept: Tensor, width: int) -> Tensor:
    """Weight rows (or columns) of lanes that are `width` features each."""
    return (kept[:, None] * width + torch.arange(width, device=kept.device)).flatten()


def rows_of(x: Tensor, weight: Tensor, bias: Tensor | None, part: Part) -> Tensor:
    """A linear layer's output features `part`."""
    return kept_linear(x, weight[part], None if bias is None else bias[part])


def _each_plan(
    run: Callable[[Part, Tensor], Tensor],
    hidden: Tensor,
    survivors: Survivors,
    residual: Tensor | None,
) -> Tensor:
    # run(samples, surviving lanes) -> (rows, features), for each group of samples with one plan.
    groups = plan_groups(survivors)
    results = [run(samples, kept) for samples, kept in groups]
    shape = (*hidden.shape[:-1], results[0].shape[-1])
    if len(groups) == 1:
        out = results[0].view(shape)
    else:
        out = hidden.new_empty(shape)
        for (samples, _), result in zip(groups, results, strict=True):
            out[samples] = result.view(-1, *shape[1:])
    return out if residual is None else out.add_(residual)


def parts_of(kept: Tensor, *widths: int) -> list[list[Part]]:
    """Weight features of surviving lanes, for weights with so many features per lane.

    Runs to view where runs are long, else one list to gather; none where nothing survives.
    """
    if not len(kept):
        return [[] for _ in widths]
    breaks = (kept.diff() != 1).nonzero().flatten()
    starts = [int(kept[0]), *kept[breaks + 1].tolist()]
    stops = [*(kept[breaks] + 1).tolist(), int(kept[-1]) + 1]
    if len(kept) * min(widths) < LONG_RUN * len(starts):
        return [[features(kept, width)] for width in widths]
    runs = list(zip(starts, stops, strict=True))
    return [[slice(a * width, b * width) for a, b in runs] for width in widths]


def _heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Part], head_dim: int
) -> Tensor:
    # (..., surviving heads, head_dim)
    projected = [rows_of(x, weight, bias, part) for part in parts]
    joined = torch.cat(projected, dim=-1) if projected else x[..., :0]
    return joined.unflatten(-1, (-1, head_dim))


def project_columns(
    inner: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Part]
) -> Tensor:
    """Sum over parts of ``inner @ weight[:, part].T``, plus bias.

    Args:
        inner: (rows, features of the part) for each part.
        x: (rows, ...); gives the rows where nothing survives.
        weight: (out, in).
        bias: (out,) or None.
        parts: input features.
    """
    out = None
    for value, part in zip(inner, parts, strict=True):
        columns = weight[:, part]
        out = value @ columns.T if out is None else out.addmm_(value, columns.T)
    if out is None:
        out = x.new_zeros(x.shape[0], weight.shape[0])
    return out if bias is None else out + bias


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    key_positions: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    # (batch, tokens, heads, head_dim) each; keys and values with fewer heads under GQA.
    if not q.shape[2]:
        return q
    mask = None
    same = positions is key_positions and bool((positions >= 0).all())
    in_order = causal and window is None and same and bool((positions.diff(dim=-1) > 0).all())
    if not in_order and (causal or not same):
        mask = visible(positions, key_positions, causal, window)[:, None]
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=in_order,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return mixed.transpose(1, 2)


def _cached(store: Tensor, cache: KVCache, sample: int, groups: int, tokens: int) -> Tensor:
    # A sample's cache as (groups, tokens, head_dim), in place.
    first, room = int(cache.first[sample]), int(cache.room[sample])
    return store[first : first + groups * room].unflatten(0, (groups, room))[:, :tokens]


def _attend_cached(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cache: KVCache,
    key_positions: Tensor,
    sample: int,
) -> Tensor:
    # One sample, (tokens, heads, head_dim) each; appends k and v and attends to all there is.
    tokens, groups, _ = k.shape
    if not groups:
        return q
    held = int(cache.lengths[sample])
    keys = _cached(cache.keys, cache, sample, groups, held + tokens)
    values = _cached(cache.values, cache, sample, groups, held + tokens)
    keys[:, held:] = k.transpose(0, 1)
    values[:, held:] = v.transpose(0, 1)
    places = key_positions[sample, : held + tokens]
    mixed = attend(
        q[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        positions[None],
        places[None],
    )
    return mixed[0]
