"""Blocks as torch custom ops, namespace ``planner``: one operator in the graph, same shape out.

This is the face of the folder. Enters: activations, a block's stock weights, and the units of it
that survive. Leaves: the block's output, computed from those units alone. Survivors are tensors, so
another plan or budget neither recompiles nor breaks a graph, and samples of one batch may carry
different plans. CUDA tensors run Triton kernels, all others PyTorch on sliced weights. Imports
nothing of planner but its errors.

The functions here take the records of `planner.kernels.records`; the ops beneath take what is in
them, one by one, as an op's schema must.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planner.kernels.library import pack_attention, pack_mlp
from planner.kernels.records import AttentionWeights, KVCache, MLPWeights, Survivors

__all__ = ["attention", "attention_cached", "merge_tokens", "mlp", "select_tokens"]


def mlp(
    hidden: Tensor, weights: MLPWeights, survivors: Survivors, residual: Tensor | None = None
) -> Tensor:
    """An MLP block over surviving neurons.

    ``residual + down(act(gate(n)) * up(n))`` with n = norm(hidden). Differentiable in hidden,
    residual and all weights.

    Args:
        hidden: (batch, tokens, hidden).
        weights: the block's, stock; read in place.
        survivors: surviving neurons, in units of `neuron_width`; one plan, or one per sample.
        residual: (batch, tokens, hidden) added to the result, or None.

    Returns:
        (batch, tokens, hidden).

    Raises:
        InputError: neither one plan nor as many as samples.
    """
    survivors.require(len(hidden))
    packed = pack_mlp(hidden, weights, survivors, residual)
    result: Tensor = torch.ops.planner.mlp(*packed)
    return result


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
) -> Tensor:
    """An attention block over surviving KV groups, without a cache.

    ``residual + output(attend(rotate(headnorm(qkv(norm(hidden))))))``. Differentiable in hidden,
    residual and all weights.

    Args:
        hidden: (batch, tokens, hidden).
        weights: the block's, stock; read in place.
        survivors: surviving KV groups; one plan, or one per sample.
        angles: cosines and sines of the rotary embedding, (batch or 1, tokens, lanes) each, the
            second half of the lanes repeating the first; None for no rotation.
        positions: (batch, tokens) int32: places in the sequence before tokens were dropped;
            negative for padding, which neither sees nor is seen.
        residual: (batch, tokens, hidden) added to the result, or None.
        causal: whether tokens at later positions are hidden.
        window: how far back a token sees, itself included; None for all the way. Causal only.

    Returns:
        (batch, tokens, hidden).

    Raises:
        InputError: neither one plan nor as many as samples.
    """
    survivors.require(len(hidden))
    packed = pack_attention(hidden, weights, survivors, angles, positions, residual, causal, window)
    result: Tensor = torch.ops.planner.attention(*packed)
    return result


def attention_cached(
    hidden: Tensor,
    weights: AttentionWeights,
    survivors: Survivors,
    angles: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    cache: KVCache,
    key_positions: Tensor,
    residual: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """`attention` over what a cache holds and this call's tokens, which are appended to it.

    Keys and values are written behind ``cache.lengths``; advancing the lengths is the caller's,
    after the call. Not differentiable.

    Args:
        hidden, weights, survivors, angles, positions, residual, causal, window: as in `attention`.
        cache: keys and values of the surviving groups.
        key_positions: (batch, keys) int32: positions of everything in the cache after this call,
            at least ``max(lengths) + tokens`` wide, negative for padding.

    Returns:
        (batch, tokens, hidden).

    Raises:
        InputError: neither one plan nor as many as samples.
    """
    survivors.require(len(hidden))
    packed = pack_attention(hidden, weights, survivors, angles, positions, residual, causal, window)
    stored = (cache.keys, cache.values, cache.first, cache.room, cache.lengths)
    result: Tensor = torch.ops.planner.attention_cached(*packed, *stored, key_positions)
    return result


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
    """Keep the candidate tokens that the last query attends to most (FastV, arXiv 2403.06764).

    A token's score is the attention the given queries pay it, averaged over surviving heads; of
    equal scores the earlier token wins. Tokens that are no candidates stay, padding goes, order is
    kept. Differentiable in hidden.

    Args:
        hidden: (batch, tokens, hidden).
        queries: (batch, slots * group, head_dim): the last token's, rotated.
        cache: keys of the same layer, token t of a sample in row t of each group.
        survivors: surviving KV groups of that layer; one plan, or one per sample.
        positions: (batch, tokens) int32, negative for padding.
        candidates: (batch, tokens) bool: the tokens that compete, image tokens for FastV.
        keep: (batch,) int32: candidates to keep.
        length: tokens per sample of the result; the most that any sample keeps.
        scale: factor on q k^T.

    Returns:
        hidden, (batch, length, hidden), and the kept tokens' indices, (batch, length) int32. A
        sample that keeps fewer is padded on the left with zeros, index -1.

    Raises:
        InputError: neither one plan nor as many as samples.
    """
    survivors.require(len(hidden))
    result: tuple[Tensor, Tensor] = torch.ops.planner.select_tokens(
        hidden,
        queries,
        cache.keys,
        cache.first,
        cache.room,
        survivors.units,
        survivors.counts,
        positions,
        candidates,
        keep,
        length,
        scale,
    )
    return result


def merge_tokens(hidden: Tensor, target: Tensor, weight: Tensor, length: int) -> Tensor:
    """Weighted means of tokens (ToMe, arXiv 2210.09461, section 3). Differentiable in hidden.

    Args:
        hidden: (batch, tokens, hidden).
        target: (batch, tokens) int32: row of the result that a token goes into; negative for none.
        weight: (batch, tokens) float32, not negative.
        length: rows of the result.

    Returns:
        (batch, length, hidden); a row that no token goes into is 0.
    """
    result: Tensor = torch.ops.planner.merge_tokens(hidden, target, weight, length)
    return result
