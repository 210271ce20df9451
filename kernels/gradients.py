"""Backward of the blocks: recomputed on gathered weights, so only survivors get or cost anything.

Plain formulas rather than a second autograd inside an operator: they run wherever the operators do,
under dispatch modes, tracing and compilation alike. Products are in the inputs' dtype, norms and
softmax in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from planner.kernels.naive import ACTIVATIONS, apply_norm, rotate, visible
from planner.kernels.records import AttentionWeights, MLPWeights, Norm, Survivors
from planner.kernels.sliced import angles_of, features, plan_groups, rows_of

__all__ = ["attention", "mlp"]

aten = torch.ops.aten

ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": aten.silu_backward,
    "gelu": aten.gelu_backward,
    "gelu_pytorch_tanh": lambda d, x: aten.gelu_backward(d, x, approximate="tanh"),
    "quick_gelu": lambda d, x: d * _quick_gelu_slope(x),
    "relu": lambda d, x: d * (x > 0),
}


def _quick_gelu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * x)
    return gate + 1.702 * x * gate * (1 - gate)


class Gradients:
    """Sums of the wanted gradients, each of its tensor's size; the others are not computed."""

    def __init__(self, tensors: dict[str, Tensor | None], wanted: Collection[str]):
        chosen = {name: tensor for name, tensor in tensors.items() if name in wanted}
        self.sums = {name: torch.zeros_like(t) for name, t in chosen.items() if t is not None}

    def linear(self, name: str, rows: Tensor, d: Tensor, x: Tensor) -> None:
        """Add what ``x @ weight[rows].T + bias[rows]`` sends back, given its gradient `d`."""
        if name in self.sums:
            self.sums[name][rows] += d.T @ x
        if f"{name}_bias" in self.sums:
            self.sums[f"{name}_bias"][rows] += d.sum(dim=0)

    def output(self, name: str, columns: Tensor, d: Tensor, x: Tensor) -> None:
        """Add what ``x @ weight[:, columns].T + bias`` sends back, given its gradient `d`."""
        if name in self.sums:
            self.sums[name][:, columns] += d.T @ x
        if f"{name}_bias" in self.sums:
            self.sums[f"{name}_bias"] += d.sum(dim=0)

    def norm(self, weight: str, bias: str, d: Tensor, x: Tensor, norm: Norm) -> Tensor:
        """Add what a norm sends back to its weight and bias; return what it sends to its input."""
        wide = x.float() if x.dtype.itemsize == 2 else x
        if norm.kind == "layer":
            wide = wide - wide.mean(dim=-1, keepdim=True)
        inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.eps)
        unit = wide * inverse
        rows = tuple(range(d.ndim - 1))
        if weight in self.sums:
            self.sums[weight] += (d * unit).sum(dim=rows)
        if bias in self.sums:
            self.sums[bias] += d.sum(dim=rows)
        scaled = d * (norm.weight + norm.offset)
        back = scaled - unit * (scaled * unit).mean(dim=-1, keepdim=True)
        if norm.kind == "layer":
            back = back - scaled.mean(dim=-1, keepdim=True)
        return (back * inverse).to(x.dtype)


def mlp(
    gradient: Tensor,
    hidden: Tensor,
    weights: MLPWeights,
    survivors: Survivors,
    wanted: Collection[str],
) -> dict[str, Tensor]:
    """Gradients of `naive.mlp`.

    Args:
        gradient: of the result, (batch, tokens, hidden).
        hidden: the block's input.
        weights: the block's.
        survivors: surviving neurons.
        wanted: names of tensors, as in the op's schema.

    Returns:
        The wanted gradients by name, each in its tensor's shape.
    """
    norm = weights.norm
    grads = Gradients(
        {
            "hidden": hidden,
            "up": weights.up,
            "down": weights.down,
            "gate": weights.gate,
            "up_bias": weights.up_bias,
            "down_bias": weights.down_bias,
            "gate_bias": weights.gate_bias,
            "norm_weight": None if norm is None else norm.weight,
            "norm_bias": None if norm is None else norm.bias,
        },
        wanted,
    )
    act, slope = ACTIVATIONS[weights.activation], ACTIVATION_GRADIENTS[weights.activation]
    for samples, kept in plan_groups(survivors):
        source = hidden[samples].flatten(end_dim=-2)
        x = apply_norm(source, norm)
        d_out = gradient[samples].flatten(end_dim=-2)
        d_inner = d_out @ weights.down[:, kept]
        up = rows_of(x, weights.up, weights.up_bias, kept)
        if weights.gate is None:
            inner = act(up)
            d_up = slope(d_inner, up)
            d_x = d_up @ weights.up[kept]
        else:
            gate = rows_of(x, weights.gate, weights.gate_bias, kept)
            inner = act(gate) * up
            d_up, d_gate = d_inner * act(gate), slope(d_inner * up, gate)
            d_x = d_up @ weights.up[kept] + d_gate @ weights.gate[kept]
            grads.linear("gate", kept, d_gate, x)
        grads.linear("up", kept, d_up, x)
        grads.output("down", kept, d_out, inner)
        if norm is not None:
            d_x = grads.norm("norm_weight", "norm_bias", d_x, source, norm)
        if "hidden" in grads.sums:
            grads.sums["hidden"][samples] = d_x.view_as(hidden[samples])
    return grads.sums


