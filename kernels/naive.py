"""The kernels' twins in plain PyTorch: the definition that tests compare against.

Written to be read, not to be fast: dense products in the inputs' dtype (float64 in tests), masks
and loops over samples. Same names and arguments as the kernels' launchers; what a launcher leaves
undefined is 0 here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from planner.kernels.records import AttentionWeights, KVCache, MLPWeights, Norm, Survivors

__all__ = [
    "ACTIVATIONS",
    "apply_norm",
    "attend",
    "attention",
    "choose_tokens",
    "gather_tokens",
    "merge_tokens",
    "mlp",
    "normalize",
    "project_out",
    "project_qkv",
    "project_up",
    "rotate",
    "score_tokens",
    "visible",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm or LayerNorm over the last axis, half precision in float32 inside."""
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    wide = x.float() if x.dtype.itemsize == 2 else x
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.eps)
    return (wide * inverse * (norm.offset + norm.weight)).to(x.dtype)


def apply_norm(x: Tensor, norm: Norm | None) -> Tensor:
    """The norm, where there is one."""
    return x if norm is None else normalize(x, norm)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    return F.linear(x, weight[rows], None if bias is None else bias[rows])


def _features(units: Tensor, width: int) -> Tensor:
    lanes = torch.arange(width, device=units.device)
    return (units.long()[:, None] * width + lanes).flatten()


def project_up(x: Tensor, weights: MLPWeights, survivors: Survivors) -> Tensor:
    """Activations of surviving neurons, packed to the left; (samples, rows, slots * width)."""
    samples, rows, _ = x.shape
    out = x.new_zeros(samples, rows, survivors.slots * survivors.width)
    act = ACTIVATIONS[weights.activation]
    for plan in range(samples):
        neurons = _features(survivors.units[plan, : survivors.counts[plan]], survivors.width)
        y = apply_norm(x[plan], weights.norm)
        up = _linear(y, weights.up, weights.up_bias, neurons)
        if weights.gate is None:
            hidden = act(up)
        else:
            hidden = act(_linear(y, weights.gate, weights.gate_bias, neurons)) * up
        out[plan, :, : len(neurons)] = hidden * torch.isin(neurons, survivors.kept(plan))
    return out


