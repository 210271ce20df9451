"""Whole blocks, as Triton kernels (interpreted) and on sliced weights, against masked ones."""

import dataclasses

import pytest
import torch
from blocks import (
    assert_close,
    cast,
    kept_positions,
    poisoned_cache,
    random_angles,
    random_attention,
    random_lanes,
    random_mlp,
)

from planner.ir.errors import InputError
from planner.kernels import fused, naive, sliced
from planner.kernels.records import Survivors, neuron_width

BACKENDS = pytest.mark.parametrize("backend", [fused, sliced], ids=["fused", "sliced"])


def _poison_mlp(weights, survivors):
    """NaN in every neuron that no plan reads: survivors, and the rest of their units."""
    width = survivors.width
    read = torch.zeros(weights.up.shape[0], dtype=torch.bool)
    for units, count in zip(survivors.units, survivors.counts):
        read.view(-1, width)[units[:count].long()] = True
    for rows in (weights.up, weights.gate, weights.up_bias, weights.gate_bias):
        if rows is not None:
            rows[~read] = torch.nan
    weights.down[:, ~read] = torch.nan


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("neurons", "groups", "options"),
    [
        (3 * 344, 3, {}),
        (130, 4, {"gated": False, "biased": True, "activation": "gelu", "norm": "layer"}),
        (37, 5, {"biased": True, "norm": None}),
    ],
)
def test_mlp(backend, dtype, shared, neurons, groups, options):
    """Groups of 344, of 33 and 32, and of 8 and 7 neurons."""
    hidden = 40
    weights = cast(random_mlp(hidden, neurons, **options), dtype)
    bounds = [round(group * neurons / groups) for group in range(groups + 1)]
    plans = []
    for _ in range(1 if shared else 3):
        kept = random_lanes(groups, 2)
        plans.append([n for g in kept for n in range(bounds[g], bounds[g + 1])])
    survivors = Survivors.of(plans, neurons, neuron_width(neurons))
    x = torch.randn(3, 13, hidden).to(dtype)
    want = naive.mlp(x.double(), cast(weights, torch.float64), survivors, x.double())
    _poison_mlp(weights, survivors)
    assert_close(backend.mlp(x, weights, survivors, x), want, dtype)


@BACKENDS
def test_mlp_of_nothing_is_the_residual(backend):
    weights = random_mlp(40, 64)
    x = torch.randn(2, 5, 40)
    nothing = Survivors.of([[]], 64, 8)
    assert torch.equal(backend.mlp(x, weights, nothing, x), x)
    mixed = Survivors.of([[], range(64)], 64, 8)
    got = backend.mlp(x, weights, mixed, x)
    assert torch.equal(got[0], x[0])
    assert_close(got, naive.mlp(x, weights, mixed, x).double(), torch.float32)


def _poison_attention(weights, survivors):
    kept = {unit for plan in range(survivors.plans) for unit in survivors.kept(plan).tolist()}
    for unit in set(range(weights.kv_heads)) - kept:
        for rows, bias, heads in (
            (weights.query, weights.query_bias, weights.group),
            (weights.key, weights.key_bias, 1),
            (weights.value, weights.value_bias, 1),
        ):
            span = slice(unit * heads * weights.head_dim, (unit + 1) * heads * weights.head_dim)
            rows[span] = torch.nan
            if bias is not None:
                bias[span] = torch.nan
        width = weights.group * weights.head_dim
        weights.output[:, unit * width : (unit + 1) * width] = torch.nan


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "rotary", "options"),
    [
        (5, 1, 16, 16, {}),
        (3, 2, 20, 8, {"biased": True, "norm": "layer"}),
        (4, 3, 24, 24, {"head_norm": True, "norm": None}),
    ],
)
def test_attention(backend, dtype, shared, kv_heads, group, head_dim, rotary, options):
    hidden, tokens = 40, 21
    weights = cast(random_attention(hidden, kv_heads, group, head_dim, **options), dtype)
    plans = [random_lanes(kv_heads, 2) for _ in range(1 if shared else 3)]
    survivors = Survivors.of(plans, kv_heads)
    positions = kept_positions(tokens, 50, (0, 4, 1))
    cos, sin = random_angles(3, tokens, rotary)
    x = torch.randn(3, tokens, hidden).to(dtype)
    want = naive.attention(
        x.double(),
        cast(weights, torch.float64),
        survivors,
        (cos.to(dtype).double(), sin.to(dtype).double()),
        positions,
        x.double(),
        window=30,
    )
    _poison_attention(weights, survivors)
    got = backend.attention(
        x, weights, survivors, (cos.to(dtype), sin.to(dtype)), positions, x, window=30
    )
    assert_close(got, want, dtype)


