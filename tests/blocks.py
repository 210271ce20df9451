"""Random blocks, plans and inputs for the kernel tests, and how closeness is measured."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from planner.kernels.records import AttentionWeights, KVCache, MLPWeights, Norm

Record = TypeVar("Record")

# Root-mean-square error over root-mean-square value, against float64. Half precision rounds the
# inputs of each product and its result: a few times 2^-9 (bf16) or 2^-12 (fp16).
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-12}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def error_ratio(got: Tensor, want: Tensor) -> float:
    """Relative error; NaN or infinity anywhere makes it so too."""
    got, want = got.double(), want.double()
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    ratio = error_ratio(got, want)
    assert ratio < TOLERANCE[dtype], ratio


def cast(record: Record, dtype: torch.dtype) -> Record:
    """A record with its floating tensors in another dtype, nested records too."""
    changes = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor) and value.is_floating_point():
            changes[field.name] = value.to(dtype)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = cast(value, dtype)
    return dataclasses.replace(record, **changes)


def weight(out: int, inner: int) -> Tensor:
    return torch.randn(out, inner) / inner**0.5


def random_norm(hidden: int, kind: str = "rms") -> Norm:
    bias = torch.randn(hidden) if kind == "layer" else None
    return Norm(torch.rand(hidden) + 0.5, bias, kind, eps=1e-5, offset=float(kind == "rms"))


def random_mlp(
    hidden: int,
    neurons: int,
    *,
    gated: bool = True,
    biased: bool = False,
    activation: str = "silu",
    norm: str | None = "rms",
) -> MLPWeights:
    return MLPWeights(
        weight(neurons, hidden),
        weight(hidden, neurons),
        weight(neurons, hidden) if gated else None,
        activation,
        torch.randn(neurons) if biased else None,
        torch.randn(hidden) if biased else None,
        torch.randn(neurons) if biased and gated else None,
        random_norm(hidden, norm) if norm else None,
    )


def random_attention(
    hidden: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    *,
    biased: bool = False,
    head_norm: bool = False,
    norm: str | None = "rms",
) -> AttentionWeights:
    heads = kv_heads * group
    return AttentionWeights(
        weight(heads * head_dim, hidden),
        weight(kv_heads * head_dim, hidden),
        weight(kv_heads * head_dim, hidden),
        weight(hidden, heads * head_dim),
        head_dim,
        None,
        torch.randn(heads * head_dim) if biased else None,
        torch.randn(kv_heads * head_dim) if biased else None,
        torch.randn(kv_heads * head_dim) if biased else None,
        torch.randn(hidden) if biased else None,
        torch.rand(head_dim) + 0.5 if head_norm else None,
        torch.rand(head_dim) + 0.5 if head_norm else None,
        norm=random_norm(hidden, norm) if norm else None,
    )


def random_lanes(total: int, count: int | None = None) -> list[int]:
    """Distinct lanes of a site, at random: `count`, or any number from 1."""
    count = int(torch.randint(1, total + 1, ())) if count is None else count
    return sorted(torch.randperm(total)[:count].tolist())


def random_angles(batch: int, tokens: int, lanes: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines as transformers gives them: the second half repeats the first."""
    angle = torch.rand(batch, tokens, lanes // 2) * 6.3
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def kept_positions(tokens: int, of: int, padding: tuple[int, ...]) -> Tensor:
    """Ascending places in a longer sequence, per sample, after that many tokens of left padding."""
    rows = []
    for pad in padding:
        places = torch.tensor(random_lanes(of, tokens - pad), dtype=torch.int32)
        rows.append(torch.cat([torch.full((pad,), -1, dtype=torch.int32), places]))
    return torch.stack(rows)


def poisoned_cache(
    groups: list[int], room: list[int], head_dim: int, dtype: torch.dtype
) -> KVCache:
    """An empty packed cache in which reading what was not written gives NaN."""
    cache = KVCache.empty(groups, room, head_dim, dtype=dtype)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


def copied(cache: KVCache, dtype: torch.dtype) -> KVCache:
    """A cache of its own with the same contents."""
    return dataclasses.replace(
        cache, keys=cache.keys.to(dtype).clone(), values=cache.values.to(dtype).clone()
    )
