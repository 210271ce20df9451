"""Shrinking masks and arguments, against loops; cache bookkeeping, against tensors kept whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from planner.models.running.cache_layers import Part, PlannedLayer
from planner.models.tokens.kept_tokens import (
    Kept,
    Keys,
    gather,
    narrow_argument,
    narrow_mask,
    scatter,
)


def draw_kept(data, batch, tokens):
    keep = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any),
                min_size=batch,
                max_size=batch,
            )
        )
    )
    return keep, Kept.of(keep)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_narrowed_mask_shows_what_the_whole_one_shows(data):
    """Prefill of kept tokens: each query sees the kept keys that the stock mask lets it see."""
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    keep, kept = draw_kept(data, batch, tokens)
    keys = Keys(kept.positions(0), kept.is_ragged)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    whole = torch.rand(batch, 1, tokens, tokens, generator=generator) < 0.7
    kind = data.draw(st.sampled_from(["none", "bool", "additive", "flash"]))
    if kind == "none":
        whole = torch.ones(batch, 1, tokens, tokens).tril().bool()
        mask = narrow_mask(None, None, kept.index, keys, tokens)
        if mask is None:
            assert not kept.is_ragged
            mask = torch.ones(kept.index.shape[1], kept.index.shape[1]).tril().bool()
            mask = mask.expand(batch, 1, -1, -1)
    elif kind == "additive":
        floats = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)
        mask = narrow_mask(floats, None, kept.index, keys, tokens) == 0
    elif kind == "flash":
        whole = whole[:, :, :1].expand(-1, -1, tokens, -1)
        mask = narrow_mask(whole[:, 0, 0].long(), None, kept.index, keys, tokens, flash=True)
        mask = mask.bool()[:, None, None].expand(-1, -1, kept.index.shape[1], -1)
    else:
        mask = narrow_mask(whole, None, kept.index, keys, tokens)
    for row in range(batch):
        left = keep[row].nonzero().flatten()
        count = len(left)
        assert torch.equal(mask[row, 0, :count, :count], whole[row, 0][left][:, left])
        assert not mask[row, 0, :count, count:].any()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_decoded_token_sees_what_its_row_has_left(data):
    """With a cache, padded rows and masks whose first column is not the first token."""
    batch, past = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 7))
    _, kept = draw_kept(data, batch, past)
    positions = torch.cat([kept.positions(0), torch.full((batch, 1), past)], 1)
    keys = Keys(positions, kept.is_ragged)
    width = data.draw(st.integers(1, past + 1))
    whole = torch.rand(batch, 1, 1, width, generator=torch.Generator().manual_seed(past)) < 0.7
    masks = {
        "none": narrow_mask(None, None, None, keys, past + 1),
        "bool": narrow_mask(whole, None, None, keys, past + 1),
        "flash": narrow_mask(None, None, None, keys, past + 1, flash=True),
    }
    for row in range(batch):
        for column, place in enumerate(positions[row].tolist()):
            real = place >= 0
            for kind in ("none", "flash"):
                if masks[kind] is not None:
                    assert masks[kind].reshape(batch, -1)[row, column] == real
                else:
                    assert not kept.is_ragged
            inside = place - (past + 1 - width)
            visible = bool(whole[row, 0, 0, inside]) if inside >= 0 else False
            assert masks["bool"][row, 0, 0, column] == (real and visible)


def test_arguments_shrink_by_shape():
    index = torch.tensor([[0, 2], [1, 3]])
    rows = torch.tensor([1, 2])
    ids = torch.arange(12).view(3, 4)
    cos = torch.rand(3, 4, 6)
    shared, mrope = torch.rand(1, 4, 6), torch.rand(3, 3, 4, 6)
    got = narrow_argument((ids, (cos, shared), mrope), 3, 4, rows, index)
    for row in range(2):
        places = index[row]
        assert torch.equal(got[0][row], ids[rows[row], places])
        assert torch.equal(got[1][0][row], cos[rows[row], places])
        assert torch.equal(got[1][1][row], shared[0, places])
        assert torch.equal(got[2][:, row], mrope[:, rows[row], places])
    untouched = (None, True, torch.tensor(3.0), torch.rand(5, 7), "text")
    same = narrow_argument(untouched, 3, 4, rows, index)
    assert all(a is b for a, b in zip(same, untouched, strict=True))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_scatter_undoes_gather(data):
    batch, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, batch - 1), min_size=1))))
    keep, kept = draw_kept(data, len(rows), tokens)
    hidden = torch.rand(batch, tokens, 3)
    results = gather(hidden[rows], kept.index, -2) + 1
    results[~kept.valid] = torch.nan
    expected = hidden.clone()
    for number, row in enumerate(rows.tolist()):
        expected[row, keep[number]] += 1
    given_rows = None if len(rows) == batch else rows
    assert torch.equal(scatter(hidden.clone(), given_rows, kept, results), expected)


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select"])
def test_rows_of_a_cache_move_with_their_tokens(operation):
    """Two groups, one of them behind a token stage; every stored value names its row and place."""
    layer = PlannedLayer(
        DynamicLayer(),
        ("key",),
        [Part(torch.tensor([0, 3]), DynamicLayer()), Part(torch.tensor([1, 2]), DynamicLayer())],
    )
    places = torch.tensor([[0, 2, 3], [1, 2, -1]])
    for group, rows, stored in ((0, [0, 3], torch.arange(4).expand(2, -1)), (1, [1, 2], places)):
        if group:
            layer.remember(1, places, True)
        names = torch.tensor(rows)[:, None] * 10 + stored
        layer.begin(group)
        layer.update(names[:, None, :, None].float(), names[:, None, :, None].float())
    layer.advance(4)
    if operation == "reorder":
        source = torch.tensor([3, 2, 1, 3])
        layer.reorder_cache(source)
    elif operation == "repeat":
        layer.batch_repeat_interleave(2)
        source = torch.arange(4).repeat_interleave(2)
    else:
        source = torch.tensor([2, 3, 1])
        layer.batch_select_indices(source)
    found = {}
    for part in layer.parts:
        for number, row in enumerate(part.rows.tolist()):
            found[row] = part.store.keys[number, 0, :, 0].long()
            if part.keys is not None:
                assert torch.equal(part.keys.positions[number] + 10 * source[row], found[row])
    assert sorted(found) == list(range(len(source)))
    assert all((found[row] // 10)[0] == source[row] for row in found)
    assert layer.get_seq_length() == 4


def test_padding_is_never_attended_to():
    """Ragged rows without any stock mask: attention over poisoned padding equals that without."""
    keep = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]]).bool()
    kept = Kept.of(keep)
    query, key, value = torch.rand(3, 2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = narrow_mask(None, None, kept.index, Keys(kept.positions(0), True), 4)
    picked = [
        gather(x.transpose(1, 2).flatten(2), kept.index, -2)[:, None] for x in (query, key, value)
    ]
    for poisoned in picked[1:]:
        poisoned[1, :, 2:] = 1e9
    got = F.scaled_dot_product_attention(*picked, attn_mask=mask)
    for row in range(2):
        alone = [x[row : row + 1, :, keep[row]] for x in (query, key, value)]
        expected = F.scaled_dot_product_attention(*alone, is_causal=True)
        torch.testing.assert_close(got[row : row + 1, :, : int(keep[row].sum())], expected)
