"""Ranking and rows of attention, against loops and full attention matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.kernels.ops.choose_tokens import top_mask
from planner.kernels.ops.score_tokens import ScoreTokens
from planner.models.tokens.selectors import TowerAttention
from planner.models.tokens.selectors.scoring import (
    ScoreRule,
    attention_rows,
    outliers,
    pack,
    visible_keys,
)

few = settings(max_examples=25, deadline=None)


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 17), st.booleans())
def test_top_mask_is_a_sort_with_ties_by_index(seed, rows, n, infinite):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (rows, n)).astype(float)  # many ties
    if infinite:
        scores[rng.random((rows, n)) < 0.3] = -np.inf
    eligible = rng.random((rows, n)) < 0.6
    counts = rng.integers(0, n + 2, rows)
    expected = np.zeros((rows, n), dtype=bool)
    for row in range(rows):
        candidates = [i for i in range(n) if eligible[row, i]]
        best = sorted(candidates, key=lambda i: (-scores[row, i], i))[: counts[row]]
        expected[row, best] = True
    mask = top_mask(*map(torch.from_numpy, (scores, eligible, counts)))
    np.testing.assert_array_equal(mask.numpy(), expected)


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 40))
def test_outliers_agree_with_numpy_percentiles(seed, rows, n):
    scores = np.random.default_rng(seed).lognormal(0, 2, (rows, n))
    q1, q3 = np.percentile(scores, [25, 75], axis=1)
    expected = scores > (q3 + 1.5 * (q3 - q1))[:, None]
    np.testing.assert_array_equal(outliers(torch.from_numpy(scores)).numpy(), expected)


def test_equal_scores_have_no_outliers():
    assert not outliers(torch.full((2, 9), 0.5)).any()


@few
@given(st.integers(0, 2**32 - 1), st.sampled_from(["left", "right"]))
def test_pack_moves_kept_entries_together_in_order(seed, side):
    rng = np.random.default_rng(seed)
    keep = rng.random((2, 3, 11)) < rng.random((2, 3, 1))
    index, valid = pack(torch.from_numpy(keep), side)
    assert index.shape[-1] == keep.sum(-1).max()
    for row in np.ndindex(2, 3):
        assert index[row][valid[row]].tolist() == np.flatnonzero(keep[row]).tolist()
        flags = valid[row].tolist()
        assert flags == sorted(flags, reverse=side == "right")


def full_attention(query, key, scaling, visible, softcap=None, sinks=None):
    """Every query of every head against every key, in loops over heads; float64."""
    batch, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    weights = np.zeros((batch, heads, rows, key.shape[2]))
    for b in range(batch):
        for h in range(heads):
            logits = query[b, h] @ key[b, h // group].T * scaling
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            logits[~visible[b]] = -np.inf
            for row in range(rows):
                if visible[b, row].any():
                    exponent = np.exp(logits[row])
                    sink = 0 if sinks is None else np.exp(sinks[h])
                    weights[b, h, row] = exponent / (exponent.sum() + sink)
    return weights


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    seq=st.integers(1, 9),
    past=st.integers(0, 4),
    side=st.sampled_from(["left", "right"]),
    softcap=st.sampled_from([None, 0.5]),
    with_sinks=st.booleans(),
)
def test_rows_equal_full_attention(seed, kv_heads, group, seq, past, side, softcap, with_sinks):
    rng = np.random.default_rng(seed)
    keys = seq + past
    query = rng.normal(size=(2, kv_heads * group, seq, 4))
    key = rng.normal(size=(2, kv_heads, keys, 4))
    valid = np.ones((2, keys), dtype=bool)
    padding = int(rng.integers(0, seq))
    if padding:
        # With a cache, left padding lies before the cached turn.
        valid[1, slice(0, padding) if side == "left" else slice(keys - padding, None)] = False
    causal = np.tril(np.ones((keys, keys), dtype=bool))[past:]
    visible = valid[:, None] & causal
    sinks = rng.normal(size=kv_heads * group) if with_sinks else None
    expected = full_attention(query, key, 0.3, visible, softcap, sinks)
    rule = ScoreRule(0.3, softcap, None if sinks is None else torch.from_numpy(sinks))

    rows = torch.from_numpy(rng.integers(0, seq, (2, 3)))
    picked = torch.from_numpy(query).gather(
        2, rows[:, None, :, None].expand(-1, query.shape[1], -1, 4)
    )
    mask = torch.from_numpy(visible)
    additive = torch.zeros(2, 1, seq, keys).masked_fill(~mask[:, None], torch.finfo().min)
    for attention_mask in (None, mask[:, None], additive):
        seen = visible_keys(rows, torch.from_numpy(valid), attention_mask, seq)
        weights = attention_rows(picked, torch.from_numpy(key), seen, rule)
        index = rows[:, None, :, None].expand(-1, query.shape[1], -1, keys)
        torch.testing.assert_close(weights, torch.from_numpy(expected).gather(2, index))


def test_last_query_row_with_default_scale_and_poisoned_padding():
    query, key = torch.randn(2, 6, 1, 16), torch.randn(2, 3, 7, 16)
    visible = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]).bool()
    weights = attention_rows(query, key, visible[:, None])[:, :, 0]
    expected = full_attention(query.numpy(), key.numpy(), 0.25, visible[:, None].numpy())[:, :, 0]
    torch.testing.assert_close(weights, torch.from_numpy(expected).float())
    scores = ScoreTokens(query, key, visible, 0.25).run(triton=False)
    torch.testing.assert_close(scores, weights.mean(1))
    key[1, :, :2] = 1e30
    torch.testing.assert_close(ScoreTokens(query, key, visible, 0.25).run(triton=False), scores)
    assert weights.shape == (2, 6, 7)
    assert not weights[1, :, :2].any()


def test_a_row_that_sees_nothing_is_zero():
    weights = attention_rows(
        torch.randn(1, 2, 1, 4), torch.randn(1, 2, 3, 4), torch.zeros(1, 1, 3).bool()
    )
    assert not weights.any()


@pytest.mark.parametrize("heads", [1, 4])
def test_cls_attention_equals_a_loop_over_heads(heads):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(3, 32)), rng.normal(size=(3, 10, 32))
    split = lambda x: np.split(x, heads, axis=-1)  # noqa: E731
    expected = np.stack(
        [
            [
                full_attention(
                    q[None, None, None],
                    k[None, None],
                    (32 / heads) ** -0.5,
                    np.ones((1, 1, 10), bool),
                )[0, 0, 0, 1:]
                for q, k in zip(split(query[run]), split(key[run]), strict=True)
            ]
            for run in range(3)
        ]
    )
    weights = TowerAttention(torch.from_numpy(query), torch.from_numpy(key), heads).received()
    torch.testing.assert_close(weights, torch.from_numpy(expected))


def test_cls_attention_is_what_a_stock_clip_tower_computes():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        image_size=28, patch_size=7, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    tower = CLIPVisionModel(config).eval()
    caught = {}
    for name in ("q_proj", "k_proj"):
        module = next(
            m for n, m in tower.named_modules() if n.endswith(f"layers.1.self_attn.{name}")
        )
        module.register_forward_hook(lambda _, __, output, name=name: caught.update({name: output}))
    with torch.no_grad():
        outputs = tower(torch.randn(2, 3, 28, 28), output_attentions=True)
    weights = TowerAttention(caught["q_proj"][:, 0], caught["k_proj"], 4).received()
    torch.testing.assert_close(weights, outputs.attentions[-2][:, :, 0, 1:])
