"""Prefill and decode attention, interpreted, against the twin in float64."""

import pytest
import torch
from blocks import DTYPES, assert_close, copied, kept_positions, poisoned_cache, random_lanes

from planner.kernels import naive
from planner.kernels.decode import decode
from planner.kernels.prefill import attend
from planner.kernels.records import KVCache, Survivors
from planner.kernels.tiles import AttentionTile

SMALL = AttentionTile(block_m=16, block_n=16, warps=4, stages=1)


def _filled(groups: list[int], keys: list[int], head_dim: int, dtype: torch.dtype) -> KVCache:
    cache = poisoned_cache(groups, [n + 3 for n in keys], head_dim, dtype)
    for sample, slots in enumerate(groups):
        for slot in range(slots):
            rows = cache.rows(sample, slot, keys[sample])
            cache.keys[rows] = torch.randn(keys[sample], head_dim).to(dtype)
            cache.values[rows] = torch.randn(keys[sample], head_dim).to(dtype)
    return cache


def _compare(run, tokens, held, positions, key_positions, *, heads=3, group=1, head_dim=16,
             dtype=torch.float32, shared=False, **options):  # fmt: skip
    batch = len(held)
    plans = [random_lanes(heads) for _ in range(1 if shared else batch)]
    survivors = Survivors.of(plans, heads)
    groups = [len(plan) for plan in plans] * (batch // len(plans))
    cache = _filled(groups, [h + tokens for h in held], head_dim, dtype)
    cache.lengths[:] = torch.tensor(held)
    queries = torch.full((batch, tokens, heads * group, head_dim), torch.nan, dtype=dtype)
    for sample, count in enumerate(groups):
        queries[sample, :, : count * group] = torch.randn(tokens, count * group, head_dim)
    facts = {"scale": head_dim**-0.5} | {
        name: options[name] for name in ("causal", "window") if name in options
    }
    tiling = {name: options[name] for name in ("splits", "tile") if name in options}
    got = run(queries, cache, survivors, positions, key_positions, **facts, **tiling)
    want = naive.attend(
        queries.double(),
        copied(cache, torch.float64),
        survivors,
        positions,
        key_positions,
        **facts,
    )
    for sample, count in enumerate(groups):
        kept = slice(count * group)
        assert_close(got[sample, :, kept], want[sample, :, kept], dtype)
        assert got[sample, :, count * group :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "group"), [(16, 1), (20, 2), (32, 3)])
def test_causal_prefill_of_kept_tokens_with_padding(dtype, head_dim, group):
    positions = kept_positions(37, 90, (0, 5))
    _compare(
        attend, 37, [0, 0], positions, positions,
        head_dim=head_dim, group=group, dtype=dtype, tile=SMALL,
    )  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("padding", [(0, 0), (3, 20)])
def test_sliding_window(window, padding):
    positions = kept_positions(40, 60, padding)
    _compare(attend, 40, [0, 0], positions, positions, window=window, shared=True, tile=SMALL)


def test_positions_in_any_order():
    positions = torch.stack([torch.randperm(37), torch.randperm(37)]).int()
    _compare(attend, 37, [0, 0], positions, positions, window=11, tile=SMALL)


def test_without_causality_everything_but_padding_is_seen():
    positions = kept_positions(37, 60, (0, 17))
    positions[0, 20:25] = -1  # padding in the middle
    _compare(attend, 37, [0, 0], positions, positions, causal=False, tile=SMALL)


def test_prefill_behind_a_ragged_cache():
    key_positions = kept_positions(60, 200, (0, 0))
    held = [23, 0]
    positions = torch.stack([key_positions[0, 23:52], key_positions[1, :29]])
    _compare(attend, 29, held, positions, key_positions, group=2, tile=SMALL)


def test_a_sample_of_nothing_but_padding_gives_zero():
    positions = torch.full((1, 20), -1, dtype=torch.int32)
    survivors = Survivors.of([[0]], 1)
    cache = _filled([1], [20], 16, torch.float32)
    queries = torch.randn(1, 20, 1, 16)
    got = attend(queries, cache, survivors, positions, positions, scale=1.0, tile=SMALL)
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "group"), [(16, 1), (20, 4)])
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_decode(dtype, head_dim, group, splits):
    key_positions = kept_positions(80, 200, (0, 2, 31))
    held = [0, 40, 79]
    positions = torch.stack([row[h : h + 1] for row, h in zip(key_positions, held)])
    _compare(
        decode, 1, held, positions, key_positions,
        head_dim=head_dim, group=group, dtype=dtype, splits=splits, tile=SMALL,
    )  # fmt: skip


def test_decode_within_a_window():
    key_positions = kept_positions(80, 120, (0, 0))
    held = [70, 33]
    positions = torch.stack([row[h : h + 1] for row, h in zip(key_positions, held)])
    _compare(decode, 1, held, positions, key_positions, window=7, splits=4, tile=SMALL, shared=True)


def test_chosen_tiles_give_the_same():
    key_positions = kept_positions(150, 300, (0,))
    _compare(attend, 150, [0], key_positions, key_positions, heads=2)
    _compare(decode, 1, [149], key_positions[:, 149:], key_positions, heads=2)
