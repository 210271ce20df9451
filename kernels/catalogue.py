"""Every kernel at the shapes of a LLaVA-1.5-7B decoder layer, as launches to compile.

Enters: a target. Leaves: named launches, made by running the blocks on meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from planner.kernels import fused
from planner.kernels.launch import Launch, recorded
from planner.kernels.norm import normalize
from planner.kernels.records import AttentionWeights, KVCache, MLPWeights, Norm, Survivors
from planner.kernels.tiles import Target
from planner.kernels.tokens import merge_tokens

__all__ = ["catalogue"]

HIDDEN, HEADS, HEAD_DIM, NEURONS = 4096, 32, 128, 11008
PROMPT, CACHED = 640, 1024


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _index(*shape: int) -> torch.Tensor:
    return _meta(*shape, dtype=torch.int32)


def catalogue(target: Target, dtype: torch.dtype = torch.bfloat16) -> dict[str, Launch]:
    """Launches by name: ``prefill/project_qkv_kernel``, ``decode/attend_split_kernel``, ..."""
    norm = Norm(_meta(HIDDEN, dtype=dtype))
    square = _meta(HIDDEN, HIDDEN, dtype=dtype)
    attention = AttentionWeights(square, square, square, square, HEAD_DIM, norm=norm)
    wide = _meta(NEURONS, HIDDEN, dtype=dtype)
    mlp = MLPWeights(wide, _meta(HIDDEN, NEURONS, dtype=dtype), wide, norm=norm)
    plain = MLPWeights(wide, mlp.down, activation="gelu")
    heads = Survivors(_index(1, HEADS), _index(1))
    neurons = Survivors(_index(1, NEURONS // 8), _index(1), 8)
    cache = KVCache(
        _meta(HEADS * CACHED, HEAD_DIM, dtype=dtype),
        _meta(HEADS * CACHED, HEAD_DIM, dtype=dtype),
        _index(1),
        _index(1),
        _index(1),
    )

    def block(tokens: int) -> None:
        hidden = _meta(1, tokens, HIDDEN, dtype=dtype)
        angles = (_meta(1, tokens, HEAD_DIM, dtype=dtype),) * 2
        fused.attention(
            hidden,
            attention,
            heads,
            angles,
            _index(1, tokens),
            hidden,
            cache=cache,
            key_positions=_index(1, CACHED),
        )
        fused.mlp(hidden, mlp, neurons, hidden)

    def tokens() -> None:
        hidden = _meta(1, PROMPT, HIDDEN, dtype=dtype)
        fused.select_tokens(
            hidden,
            _meta(1, HEADS, HEAD_DIM, dtype=dtype),
            cache,
            heads,
            _index(1, PROMPT),
            _meta(1, PROMPT, dtype=torch.bool),
            _index(1),
            352,
            scale=1.0,
        )
        merge_tokens(hidden, _index(1, PROMPT), _meta(1, PROMPT, dtype=torch.float32), 352)

    def others() -> None:
        hidden = _meta(1, PROMPT, HIDDEN, dtype=dtype)
        fused.mlp(hidden, plain, neurons, hidden)
        normalize(hidden, Norm(_meta(HIDDEN), _meta(HIDDEN), kind="layer"))

    parts: dict[str, Callable[[], None]] = {
        "prefill": lambda: block(PROMPT),
        "decode": lambda: block(1),
        "tokens": tokens,
        "layernorm, plain mlp": others,
    }
    named: dict[str, Launch] = {}
    for part, run in parts.items():
        with recorded(target) as launches:
            run()
        for launch in launches:
            name = f"{part}/{launch.kernel.fn.__name__}"
            known = sum(n == name or n.startswith(f"{name} ") for n in named)
            named[f"{name} {known + 1}" if known else name] = launch
    return named
