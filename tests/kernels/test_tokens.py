"""Scoring, choosing, gathering and merging tokens, interpreted, against their twins."""

import pytest
import torch
from blocks import DTYPES, assert_close, copied, kept_positions, poisoned_cache, random_lanes
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.kernels import naive, sliced, tokens
from planner.kernels.records import Survivors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "group"), [(16, 1), (20, 3)])
def test_scores_are_one_row_of_attention(dtype, head_dim, group):
    heads, count = 4, 75
    plans = [random_lanes(heads), random_lanes(heads)]
    survivors = Survivors.of(plans, heads)
    cache = poisoned_cache([len(p) for p in plans], [count, count + 2], head_dim, dtype)
    for sample, plan in enumerate(plans):
        for slot in range(len(plan)):
            rows = cache.rows(sample, slot, count)
            cache.keys[rows] = torch.randn(count, head_dim).to(dtype)
    positions = kept_positions(count, 100, (0, 13))
    queries = torch.randn(2, heads * group, head_dim).to(dtype)
    got = tokens.score_tokens(queries, cache, survivors, positions, scale=0.3)
    want = naive.score_tokens(
        queries.double(), copied(cache, torch.float64), survivors, positions, scale=0.3
    )
    for sample, plan in enumerate(plans):
        assert_close(got[sample, : len(plan)], want[sample, : len(plan)], torch.float32)
        total = got[sample, : len(plan)].sum()
        assert total.item() == pytest.approx(len(plan) * group, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_choice_is_exact_even_among_equals(data):
    batch, count, slots = 2, data.draw(st.integers(1, 50)), data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, negative ones among them, so that many scores are equal.
    scores = torch.randint(-3, 4, (batch, slots, count), generator=generator).float()
    candidates = torch.rand(batch, count, generator=generator) < 0.7
    positions = torch.arange(count, dtype=torch.int32).repeat(batch, 1)
    positions[1, : count // 4] = -1
    competing = (candidates & (positions >= 0)).sum(dim=1)
    share = torch.rand(batch, generator=generator)
    keep = (share * (competing + 1)).int()
    stay = (~candidates & (positions >= 0)).sum(dim=1)
    length = int((stay + keep).max()) + data.draw(st.integers(0, 3))
    want = naive.choose_tokens(scores, candidates, positions, keep, length)
    got = tokens.choose_tokens(scores, candidates, positions, keep, length)
    assert torch.equal(got, want)
    one_row = sliced.choose_tokens(scores.sum(dim=1), candidates, positions, keep, length)
    assert torch.equal(one_row, want)


def test_only_surviving_heads_vote():
    scores = torch.rand(2, 3, 20)
    counts = torch.tensor([1, 2], dtype=torch.int32)
    scores[0, 1:] = torch.nan
    scores[1, 2:] = torch.nan
    everyone = torch.ones(2, 20, dtype=torch.bool)
    positions = torch.arange(20, dtype=torch.int32).repeat(2, 1)
    keep = torch.tensor([5, 5], dtype=torch.int32)
    got = tokens.choose_tokens(scores, everyone, positions, keep, 5, counts)
    assert torch.equal(got, naive.choose_tokens(scores, everyone, positions, keep, 5, counts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_copies_bits(dtype):
    x = torch.randn(2, 9, 1100).to(dtype)
    index = torch.tensor([[-1, 0, 8], [3, 4, 7]], dtype=torch.int32)
    got = tokens.gather_tokens(x, index)
    assert torch.equal(got, naive.gather_tokens(x, index))
    assert torch.equal(got[0, 0], torch.zeros(1100, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(dtype):
    x = torch.randn(2, 75, 37).to(dtype)
    target = torch.randint(-1, 9, (2, 75), dtype=torch.int32)
    target[target == 4] = 5  # nobody goes to 4
    weight = torch.rand(2, 75)
    want = naive.merge_tokens(x.double(), target, weight.double(), 10)
    assert want[:, 4].abs().max() == 0
    assert_close(tokens.merge_tokens(x, target, weight, 10), want, dtype)
    assert_close(sliced.merge_tokens(x, target, weight, 10), want, dtype)
