"""Norm and the three projections, interpreted, against their twins in float64."""

import pytest
import torch
from blocks import (
    DTYPES,
    assert_close,
    cast,
    copied,
    poisoned_cache,
    random_angles,
    random_attention,
    random_lanes,
    random_mlp,
    random_norm,
)

from planner.kernels import mlp, naive, norm, output, qkv
from planner.kernels.records import Survivors
from planner.kernels.tiles import Tile

# Small enough that odd sizes have several tiles and a tail along every axis.
SMALL = Tile(block_m=16, block_n=16, block_k=32, warps=4, stages=2, group_rows=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [37, 64])
def test_normalize(dtype, kind, width):
    x = (torch.randn(3, 7, width) * 3 + 1).to(dtype)
    record = cast(random_norm(width, kind), dtype)
    want = naive.normalize(x.double(), cast(record, torch.float64))
    assert_close(norm.normalize(x, record), want, dtype)


def _survivors_of_neurons(neurons: int, width: int, plans: int) -> Survivors:
    return Survivors.of([random_lanes(neurons) for _ in range(plans)], neurons, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("neurons", "width"), [(37, 1), (2 * 37, 2), (8 * 13, 8)])
@pytest.mark.parametrize("gated", [True, False])
def test_project_up(dtype, neurons, width, gated):
    weights = cast(random_mlp(63, neurons, gated=gated, biased=True), dtype)
    x = torch.randn(2, 21, 63).to(dtype)
    survivors = _survivors_of_neurons(neurons, width, 2)
    got = mlp.project_up(x, weights, survivors, SMALL)
    want = naive.project_up(x.double(), cast(weights, torch.float64), survivors)
    for plan, units in enumerate(survivors.counts.tolist()):
        columns = slice(units * width)
        assert_close(got[plan, :, columns], want[plan, :, columns], dtype)
        assert got[plan, :, units * width :].isnan().all()


@pytest.mark.parametrize("activation", sorted(naive.ACTIVATIONS))
def test_activations(activation):
    weights = random_mlp(32, 16, activation=activation, norm=None)
    x = torch.randn(1, 16, 32) * 3
    survivors = Survivors.of([range(16)], 16, 8)
    want = naive.project_up(x.double(), cast(weights, torch.float64), survivors)
    assert_close(mlp.project_up(x, weights, survivors, SMALL), want, torch.float32)


def test_norm_folded_in_and_norm_before_agree():
    weights = random_mlp(64, 48)
    survivors = _survivors_of_neurons(48, 8, 1)
    x = torch.randn(1, 80, 64)
    columns = slice(int(survivors.counts[0]) * 8)
    before = mlp.project_up(x, weights, survivors)[..., columns]
    folded = mlp.project_up(x[:, :64], weights, survivors)[..., columns]
    assert_close(folded, before[:, :64].double(), torch.float32)
    assert not torch.equal(folded, before[:, :64])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 24])
@pytest.mark.parametrize("extras", [True, False])
def test_project_out(dtype, width, extras):
    features_in, features_out = 5 * width, 37
    weight = torch.randn(features_out, features_in).to(dtype)
    bias = torch.randn(features_out).to(dtype) if extras else None
    residual = torch.randn(2, 21, features_out).to(dtype) if extras else None
    survivors = Survivors.of([[0, 3, 4], [2]], 5)
    a = torch.full((2, 21, 5 * width), torch.nan, dtype=dtype)
    for plan, units in enumerate(survivors.counts.tolist()):
        a[plan, :, : units * width] = torch.randn(21, units * width)
    weight[:, width : 2 * width] = torch.nan  # unit 1 survives nowhere, so nobody may read it
    got = output.project_out(a, weight, bias, residual, survivors, width, SMALL)
    doubled = [None if t is None else t.double() for t in (a, weight, bias, residual)]
    want = naive.project_out(*doubled, survivors, width)
    assert_close(got, want, dtype)


def test_project_out_without_survivors_is_residual_and_bias():
    residual, bias = torch.randn(1, 5, 24), torch.randn(24)
    a = torch.full((1, 5, 32), torch.nan)
    weight = torch.full((24, 32), torch.nan)
    got = output.project_out(a, weight, bias, residual, Survivors.of([[]], 4), 8, SMALL)
    assert torch.equal(got, residual + bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "rotary", "head_norm", "shared"),
    [
        (5, 1, 16, 16, False, True),
        (3, 2, 20, 8, False, False),  # head of no power of two, rotated in part
        (3, 2, 24, 24, True, False),  # and normed: a tile is one head with a tail
        (4, 3, 16, 0, False, False),  # no rotation at all
    ],
)
def test_project_qkv(dtype, kv_heads, group, head_dim, rotary, head_norm, shared):
    batch, tokens, hidden = 2, 11, 63
    weights = cast(
        random_attention(hidden, kv_heads, group, head_dim, biased=True, head_norm=head_norm), dtype
    )
    plans = [random_lanes(kv_heads) for _ in range(1 if shared else batch)]
    survivors = Survivors.of(plans, kv_heads)
    groups = [len(plan) for plan in plans] * (batch // len(plans))
    x = torch.randn(batch, tokens, hidden).to(dtype)
    angles = None
    if rotary:
        cos, sin = random_angles(1 if shared else batch, tokens, rotary)
        angles = (cos.to(dtype), sin.to(dtype))
    cache = poisoned_cache(groups, [tokens + 5, tokens + 3], head_dim, dtype)
    cache.lengths[:] = torch.tensor([4, 0])
    reference = copied(cache, torch.float64)
    tile = Tile(16, 32, 32, 4, 2, 2)
    got = qkv.project_qkv(x, weights, survivors, angles, cache, tile)
    wide = None if angles is None else (angles[0].double(), angles[1].double())
    want = naive.project_qkv(x.double(), cast(weights, torch.float64), survivors, wide, reference)
    for sample, count in enumerate(groups):
        heads = slice(count * group)
        assert_close(got[sample, :, heads], want[sample, :, heads], dtype)
        assert got[sample, :, count * group :].isnan().all()
    for got_store, want_store in ((cache.keys, reference.keys), (cache.values, reference.values)):
        assert torch.equal(got_store.isnan(), want_store.isnan())
        assert_close(got_store.nan_to_num(), want_store.nan_to_num(), dtype)
