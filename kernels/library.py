"""Registration of the custom ops: schemas, implementations by device, fakes and gradients.

An op's schema lists tensors and numbers one by one; `pack_*` and `_unpack_*` go between that and
the records of `planner.kernels.records`. Gradients are ops of their own, so that they are
as opaque to a compiler as the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from planner.kernels import gradients, sliced
from planner.kernels.records import AttentionWeights, KVCache, MLPWeights, Norm, Survivors

__all__ = ["backend", "pack_attention", "pack_mlp"]

MLP = """Tensor hidden, Tensor? residual, Tensor up, Tensor down, Tensor? gate, Tensor? up_bias,
    Tensor? down_bias, Tensor? gate_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor units,
    Tensor counts, Tensor? lanes, int width, str activation, str norm_kind, float norm_eps,
    float norm_offset"""
ATTENTION = """Tensor hidden, Tensor? residual, Tensor query, Tensor key, Tensor value,
    Tensor output, Tensor? query_bias, Tensor? key_bias, Tensor? value_bias, Tensor? output_bias,
    Tensor? query_norm, Tensor? key_norm, Tensor? norm_weight, Tensor? norm_bias, Tensor? cos,
    Tensor? sin, Tensor positions, Tensor units, Tensor counts, int head_dim, float scale,
    float head_norm_eps, float head_norm_offset, str norm_kind, float norm_eps,
    float norm_offset, bool causal, int? window"""
CACHE = """Tensor(a!) keys, Tensor(b!) values, Tensor first, Tensor room, Tensor lengths,
    Tensor key_positions"""
SELECT = """Tensor hidden, Tensor queries, Tensor keys, Tensor first, Tensor room, Tensor units,
    Tensor counts, Tensor positions, Tensor candidates, Tensor keep, SymInt length, float scale"""
MERGE = "Tensor hidden, Tensor target, Tensor weight, SymInt length"


def backend(tensor: Tensor, otherwise: Any = sliced) -> Any:
    """The module that computes ops on a tensor's device.

    Triton is not on every platform; there and on other devices PyTorch does the work.
    """
    return (_fused() or otherwise) if tensor.is_cuda else otherwise


@cache
def _fused() -> Any:
    return import_module("planner.kernels.fused") if find_spec("triton") else None


def _pack_norm(norm: Norm | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if norm is None:
        return (None, None), ("rms", 0.0, 0.0)
    return (norm.weight, norm.bias), (norm.kind, norm.eps, norm.offset)


def _unpack_norm(weight: Tensor | None, bias: Tensor | None, facts: list[Any]) -> Norm | None:
    return None if weight is None else Norm(weight, bias, *facts)


def pack_mlp(
    hidden: Tensor, weights: MLPWeights, survivors: Survivors, residual: Tensor | None
) -> tuple[Any, ...]:
    """Arguments of ``planner::mlp``, in the order of its schema."""
    tensors, facts = _pack_norm(weights.norm)
    return (
        hidden,
        residual,
        weights.up,
        weights.down,
        weights.gate,
        weights.up_bias,
        weights.down_bias,
        weights.gate_bias,
        *tensors,
        survivors.units,
        survivors.counts,
        survivors.lanes,
        survivors.width,
        weights.activation,
        *facts,
    )


def _unpack_mlp(inputs: Sequence[Any]) -> tuple[Tensor, MLPWeights, Survivors, Tensor | None]:
    hidden, residual, up, down, gate, up_bias, down_bias, gate_bias, *rest = inputs
    norm_weight, norm_bias, units, counts, lanes, width, activation, *facts = rest
    norm = _unpack_norm(norm_weight, norm_bias, facts)
    weights = MLPWeights(up, down, gate, activation, up_bias, down_bias, gate_bias, norm)
    return hidden, weights, Survivors(units, counts, width, lanes), residual


def pack_attention(
    hidden: Tensor,
    weights: AttentionWeights,
    survivors: Survivors,
    angles: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    residual: Tensor | None,
    causal: bool,
    window: int | None,
) -> tuple[Any, ...]:
    """Arguments of ``planner::attention``, in the order of its schema."""
    tensors, facts = _pack_norm(weights.norm)
    return (
        hidden,
        residual,
        weights.query,
        weights.key,
        weights.value,
        weights.output,
        weights.query_bias,
        weights.key_bias,
        weights.value_bias,
        weights.output_bias,
        weights.query_norm,
        weights.key_norm,
        *tensors,
        *(angles or (None, None)),
        positions,
        survivors.units,
        survivors.counts,
        weights.head_dim,
        weights.softmax_scale,
        weights.head_norm_eps,
        weights.head_norm_offset,
        *facts,
        causal,
        window,
    )


def _unpack_attention(inputs: Sequence[Any]) -> dict[str, Any]:
    hidden, residual, query, key, value, output, *rest = inputs
    query_bias, key_bias, value_bias, output_bias, query_norm, key_norm, *rest = rest
    norm_weight, norm_bias, cos, sin, positions, units, counts, head_dim, *rest = rest
    scale, eps, offset, *facts, causal, window = rest
    weights = AttentionWeights(
        query,
        key,
        value,
        output,
        head_dim,
        scale,
        query_bias,
        key_bias,
        value_bias,
        output_bias,
        query_norm,
        key_norm,
        eps,
        offset,
        _unpack_norm(norm_weight, norm_bias, facts),
    )
    return {
        "hidden": hidden,
        "weights": weights,
        "survivors": Survivors(units, counts),
        "angles": None if cos is None else (cos, sin),
        "positions": positions,
        "residual": residual,
        "causal": causal,
        "window": window,
    }


def _mlp(*inputs: Any) -> Tensor:
    out: Tensor = backend(inputs[0]).mlp(*_unpack_mlp(inputs))
    return out


def _mlp_backward(gradient: Tensor, wanted: list[str], inputs: Sequence[Any]) -> dict[str, Tensor]:
    hidden, weights, survivors, _ = _unpack_mlp(inputs)
    return gradients.mlp(gradient, hidden, weights, survivors, wanted)


def _attention(*inputs: Any) -> Tensor:
    out: Tensor = backend(inputs[0]).attention(**_unpack_attention(inputs))
    return out


def _attention_backward(
    gradient: Tensor, wanted: list[str], inputs: Sequence[Any]
) -> dict[str, Tensor]:
    arguments = _unpack_attention(inputs)
    del arguments["residual"]
    return gradients.attention(gradient, wanted=wanted, **arguments)


def _register_block(
    name: str,
    schema: str,
    forward: Callable[..., Tensor],
    backward: Callable[[Tensor, list[str], Sequence[Any]], dict[str, Tensor]],
    output: int,
) -> None:
    """Register ``planner::name`` and its backward.

    Input 1 is the residual, whose gradient is the result's; input `output` is the weight whose rows
    are the result's features.
    """
    operator = torch.library.custom_op(
        f"planner::{name}", forward, mutates_args=(), schema=f"({schema}) -> Tensor"
    )
    names = [argument.name for argument in operator._opoverload._schema.arguments]
    constant = {index for index, name in enumerate(names) if name in ("cos", "sin")}

    def pull_back(gradient: Tensor, needed: list[int], *inputs: Any) -> list[Tensor]:
        wanted = [names[index] for index in needed]
        parts = backward(gradient, wanted, inputs)
        return [parts[name] for name in wanted]

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors = [value if isinstance(value, Tensor) else None for value in inputs]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def pull(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [
            other if tensor is None else tensor
            for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        ]
        results: list[Tensor | None] = [None] * len(inputs)
        needed = [i for i, need in enumerate(ctx.needs_input_grad) if need and i not in constant]
        if 1 in needed:
            results[1] = gradient
            needed.remove(1)
        if needed:
            parts = getattr(torch.ops.planner, f"{name}_backward")(gradient, needed, *inputs)
            for index, part in zip(needed, parts, strict=True):
                results[index] = part
        return tuple(results)

    operator.register_fake(
        lambda *inputs: inputs[0].new_empty(*inputs[0].shape[:-1], inputs[output].shape[0])
    )
    operator.register_autograd(pull, setup_context=remember)
    torch.library.custom_op(
        f"planner::{name}_backward",
        pull_back,
        mutates_args=(),
        schema=f"(Tensor gradient, int[] needed, {schema}) -> Tensor[]",
    ).register_fake(
        lambda gradient, needed, *inputs: [torch.empty_like(inputs[index]) for index in needed]
    )


_register_block("mlp", MLP, _mlp, _mlp_backward, output=3)
_register_block("attention", ATTENTION, _attention, _attention_backward, output=5)


@torch.library.custom_op(
    "planner::attention_cached",
    mutates_args=("keys", "values"),
    schema=f"({ATTENTION}, {CACHE}) -> Tensor",
)
def _attention_cached(*inputs: Any) -> Tensor:
    *block, keys, values, first, room, lengths, key_positions = inputs
    cache = KVCache(keys, values, first, room, lengths)
    out: Tensor = backend(inputs[0]).attention(
        **_unpack_attention(block), cache=cache, key_positions=key_positions
    )
    return out


@_attention_cached.register_fake
def _(*inputs: Any) -> Tensor:
    hidden: Tensor = inputs[0]
    return hidden.new_empty(*hidden.shape[:-1], inputs[5].shape[0])


@torch.library.custom_op(
    "planner::select_tokens", mutates_args=(), schema=f"({SELECT}) -> (Tensor, Tensor)"
)
def _select_tokens(*inputs: Any) -> tuple[Tensor, Tensor]:
    hidden, queries, keys, first, room, units, counts, *rest, length, scale = inputs
    cache = KVCache(keys, keys, first, room, torch.zeros_like(first))
    rows: tuple[Tensor, Tensor] = backend(hidden).select_tokens(
        hidden, queries, cache, Survivors(units, counts), *rest, length, scale=scale
    )
    return rows


@_select_tokens.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    hidden, length = inputs[0], inputs[-2]
    batch, _, width = hidden.shape
    return hidden.new_empty(batch, length, width), hidden.new_empty(
        batch, length, dtype=torch.int32
    )


def _remember_choice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.tokens, ctx.inputs = inputs[0].shape[1], len(inputs)
    ctx.mark_non_differentiable(output[1])


def _pull_gather(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    whole = gradient.new_zeros(gradient.shape[0], ctx.tokens, gradient.shape[2])
    gradient = gradient * (index >= 0)[:, :, None]
    place = index.long().clamp(min=0)[:, :, None].expand_as(gradient)
    return (whole.scatter_add(1, place, gradient), *[None] * (ctx.inputs - 1))


_select_tokens.register_autograd(_pull_gather, setup_context=_remember_choice)


@torch.library.custom_op("planner::merge_tokens", mutates_args=(), schema=f"({MERGE}) -> Tensor")
def _merge_tokens(hidden: Tensor, target: Tensor, weight: Tensor, length: int) -> Tensor:
    rows: Tensor = backend(hidden).merge_tokens(hidden, target, weight, length)
    return rows


@_merge_tokens.register_fake
def _(hidden: Tensor, target: Tensor, weight: Tensor, length: int) -> Tensor:
    return hidden.new_empty(hidden.shape[0], length, hidden.shape[2])


def _remember_targets(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _pull_merge(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    target, weight = ctx.saved_tensors
    share = sliced.merge_shares(target, weight, gradient.shape[1]).to(gradient.dtype)
    place = target.long().clamp(min=0)[:, :, None].expand(-1, -1, gradient.shape[2])
    return gradient.gather(1, place) * share[:, :, None], None, None, None


_merge_tokens.register_autograd(_pull_merge, setup_context=_remember_targets)
