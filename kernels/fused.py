"""Whole blocks as a chain of Triton kernels: the CUDA side of the custom ops.

CPU tensors run through the interpreter (see `planner.kernels.launch`), which is how these chains
are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from planner.ir.errors import InputError
from planner.kernels import heads
from planner.kernels.decode import decode
from planner.kernels.mlp import project_up
from planner.kernels.output import project_out
from planner.kernels.prefill import attend
from planner.kernels.qkv import project_in_place, project_qkv
from planner.kernels.records import AttentionWeights, KVCache, MLPWeights, Survivors
from planner.kernels.stock import attend_stock
from planner.kernels.tokens import choose_tokens, gather_tokens, merge_tokens, score_tokens

__all__ = [
    "attend_heads",
    "attention",
    "merge_tokens",
    "mlp",
    "project_heads",
    "select_tokens",
]


def _require_rows(*weights: Tensor | None) -> None:
    if any(weight is not None and not weight.is_contiguous() for weight in weights):
        raise InputError("Kernels read weights as nn.Linear stores them; one of these is strided.")


def mlp(
    hidden: Tensor, weights: MLPWeights, survivors: Survivors, residual: Tensor | None = None
) -> Tensor:
    """The MLP block over surviving neurons; arguments and result as `naive.mlp`."""
    _require_rows(weights.up, weights.gate, weights.down)
    shape = hidden.shape
    # One plan for the batch: all its rows are one product.
    rows = hidden.contiguous().view(survivors.plans, -1, shape[-1])
    inner = project_up(rows, weights, survivors)
    if residual is not None:
        residual = residual.contiguous().view(survivors.plans, rows.shape[1], -1)
    out = project_out(inner, weights.down, weights.down_bias, residual, survivors, survivors.width)
    return out.view(*shape[:-1], -1)


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
    """The attention block over surviving KV groups; as `naive.attention`, with a cache besides.

    Args:
        hidden: (batch, tokens, hidden).
        weights: the block's.
        survivors: surviving KV groups; one plan, or one per sample.
        angles: cosines and sines, (batch or 1, tokens, rotary lanes), or None.
        positions: (batch, tokens) int32, negative for padding.
        residual: added to the result, or None.
        causal: whether later positions are hidden.
        window: how far back a query sees, itself included; None for all the way.
        cache: receives this call's keys and values, which attend to what it holds already.
        key_positions: with a cache: (batch, keys) int32, of everything in it after this call.

    Returns:
        (batch, tokens, hidden).
    """
    _require_rows(weights.query, weights.key, weights.value, weights.output)
    hidden = hidden.contiguous()
    batch, tokens, _ = hidden.shape
    if cache is None or key_positions is None:
        cache = KVCache.regular(batch, survivors.slots, tokens, weights.head_dim, hidden)
        key_positions = positions
    queries = project_qkv(hidden, weights, survivors, angles, cache)
    attend_to = decode if tokens == 1 else attend
    mixed = attend_to(
        queries,
        cache,
        survivors,
        positions,
        key_positions,
        scale=weights.softmax_scale,
        causal=causal,
        window=window,
    )
    plans = survivors.plans
    if residual is not None:
        residual = residual.contiguous().view(plans, batch * tokens // plans, -1)
    out = project_out(
        mixed.view(plans, batch * tokens // plans, -1),
        weights.output,
        weights.output_bias,
        residual,
        survivors,
        weights.group * weights.head_dim,
    )
    return out.view(batch, tokens, -1)


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
    scores = score_tokens(queries, cache, survivors, positions, scale=scale)
    index = choose_tokens(scores, candidates, positions, keep, length, survivors.counts)
    return gather_tokens(hidden, index), index


def project_heads(
    hidden: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    survivors: Survivors,
) -> list[Tensor]:
    """Arguments and result as `head_ops.project_heads`.

    Groups of an odd number of features go through PyTorch, which waits for the device.
    """
    if any(weight.shape[0] // survivors.slots % 2 for weight in weights):
        return heads.project_heads(hidden, weights, biases, survivors)
    _require_rows(*weights)
    outputs = [hidden.new_empty(*hidden.shape[:-1], w.shape[0]) for w in weights]
    rows = [w.shape[0] for w in weights]
    # Queries, keys and values in one launch, which fills the GPU better than three.
    together = len(rows) == 3 and rows[1] == rows[2] and rows[0] % rows[1] == 0
    step = 3 if together else 1
    for start in range(0, len(rows), step):
        few = slice(start, start + step)
        project_in_place(hidden.contiguous(), weights[few], biases[few], survivors, outputs[few])
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
    """Arguments and result as `head_ops.attend_heads`.

    Values that are not as wide as keys go through PyTorch, which waits for the device.
    """
    if value.shape[-1] != query.shape[-1]:
        return heads.attend_heads(
            query, key, value, mask, output, survivors, scale=scale, causal=causal
        )
    _require_rows(output)
    batch, count, tokens, head_dim = query.shape
    mixed = attend_stock(query, key, value, mask, survivors, scale=scale, causal=causal)
    rows = mixed.view(survivors.plans, batch * tokens // survivors.plans, -1)
    width = count // survivors.slots * head_dim
    return project_out(rows, output, None, None, survivors, width).view(batch, tokens, -1)
