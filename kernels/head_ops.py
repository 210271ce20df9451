"""Attention in two halves, as torch custom ops: stock code between them keeps its own cache.

A model's own code rotates queries and keys and updates its KV cache between projection and
attention. Every head therefore stays where stock code expects it, and heads that do not survive are
zeros: caches keep their stock layout, and nothing in between needs rewriting.
`planner.kernels.ops.attention` is the whole block, for those who keep a packed cache of their own.

Enters: activations, stock weights, surviving KV groups as tensors. Leaves: queries, keys and values
(`project_heads`), or the block's output (`attend_heads`). CUDA tensors run Triton kernels, all
others PyTorch on sliced weights; backward is PyTorch everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from planner.kernels import heads
from planner.kernels.library import backend
from planner.kernels.records import Survivors

__all__ = ["attend_heads", "project_heads"]

# Biases of those weights that have one; a list with gaps would have no gradients.
PROJECT = """Tensor hidden, Tensor[] weights, Tensor[] biases, bool[] biased, Tensor units,
    Tensor counts"""
ATTEND = """Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor output, Tensor units,
    Tensor counts, float scale, bool causal"""


def project_heads(
    hidden: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    survivors: Survivors,
) -> list[Tensor]:
    """Linear layers over the rows of surviving KV groups. Differentiable in all but survivors.

    Args:
        hidden: (batch, tokens, hidden).
        weights: (out, hidden) each, in which KV group g has rows ``g * width`` to
            ``(g + 1) * width``, width = out / groups.
        biases: (out,) or None, for each weight.
        survivors: surviving KV groups, of `slots` in all; one plan, or one per sample.

    Returns:
        (batch, tokens, out) for each weight; features of groups that do not survive are 0.

    Raises:
        InputError: neither one plan nor as many as samples.
    """
    present = [bias for bias in biases if bias is not None]
    biased = [bias is not None for bias in biases]
    results: list[Tensor] = torch.ops.planner.project_heads(
        hidden, weights, present, biased, survivors.units, survivors.counts
    )
    return results


def attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    survivors: Survivors,
    *,
    scale: float,
    causal: bool = False,
) -> Tensor:
    """Attention over surviving heads, and its output projection.

    ``concat(softmax(scale * q k^T + mask) v) @ output.T``; differentiable in query, key, value and
    output, not in mask.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, kv_heads, keys, head_dim), kv_heads a multiple of the groups.
        value: (batch, kv_heads, keys, value_dim).
        mask: bool (True is seen) or added to the scores, broadcast to (batch, heads, tokens, keys).
        output: (hidden, heads * value_dim).
        survivors: surviving KV groups, of `slots` in all; one plan, or one per sample.
        scale: factor on q k^T.
        causal: token i sees keys 0 to i; as in ``F.scaled_dot_product_attention``, without a mask.

    Returns:
        (batch, tokens, hidden).

    Raises:
        InputError: neither one plan nor as many as samples.
    """
    result: Tensor = torch.ops.planner.attend_heads(
        query, key, value, mask, output, survivors.units, survivors.counts, scale, causal
    )
    return result


@torch.library.custom_op(
    "planner::project_heads", mutates_args=(), schema=f"({PROJECT}) -> Tensor[]"
)
def _project(
    hidden: Tensor, weights: Any, biases: Any, biased: Any, units: Tensor, counts: Tensor
) -> list[Tensor]:
    present = iter(biases)
    every = [next(present) if has else None for has in biased]
    survivors = Survivors(units, counts)
    survivors.require(len(hidden))
    outputs: list[Tensor] = backend(hidden, heads).project_heads(hidden, weights, every, survivors)
    return outputs


@_project.register_fake
def _(hidden: Tensor, weights: Any, *rest: Any) -> list[Tensor]:
    return [hidden.new_empty(*hidden.shape[:-1], weight.shape[0]) for weight in weights]


@torch.library.custom_op(
    "planner::project_heads_backward",
    mutates_args=(),
    schema="(Tensor[] gradients, Tensor hidden, Tensor[] weights, Tensor units, Tensor counts,"
    " bool weighted) -> Tensor[]",
)
def _project_backward(
    gradients: Any, hidden: Tensor, weights: Any, units: Tensor, counts: Tensor, weighted: bool
) -> list[Tensor]:
    survivors = Survivors(units, counts)
    return heads.project_heads_backward(gradients, hidden, weights, survivors, weighted)


@_project_backward.register_fake
def _(
    gradients: Any, hidden: Tensor, weights: Any, units: Any, counts: Any, weighted: bool
) -> list[Tensor]:
    parameters = [torch.empty_like(w) for w in weights] + [w.new_empty(w.shape[0]) for w in weights]
    return [torch.empty_like(hidden), *(parameters if weighted else [])]


def _remember_projection(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weights, biases, biased, units, counts = inputs
    ctx.save_for_backward(hidden, units, counts, *weights)
    ctx.biased = list(biased)
    ctx.weighted = any(tensor.requires_grad for tensor in (*weights, *biases))


def _pull_projection(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    hidden, units, counts, *weights = ctx.saved_tensors
    found = torch.ops.planner.project_heads_backward(
        list(gradients), hidden, weights, units, counts, ctx.weighted
    )
    count = len(weights)
    d_weights = found[1 : 1 + count] if ctx.weighted else [None] * count
    d_biases = found[1 + count :] if ctx.weighted else [None] * count
    chosen = [d for d, has in zip(d_biases, ctx.biased, strict=True) if has]
    return found[0], d_weights, chosen, None, None, None


_project.register_autograd(_pull_projection, setup_context=_remember_projection)


@torch.library.custom_op("planner::attend_heads", mutates_args=(), schema=f"({ATTEND}) -> Tensor")
def _attend(*inputs: Any) -> Tensor:
    query, key, value, mask, output, units, counts, scale, causal = inputs
    survivors = Survivors(units, counts)
    survivors.require(len(query))
    result: Tensor = backend(query, heads).attend_heads(
        query, key, value, mask, output, survivors, scale=scale, causal=causal
    )
    return result


@_attend.register_fake
def _(query: Tensor, key: Any, value: Any, mask: Any, output: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], output.shape[0])


@torch.library.custom_op(
    "planner::attend_heads_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, {ATTEND}) -> Tensor[]",
)
def _attend_backward(*inputs: Any) -> list[Tensor]:
    gradient, query, key, value, mask, output, units, counts, scale, causal = inputs
    survivors = Survivors(units, counts)
    return heads.attend_heads_backward(
        gradient, query, key, value, mask, output, survivors, scale=scale, causal=causal
    )


@_attend_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Any, output: Tensor,
      *rest: Any) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(tensor) for tensor in (query, key, value, output)]


def _remember_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, scale, causal = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale, ctx.causal = scale, causal


def _pull_attention(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    query, key, value, mask, output, units, counts = ctx.saved_tensors
    d_query, d_key, d_value, d_output = torch.ops.planner.attend_heads_backward(
        gradient, query, key, value, mask, output, units, counts, ctx.scale, ctx.causal
    )
    return d_query, d_key, d_value, None, d_output, None, None, None, None


_attend.register_autograd(_pull_attention, setup_context=_remember_attention)
