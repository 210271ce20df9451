import dataclasses

import pytest
import torch
from blocks import random_attention
from hypothesis import given
from hypothesis import strategies as st

from planner.ir.errors import InputError
from planner.kernels.records import KVCache, Survivors, neuron_width


@given(st.data())
def test_survivors_keep_what_was_kept(data):
    width = data.draw(st.sampled_from([1, 2, 8, 16]))
    total = width * data.draw(st.integers(1, 12))
    plans = data.draw(st.lists(st.sets(st.integers(0, total - 1)), min_size=1, max_size=3))
    survivors = Survivors.of([list(plan) for plan in plans], total, width)
    assert survivors.units.shape == (len(plans), total // width)
    for row, plan in enumerate(plans):
        assert survivors.kept(row).tolist() == sorted(plan)
        assert survivors.counts[row] == len({lane // width for lane in plan})


def test_whole_units_need_no_lane_masks():
    assert Survivors.of([range(8, 24)], 40, 8).lanes is None
    assert Survivors.of([range(8, 23)], 40, 8).lanes is not None


def test_wide_units_survive_whole_or_not_at_all():
    assert Survivors.of([range(64, 128)], 256, 64).kept(0).tolist() == list(range(64, 128))
    with pytest.raises(InputError, match="only survive whole"):
        Survivors.of([range(64, 127)], 256, 64)


@pytest.mark.parametrize("kept", [[40], [-1], [3, 3]])
def test_lanes_must_be_distinct_and_in_range(kept):
    with pytest.raises(InputError, match=r"distinct and in 0\.\.39"):
        Survivors.of([kept], 40, 8)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="cannot be divided"):
        Survivors.of([[0]], 37, 8)
    with pytest.raises(InputError, match="do not fit into 2 slots"):
        Survivors.of([[0, 8, 16]], 40, 8, slots=2)


def test_a_single_head_norm_is_refused():
    weights = random_attention(8, 1, 1, 4, head_norm=True)
    with pytest.raises(InputError, match="both or neither"):
        dataclasses.replace(weights, key_norm=None)


def test_neurons_come_in_vectors_where_they_can():
    assert [neuron_width(n) for n in (11008, 2 * 37, 37, 12)] == [8, 2, 1, 4]


def test_packed_cache_has_no_hole():
    cache = KVCache.empty([3, 1], [5, 7], 4)
    rows = [
        range(32)[cache.rows(sample, slot, room)]
        for sample, slots, room in ((0, 3, 5), (1, 1, 7))
        for slot in range(slots)
    ]
    assert cache.keys.shape == (22, 4)
    assert [i for run in rows for i in run] == list(range(22))
    assert not torch.equal(cache.first, torch.zeros(2))