def project_out(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    survivors: Survivors,
    width: int,
) -> Tensor:
    """``residual + bias + a @ weight[:, surviving].T``; (samples, rows, features_out)."""
    out = []
    for plan in range(a.shape[0]):
        features = _features(survivors.units[plan, : survivors.counts[plan]], width)
        out.append(F.linear(a[plan, :, : len(features)], weight[:, features], bias))
    total = torch.stack(out)
    return total if residual is None else residual + total


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: x (..., tokens, heads, head_dim), cos and sin (..., tokens, lanes)."""
    half = cos.shape[-1] // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]
    one, other, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat([one * cos - other * sin, other * cos + one * sin, rest], dim=-1)
    return turned.to(x.dtype)


def _heads(
    x: Tensor,
    weights: AttentionWeights,
    units: Tensor,
    angles: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # One sample's q, k, v (tokens, heads, head_dim) for the given KV groups; x is normed.
    head_dim, group = weights.head_dim, weights.group
    query_rows, key_rows = _features(units, group * head_dim), _features(units, head_dim)
    q = _linear(x, weights.query, weights.query_bias, query_rows).unflatten(-1, (-1, head_dim))
    k = _linear(x, weights.key, weights.key_bias, key_rows).unflatten(-1, (-1, head_dim))
    v = _linear(x, weights.value, weights.value_bias, key_rows).unflatten(-1, (-1, head_dim))
    eps, offset = weights.head_norm_eps, weights.head_norm_offset
    if weights.query_norm is not None:
        q = normalize(q, Norm(weights.query_norm, eps=eps, offset=offset))
    if weights.key_norm is not None:
        k = normalize(k, Norm(weights.key_norm, eps=eps, offset=offset))
    if angles is not None:
        q, k = rotate(q, *angles), rotate(k, *angles)
    return q, k, v


def _angles_of(angles: tuple[Tensor, Tensor] | None, sample: int) -> tuple[Tensor, Tensor] | None:
    if angles is None:
        return None
    cos, sin = angles
    row = sample if cos.shape[0] > 1 else 0
    return cos[row], sin[row]


def _plan(survivors: Survivors, sample: int) -> tuple[int, int]:
    plan = sample if survivors.plans > 1 else 0
    return plan, int(survivors.counts[plan])


def project_qkv(
    x: Tensor,
    weights: AttentionWeights,
    survivors: Survivors,
    angles: tuple[Tensor, Tensor] | None,
    cache: KVCache,
) -> Tensor:
    """Queries (batch, tokens, slots * group, head_dim); keys and values go into the cache."""
    batch, tokens, _ = x.shape
    queries = x.new_zeros(batch, tokens, survivors.slots * weights.group, weights.head_dim)
    for sample in range(batch):
        plan, count = _plan(survivors, sample)
        units = survivors.units[plan, :count]
        normed = apply_norm(x[sample], weights.norm)
        q, k, v = _heads(normed, weights, units, _angles_of(angles, sample))
        queries[sample, :, : count * weights.group] = q
        held = int(cache.lengths[sample])
        for slot in range(count):
            rows = cache.rows(sample, slot, held + tokens)
            cache.keys[rows][held:] = k[:, slot]
            cache.values[rows][held:] = v[:, slot]
    return queries


def visible(positions: Tensor, key_positions: Tensor, causal: bool, window: int | None) -> Tensor:
    """Which keys each query sees: (..., queries, keys); negative positions are padding."""
    seen = (positions >= 0)[..., :, None] & (key_positions >= 0)[..., None, :]
    if causal:
        behind = positions[..., :, None] - key_positions[..., None, :]
        seen &= behind >= 0
        if window is not None:
            seen &= behind < window
    return seen


def _softmax(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    # (queries, head_dim), (keys, head_dim) -> (queries, keys); a query that sees nothing gets 0
    scores = (q @ k.T * scale).masked_fill(~seen, -torch.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0)


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
) -> Tensor:
    """Attention over the cache, this call's tokens included; shape of `queries`."""
    batch, tokens, heads, _ = queries.shape
    group = heads // survivors.slots
    out = torch.zeros_like(queries)
    for sample in range(batch):
        _, count = _plan(survivors, sample)
        held = int(cache.lengths[sample]) + tokens
        seen = visible(positions[sample], key_positions[sample, :held], causal, window)
        for head in range(count * group):
            rows = cache.rows(sample, head // group, held)
            share = _softmax(queries[sample, :, head], cache.keys[rows], seen, scale)
            out[sample, :, head] = share @ cache.values[rows]
    return out


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
    """The whole block, every head computed and the others masked; shape of `hidden`."""
    out = []
    for sample in range(hidden.shape[0]):
        plan, _ = _plan(survivors, sample)
        normed = apply_norm(hidden[sample], weights.norm)
        every = torch.arange(weights.kv_heads, device=hidden.device)
        q, k, v = _heads(normed, weights, every, _angles_of(angles, sample))
        seen = visible(positions[sample], positions[sample], causal, window)
        alive = set(survivors.kept(plan).tolist())
        heads = []
        for head in range(q.shape[1]):
            unit = head // weights.group
            share = _softmax(q[:, head], k[:, unit], seen, weights.softmax_scale)
            heads.append(share @ v[:, unit] * (unit in alive))
        out.append(F.linear(torch.cat(heads, dim=-1), weights.output, weights.output_bias))
    total = torch.stack(out)
    return total if residual is None else residual + total


def mlp(
    hidden: Tensor, weights: MLPWeights, survivors: Survivors, residual: Tensor | None = None
) -> Tensor:
    """The whole block, every neuron computed and the others masked; shape of `hidden`."""
    act = ACTIVATIONS[weights.activation]
    out = []
    for sample in range(hidden.shape[0]):
        plan, _ = _plan(survivors, sample)
        normed = apply_norm(hidden[sample], weights.norm)
        inner = F.linear(normed, weights.up, weights.up_bias)
        if weights.gate is None:
            inner = act(inner)
        else:
            inner = act(F.linear(normed, weights.gate, weights.gate_bias)) * inner
        mask = inner.new_zeros(inner.shape[-1])
        mask[survivors.kept(plan)] = 1
        out.append(F.linear(inner * mask, weights.down, weights.down_bias))
    total = torch.stack(out)
    return total if residual is None else residual + total


def score_tokens(
    queries: Tensor, cache: KVCache, survivors: Survivors, positions: Tensor, *, scale: float
) -> Tensor:
    """Attention the queries pay each token, summed over a group's heads; (batch, slots, tokens)."""
    batch, heads, _ = queries.shape
    group = heads // survivors.slots
    tokens = positions.shape[1]
    scores = queries.new_zeros(batch, survivors.slots, tokens)
    for sample in range(batch):
        _, count = _plan(survivors, sample)
        real = (positions[sample] >= 0)[None]
        for head in range(count * group):
            keys = cache.keys[cache.rows(sample, head // group, tokens)]
            share = _softmax(queries[sample, head][None], keys, real, scale)
            scores[sample, head // group] += share[0]
    return scores


def choose_tokens(
    scores: Tensor,
    candidates: Tensor,
    positions: Tensor,
    keep: Tensor,
    length: int,
    counts: Tensor | None = None,
) -> Tensor:
    """Everything but the worst candidates, in order, aligned to the right; (batch, length)."""
    batch, slots, _ = scores.shape
    index = torch.full((batch, length), -1, dtype=torch.int32)
    for sample in range(batch):
        rows = slots if counts is None else int(counts[sample if len(counts) > 1 else 0])
        score = scores[sample, :rows].sum(dim=0)
        real = positions[sample] >= 0
        competing = (candidates[sample] & real).nonzero().flatten()
        order = torch.argsort(score[competing], descending=True, stable=True)
        kept = real & ~candidates[sample]
        kept[competing[order[: int(keep[sample])]]] = True
        chosen = kept.nonzero().flatten()
        index[sample, length - len(chosen) :] = chosen.int()
    return index


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x by index; negative gives 0; (batch, length, width)."""
    rows = torch.take_along_dim(x, index.long().clamp(min=0)[:, :, None], dim=1)
    return rows * (index >= 0)[:, :, None]


def merge_tokens(x: Tensor, target: Tensor, weight: Tensor, length: int) -> Tensor:
    """Weighted means of tokens by target; nobody's target is 0; (batch, length, width)."""
    share = (target[:, None, :] == torch.arange(length, device=x.device)[None, :, None]) * weight[
        :, None, :
    ]
    total = share.sum(dim=-1, keepdim=True)
    return (share.to(x.dtype) @ x) / torch.where(total > 0, total, 1).to(x.dtype)
