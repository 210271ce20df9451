"""Attention in two halves around stock code: what the ops of `planner.kernels.head_ops` compute.

Surviving heads are projected to where stock code expects them and attended to from there; heads
that do not survive are 0 and are never read. PyTorch on weights read in place in long runs,
gathered in short ones (`planner.kernels.sliced`); on a GPU the forward is that of
`planner.kernels.fused`. Backward is recomputed by plain formulas, and only survivors get or cost
anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from planner.kernels.records import Survivors
from planner.kernels.sliced import (
    Part,
    features,
    parts_of,
    plan_groups,
    project_columns,
    rows_of,
)

__all__ = ["attend_heads", "attend_heads_backward", "project_heads", "project_heads_backward"]


def project_heads(
    hidden: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    survivors: Survivors,
) -> list[Tensor]:
    """Arguments and result as `head_ops.project_heads`."""
    groups = plan_groups(survivors)
    if len(groups) == 1 and len(groups[0][1]) == survivors.slots:
        return [F.linear(hidden, w, b) for w, b in zip(weights, biases, strict=True)]
    outputs = [hidden.new_zeros(*hidden.shape[:-1], w.shape[0]) for w in weights]
    for samples, kept in groups:
        x = hidden[samples]
        for out, weight, bias in zip(outputs, weights, biases, strict=True):
            (parts,) = parts_of(kept, weight.shape[0] // survivors.slots)
            for part in parts:
                rows = rows_of(x, weight, bias, part)
                if isinstance(samples, slice):
                    out[..., part] = rows
                else:
                    out[samples[:, None], :, _numbers(part, out)] = rows.transpose(1, 2)
    return outputs


def attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    survivors: Survivors,
    *,
    scale: float,
    causal: bool,
) -> Tensor:
    """Arguments and result as `head_ops.attend_heads`."""
    out = query.new_empty(query.shape[0], query.shape[2], output.shape[0])
    for samples, kept in plan_groups(survivors):
        mixed, runs = [], _runs_of(kept)
        if len(runs) > 1 and mask is not None and mask.dtype == torch.bool:
            # Attention would turn it into this once for every run.
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        for run in runs:
            heads, kv_heads = (_heads_of(run, x, survivors.slots) for x in (query, key))
            q, k, v = query[samples, heads], key[samples, kv_heads], value[samples, kv_heads]
            m = _mask_of(mask, samples, heads)
            shared = q.shape[1] != k.shape[1]
            got = F.scaled_dot_product_attention(
                q, k, v, m, is_causal=causal, scale=scale, enable_gqa=shared
            )
            # (rows, features of the run's heads)
            mixed.append(got.transpose(1, 2).flatten(start_dim=2).flatten(end_dim=1))
        joined = torch.cat(mixed, dim=-1) if mixed else query[samples, 0, :, :0].flatten(end_dim=1)
        (parts,) = parts_of(kept, output.shape[1] // survivors.slots)
        inner = list(joined.split([_length(part) for part in parts], dim=-1)) if parts else []
        rows = project_columns(inner, joined, output, None, parts)
        out[samples] = rows.view(-1, *out.shape[1:])
    return out


def project_heads_backward(
    gradients: Sequence[Tensor],
    hidden: Tensor,
    weights: Sequence[Tensor],
    survivors: Survivors,
    weighted: bool,
) -> list[Tensor]:
    """Gradients of `project_heads`: of its input and, where `weighted`, weights and biases."""
    d_hidden = torch.zeros_like(hidden)
    d_weights = [torch.zeros_like(w) for w in weights] if weighted else []
    d_biases = [w.new_zeros(w.shape[0]) for w in weights] if weighted else []
    for samples, kept in plan_groups(survivors):
        x = hidden[samples].flatten(end_dim=-2)
        for index, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            rows = features(kept, weight.shape[0] // survivors.slots)
            d = gradient[samples].flatten(end_dim=-2)[:, rows]
            d_hidden[samples] += (d @ weight[rows]).view_as(hidden[samples])
            if weighted:
                d_weights[index][rows] += d.T @ x
                d_biases[index][rows] += d.sum(dim=0)
    return [d_hidden, *d_weights, *d_biases]


def attend_heads_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    survivors: Survivors,
    *,
    scale: float,
    causal: bool,
) -> list[Tensor]:
    """Gradients of `attend_heads`: of query, key, value and output."""
    sums = [torch.zeros_like(tensor) for tensor in (query, key, value, output)]
    d_query, d_key, d_value, d_output = sums
    for samples, kept in plan_groups(survivors):
        d_out = gradient[samples]
        for run in _runs_of(kept):
            heads, kv_heads = (_heads_of(run, x, survivors.slots) for x in (query, key))
            columns = slice(heads.start * value.shape[-1], heads.stop * value.shape[-1])
            q, k, v = query[samples, heads], key[samples, kv_heads], value[samples, kv_heads]
            shared = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
            weight = _softmax(q @ k.mT, _mask_of(mask, samples, heads), scale, causal).to(q.dtype)
            mixed = (weight @ v).transpose(1, 2).flatten(start_dim=2)
            d_output[:, columns] += d_out.flatten(end_dim=1).T @ mixed.flatten(end_dim=1)
            d = (d_out @ output[:, columns]).unflatten(-1, (-1, v.shape[-1])).transpose(1, 2)
            d_weight = d @ v.mT
            d_scores = weight * (d_weight - (d_weight * weight).sum(dim=-1, keepdim=True)) * scale
            d_query[samples, heads] += d_scores @ k
            for total, part in ((d_key, d_scores.mT @ q), (d_value, weight.mT @ d)):
                total[samples, kv_heads] += part.unflatten(1, (-1, shared)).sum(dim=2)
    return sums


def _softmax(products: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Weights of attention in at least float32; of a row that sees nothing they are 0."""
    scores = (products.float() if products.dtype.itemsize == 2 else products) * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1).nan_to_num(0.0)


def _numbers(part: Part, like: Tensor) -> Tensor:
    if isinstance(part, slice):
        return torch.arange(part.start, part.stop, device=like.device)
    return part


def _length(part: Part) -> int:
    return part.stop - part.start if isinstance(part, slice) else len(part)


def _runs_of(kept: Tensor) -> list[tuple[int, int]]:
    """Ascending numbers as runs of consecutive ones, half-open."""
    numbers = kept.tolist()
    breaks = [i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    edges = [0, *breaks, len(numbers)] if numbers else []
    return [(numbers[a], numbers[b - 1] + 1) for a, b in pairwise(edges)]


def _heads_of(run: tuple[int, int], operand: Tensor, slots: int) -> slice:
    """The heads of an operand (batch, heads, ...) that belong to a run of KV groups."""
    width = operand.shape[1] // slots
    return slice(run[0] * width, run[1] * width)


def _mask_of(mask: Tensor | None, samples: Part, heads: slice) -> Tensor | None:
    """A mask's part for some samples and heads; a single row serves all."""
    if mask is None or mask.ndim < 4:
        return mask
    mask = mask[samples] if mask.shape[0] > 1 else mask
    return mask[:, heads] if mask.shape[1] > 1 else mask