@BACKENDS
def test_attention_without_heads_rotation_or_causality(backend):
    weights = random_attention(40, 4, 1, 16, biased=True)
    x = torch.randn(2, 9, 40)
    positions = torch.arange(9, dtype=torch.int32).repeat(2, 1)
    survivors = Survivors.of([[], [1, 3]], 4)
    got = backend.attention(x, weights, survivors, None, positions, causal=False)
    want = naive.attention(
        x.double(), cast(weights, torch.float64), survivors, None, positions, causal=False
    )
    assert_close(got, want, torch.float32)
    assert torch.equal(got[0], weights.output_bias.expand(9, 40))


@BACKENDS
@pytest.mark.parametrize("shared", [True, False])
def test_decoding_step_by_step_is_one_long_prefill(backend, shared):
    """A padded prompt, a second turn and single tokens, against the whole sequence at once."""
    hidden, head_dim, kv_heads, steps = 40, 16, 3, (9, 4, 1, 1)
    total = sum(steps)
    weights = random_attention(hidden, kv_heads, 2, head_dim)
    plans = [[0, 2]] if shared else [[0, 2], [1]]
    survivors = Survivors.of(plans, kv_heads)
    x = torch.randn(2, total, hidden)
    positions = kept_positions(total, 40, (0, 3))
    cos, sin = random_angles(1, total, head_dim)
    want = naive.attention(
        x.double(),
        cast(weights, torch.float64),
        survivors,
        (cos.double(), sin.double()),
        positions,
        x.double(),
    )
    groups = [2, 2] if shared else [2, 1]
    cache = poisoned_cache(groups, [total, total + 2], head_dim, torch.float32)
    done = 0
    for tokens in steps:
        now = slice(done, done + tokens)
        got = backend.attention(
            x[:, now],
            weights,
            survivors,
            (cos[:, now], sin[:, now]),
            positions[:, now].contiguous(),
            x[:, now],
            cache=cache,
            key_positions=positions,
        )
        assert_close(got, want[:, now], torch.float32)
        cache.lengths.add_(tokens)
        done += tokens


def test_strided_weights_are_refused_by_kernels():
    weights = random_mlp(40, 64)
    strided = dataclasses.replace(weights, up=weights.up.T.contiguous().T)
    with pytest.raises(InputError, match="one of these is strided"):
        fused.mlp(torch.randn(1, 5, 40), strided, Survivors.of([[1]], 64, 8))


@BACKENDS
def test_fastv_selection(backend):
    """The kept tokens are those the last row of the full attention matrix ranks first."""
    batch, tokens, kv_heads, group, head_dim = 2, 40, 3, 2, 16
    survivors = Survivors.of([[0, 2], [1]], kv_heads)
    groups = [2, 1]
    cache = poisoned_cache(groups, [tokens, tokens], head_dim, torch.float32)
    positions = kept_positions(tokens, 60, (0, 6))
    queries = torch.randn(batch, kv_heads * group, head_dim)
    candidates = torch.zeros(batch, tokens, dtype=torch.bool)
    candidates[:, 8:30] = True
    keep = torch.tensor([11, 9], dtype=torch.int32)
    hidden = torch.randn(batch, tokens, 24)
    expected = []
    for sample, slots in enumerate(groups):
        score = torch.zeros(tokens, dtype=torch.float64)
        for slot in range(slots):
            rows = cache.rows(sample, slot, tokens)
            cache.keys[rows] = torch.randn(tokens, head_dim)
            for head in range(group):
                logits = cache.keys[rows].double() @ queries[sample, slot * group + head].double()
                score += torch.softmax(logits.masked_fill(positions[sample] < 0, -torch.inf), 0)
        best = set((score[8:30].topk(int(keep[sample])).indices + 8).tolist())
        expected.append(
            [
                t
                for t in range(tokens)
                if positions[sample, t] >= 0 and (t in best or not candidates[sample, t])
            ]
        )
    length = max(map(len, expected))
    rows, index = backend.select_tokens(
        hidden, queries, cache, survivors, positions, candidates, keep, length, scale=1.0
    )
    for sample, kept in enumerate(expected):
        assert index[sample].tolist() == [-1] * (length - len(kept)) + kept
        assert torch.equal(rows[sample, length - len(kept) :], hidden[sample, kept])
        assert not rows[sample, : length - len(kept)].any()