def attention(
    gradient: Tensor,
    hidden: Tensor,
    weights: AttentionWeights,
    survivors: Survivors,
    angles: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    wanted: Collection[str],
    *,
    causal: bool,
    window: int | None,
) -> dict[str, Tensor]:
    """Gradients of `naive.attention`; arguments as there, `gradient` and `wanted` as in `mlp`.

    The softmax is recomputed sample by sample: (heads, tokens, tokens) of memory at a time.
    """
    norm, head_dim, group = weights.norm, weights.head_dim, weights.group
    grads = Gradients(
        {
            "hidden": hidden,
            "query": weights.query,
            "key": weights.key,
            "value": weights.value,
            "output": weights.output,
            "query_bias": weights.query_bias,
            "key_bias": weights.key_bias,
            "value_bias": weights.value_bias,
            "output_bias": weights.output_bias,
            "query_norm": weights.query_norm,
            "key_norm": weights.key_norm,
            "norm_weight": None if norm is None else norm.weight,
            "norm_bias": None if norm is None else norm.bias,
        },
        wanted,
    )
    for samples, kept in plan_groups(survivors):
        query_rows, key_rows = features(kept, group * head_dim), features(kept, head_dim)
        source = hidden[samples]
        x = apply_norm(source, norm)
        turn = angles_of(angles, samples)
        back_turn = None if turn is None else (turn[0], -turn[1])
        projected = {}
        turned = {}
        for name, rows in (("query", query_rows), ("key", key_rows), ("value", key_rows)):
            weight, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
            heads = rows_of(x, weight, bias, rows).unflatten(-1, (-1, head_dim))
            projected[name] = heads
            head_norm = _head_norm(weights, name)
            heads = apply_norm(heads, head_norm)
            turned[name] = rotate(heads, *turn) if turn and name != "value" else heads
        d_out = gradient[samples]
        d_mixed = (d_out @ weights.output[:, query_rows]).unflatten(-1, (-1, head_dim))
        places = positions[samples]
        seen = visible(places, places, causal, window)
        mixed, *d_turned = _softmax_backward(
            turned["query"], turned["key"], turned["value"], seen, d_mixed, weights.softmax_scale
        )
        flat_x = x.flatten(end_dim=-2)
        d_x = torch.zeros_like(x)
        for name, d, rows in zip(turned, d_turned, (query_rows, key_rows, key_rows), strict=True):
            if back_turn and name != "value":
                d = rotate(d, *back_turn)
            head_norm = _head_norm(weights, name)
            if head_norm is not None:
                d = grads.norm(f"{name}_norm", "", d, projected[name], head_norm)
            d = d.flatten(start_dim=-2)
            grads.linear(name, rows, d.flatten(end_dim=-2), flat_x)
            d_x += d @ getattr(weights, name)[rows]
        flat_mixed = mixed.flatten(start_dim=-2).flatten(end_dim=-2)
        grads.output("output", query_rows, d_out.flatten(end_dim=-2), flat_mixed)
        if norm is not None:
            d_x = grads.norm("norm_weight", "norm_bias", d_x, source, norm)
        if "hidden" in grads.sums:
            grads.sums["hidden"][samples] = d_x
    return grads.sums


def _head_norm(weights: AttentionWeights, name: str) -> Norm | None:
    weight = {"query": weights.query_norm, "key": weights.key_norm}.get(name)
    if weight is None:
        return None
    return Norm(weight, eps=weights.head_norm_eps, offset=weights.head_norm_offset)


def _softmax_backward(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, d_mixed: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # (batch, tokens, heads, head_dim) each, seen (batch, tokens, tokens) -> mixed, dq, dk, dv.
    results = []
    for sample in range(len(q)):
        # (kv heads, group, tokens, head_dim); keys and values broadcast over the group.
        qs, ds = (
            t[sample].unflatten(1, (k.shape[2], -1)).permute(1, 2, 0, 3) for t in (q, d_mixed)
        )
        ks, vs = (t[sample].transpose(0, 1)[:, None] for t in (k, v))
        scores = (qs @ ks.transpose(-1, -2) * scale).masked_fill(~seen[sample], -torch.inf)
        share = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
        share = share.nan_to_num(0.0).to(q.dtype)
        d_share = ds @ vs.transpose(-1, -2)
        d_scores = share * (d_share - (d_share * share).sum(dim=-1, keepdim=True)) * scale
        grouped = [
            (share @ vs).permute(2, 0, 1, 3).flatten(1, 2),
            (d_scores @ ks).permute(2, 0, 1, 3).flatten(1, 2),
            (d_scores.transpose(-1, -2) @ qs).sum(dim=1).transpose(0, 1),
            (share.transpose(-1, -2) @ ds).sum(dim=1).transpose(0, 1),
        ]
        results.append(grouped)
    mixed, dq, dk, dv = (torch.stack(parts) for parts in zip(*results, strict=True))
    return mixed, dq, dk, dv
