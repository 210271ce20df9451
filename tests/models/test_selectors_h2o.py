"""The H2O cache policy against a loop over decode steps that keeps lists of entries."""

from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.models.tokens.selectors import HeavyHitters
from planner.models.tokens.selectors.h2o import attention_received
from planner.planning.selectors import H2O

HEAD_DIM = 4


def naive(query, key, prompt, group, policy):
    """Positions in the cache of one sample after the prompt and after every decoded token.

    query (heads, n, d), key (kv_heads, n, d); returns lists [step][kv_head] of positions.
    """
    kv_heads, n = key.shape[:2]
    heavy, recent = int(prompt * policy.heavy), max(1, int(prompt * policy.recent))
    caches = [{} for _ in range(kv_heads)]  # position -> attention received
    history = []
    for token in range(n):
        for kv_head, cache in enumerate(caches):
            cache[token] = 0.0
            for head in range(kv_head * group, (kv_head + 1) * group):
                logits = {p: query[head, token] @ key[kv_head, p] / sqrt(HEAD_DIM) for p in cache}
                total = sum(np.exp(value) for value in logits.values())
                for p, value in logits.items():
                    cache[p] += np.exp(value) / total
            if token >= prompt - 1:
                order = sorted(cache)
                older, newest = order[:-recent], order[-recent:]
                kept = sorted(older, key=lambda p: (-cache[p], p))[:heavy] + newest
                caches[kv_head] = {p: cache[p] for p in sorted(kept)}
        if token >= prompt - 1:
            history.append([list(cache) for cache in caches])
    return history


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 2),
    heavy=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    recent=st.sampled_from([0.0, 0.25, 1.0]),
)
def test_h2o_equals_a_loop_over_decode_steps(seed, lengths, kv_heads, group, heavy, recent):
    rng = np.random.default_rng(seed)
    policy, steps, batch, longest = H2O(heavy, recent), 8, len(lengths), max(lengths)
    total = longest + steps
    query = rng.normal(size=(batch, kv_heads * group, total, HEAD_DIM))
    key = rng.normal(size=(batch, kv_heads, total, HEAD_DIM))
    expected = [
        naive(query[b, :, longest - n :], key[b, :, longest - n :], n, group, policy)
        for b, n in enumerate(lengths)
    ]

    state = HeavyHitters(policy)
    positions = torch.arange(longest).expand(batch, kv_heads, -1)
    valid = torch.tensor([[i >= longest - n for i in range(longest)] for n in lengths])
    cache = torch.from_numpy(key[:, :, :longest])
    new = torch.from_numpy(query[:, :, :longest])
    for step in range(steps + 1):
        received = attention_received(new, cache, valid)
        index, valid = state.observe(received, valid)
        cache = cache.gather(2, index[..., None].expand(-1, -1, -1, HEAD_DIM))
        positions = positions.gather(2, index)
        for b, n in enumerate(lengths):
            for h in range(kv_heads):
                found = (positions[b, h][valid[b]] - (longest - n)).tolist()
                assert found == expected[b][step][h], f"step {step}, sample {b}, head {h}"
            assert int(valid[b].sum()) == policy.kept(n, step)
        if step < steps:
            token = longest + step
            new = torch.from_numpy(query[:, :, token : token + 1])
            cache = torch.cat([cache, torch.from_numpy(key[:, :, token : token + 1])], dim=2)
            positions = torch.cat([positions, torch.full((batch, kv_heads, 1), token)], dim=2)
            valid = torch.cat([valid, torch.ones(batch, 1, dtype=torch.bool)], dim=1)


def test_received_attention_is_the_same_in_chunks_and_ignores_padding():
    query, key = torch.randn(2, 4, 37, 8), torch.randn(2, 2, 37, 8)
    valid = torch.ones(2, 37, dtype=torch.bool)
    valid[1, :5] = False
    whole = attention_received(query, key, valid)
    torch.testing.assert_close(attention_received(query, key, valid, rows_at_once=7), whole)
    # Every real query of each of a group's two heads hands out exactly one unit of attention.
    torch.testing.assert_close(whole.sum(-1), torch.tensor([[74.0, 74.0], [64.0, 64.0]]))
    assert not whole[1, :, :5].any()
    query[1, :, :5] = 1e30
    torch.testing.assert_close(attention_received(query, key, valid), whole)


def test_heads_of_one_layer_keep_different_entries():
    received = torch.tensor([[[5.0, 0, 0, 1], [0, 5.0, 0, 1]]])
    index, valid = HeavyHitters(H2O(heavy=0.25, recent=0.25)).observe(
        received, torch.ones(1, 4).bool()
    )
    assert index.tolist() == [[[0, 3], [1, 3]]]
    assert valid.all()


def test_reorder_follows_the_samples():
    scores = torch.rand(3, 2, 6)
    state, swapped = HeavyHitters(H2O(0.5, 0.2)), HeavyHitters(H2O(0.5, 0.2))
    order, valid = torch.tensor([2, 0, 2]), torch.ones(3, 6).bool()
    state.observe(scores, valid)
    state.reorder(order)
    swapped.observe(scores[order], valid)
    assert torch.equal(state.scores, swapped.scores)
    more, room = torch.rand(3, 2, 5), torch.ones(3, 5).bool()
    assert torch.equal(state.observe(more, room)[0], swapped.observe(more, room)[0])


@pytest.mark.parametrize(("prompt", "budgets"), [(1, (0, 1)), (9, (0, 1)), (640, (64, 64))])
def test_budgets_come_from_the_prompt(prompt, budgets):
    assert H2O().budgets(prompt) == budgets
