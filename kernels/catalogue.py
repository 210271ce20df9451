"""Every kernel at the shapes of LLaVA-1.5-7B, as launches to compile.

Enters: a target. Leaves: named launches, made by running on meta tensors a decoder layer (prefill
of 640 tokens, one decode step), the two halves of its attention in stock layouts, token selection,
and a vision layer (CLIP ViT-L/14-336).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from planner.kernels import fused
from planner.kernels.launch import Launch, recorded
from planner.kernels.records import AttentionWeights, KVCache, MLPWeights, Norm, Survivors
from planner.kernels.stock import attend_stock
from planner.kernels.tiles import Target

__all__ = ["catalogue", "decoder_layer"]

HIDDEN, HEADS, HEAD_DIM, NEURONS = 4096, 32, 128, 11008
PROMPT, CACHED, SELECTED = 640, 1024, 352
VISION_HIDDEN, VISION_HEADS, VISION_NEURONS, PATCHES = 1024, 16, 4096, 577


def catalogue(target: Target, dtype: torch.dtype = torch.bfloat16) -> dict[str, Launch]:
    """Launches by name: ``prefill/project_qkv_kernel``, ``decode/attend_split_kernel``, ..."""
    parts: dict[str, Callable[[torch.dtype], None]] = {
        "prefill": lambda dtype: decoder_layer(dtype, PROMPT),
        "decode": lambda dtype: decoder_layer(dtype, 1),
        "stock prefill": lambda dtype: _stock_halves(dtype, PROMPT, PROMPT),
        "stock decode": lambda dtype: _stock_halves(dtype, 1, CACHED),
        "tokens": _token_selection,
        "vision": _vision_layer,
    }
    named: dict[str, Launch] = {}
    for part, run in parts.items():
        with recorded(target) as launches:
            run(dtype)
        for launch in launches:
            name = f"{part}/{launch.kernel.fn.__name__}"
            known = sum(n == name or n.startswith(f"{name} ") for n in named)
            named[f"{name} {known + 1}" if known else name] = launch
    return named


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _index(*shape: int) -> Tensor:
    return _meta(torch.int32, *shape)


def _heads_and_cache(dtype: torch.dtype) -> tuple[Survivors, KVCache]:
    store = _meta(dtype, HEADS * CACHED, HEAD_DIM)
    return Survivors(_index(1, HEADS), _index(1)), KVCache(store, store, *[_index(1)] * 3)


def decoder_layer(dtype: torch.dtype, tokens: int) -> None:
    """Run attention and MLP of one decoder layer on meta tensors, inside `launch.recorded`."""
    hidden = _meta(dtype, 1, tokens, HIDDEN)
    norm = Norm(_meta(dtype, HIDDEN))
    square = _meta(dtype, HIDDEN, HIDDEN)
    attention = AttentionWeights(square, square, square, square, HEAD_DIM, norm=norm)
    up, down = _meta(dtype, NEURONS, HIDDEN), _meta(dtype, HIDDEN, NEURONS)
    mlp = MLPWeights(up, down, gate=up, norm=norm)
    heads, cache = _heads_and_cache(dtype)
    fused.attention(
        hidden,
        attention,
        heads,
        (_meta(dtype, 1, tokens, HEAD_DIM),) * 2,
        _index(1, tokens),
        hidden,
        cache=cache,
        key_positions=_index(1, CACHED),
    )
    fused.mlp(hidden, mlp, Survivors(_index(1, NEURONS // 8), _index(1), 8), hidden)


def _stock_halves(dtype: torch.dtype, tokens: int, keys: int) -> None:
    """What `planner.kernels.head_ops` runs, without a mask and with one."""
    survivors = Survivors(_index(1, HEADS), _index(1))
    square = _meta(dtype, HIDDEN, HIDDEN)
    fused.project_heads(_meta(dtype, 1, tokens, HIDDEN), [square] * 3, [None] * 3, survivors)
    query = _meta(dtype, 1, tokens, HEADS, HEAD_DIM).transpose(1, 2)
    cached = _meta(dtype, 1, HEADS, keys, HEAD_DIM)
    operands = (query, cached, cached)
    causal = tokens > 1
    fused.attend_heads(*operands, None, square, survivors, scale=1.0, causal=causal)
    mask = _meta(torch.bool, 1, 1, tokens, keys)
    attend_stock(*operands, mask, survivors, scale=1.0, causal=False)


def _token_selection(dtype: torch.dtype) -> None:
    hidden = _meta(dtype, 1, PROMPT, HIDDEN)
    heads, cache = _heads_and_cache(dtype)
    fused.select_tokens(
        hidden,
        _meta(dtype, 1, HEADS, HEAD_DIM),
        cache,
        heads,
        _index(1, PROMPT),
        _meta(torch.bool, 1, PROMPT),
        _index(1),
        SELECTED,
        scale=1.0,
    )
    fused.merge_tokens(hidden, _index(1, PROMPT), _meta(torch.float32, 1, PROMPT), SELECTED)


def _vision_layer(dtype: torch.dtype) -> None:
    hidden = _meta(dtype, 1, PATCHES, VISION_HIDDEN)
    bias = _meta(dtype, VISION_HIDDEN)
    norm = Norm(bias, bias, kind="layer")
    square = _meta(dtype, VISION_HIDDEN, VISION_HIDDEN)
    attention = AttentionWeights(
        square,
        square,
        square,
        square,
        VISION_HIDDEN // VISION_HEADS,
        query_bias=bias,
        key_bias=bias,
        value_bias=bias,
        output_bias=bias,
        norm=norm,
    )
    mlp = MLPWeights(
        _meta(dtype, VISION_NEURONS, VISION_HIDDEN),
        _meta(dtype, VISION_HIDDEN, VISION_NEURONS),
        activation="quick_gelu",
        up_bias=_meta(dtype, VISION_NEURONS),
        down_bias=bias,
        norm=norm,
    )
    heads = Survivors(_index(1, VISION_HEADS), _index(1))
    neurons = Survivors(_index(1, VISION_NEURONS // 8), _index(1), 8)
    fused.attention(hidden, attention, heads, None, _index(1, PATCHES), hidden, causal=False)
    fused.mlp(hidden, mlp, neurons, hidden)
