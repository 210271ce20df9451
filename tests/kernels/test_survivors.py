import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.ir.errors import InputError
from planner.ir.intervals import intervals_of, numbers_of
from planner.kernels.survivors import Survivors, neuron_width


@given(st.data())
def test_survivors_keep_what_was_kept(data):
    width = data.draw(st.sampled_from([1, 2, 8, 16]))
    total = width * data.draw(st.integers(1, 12))
    plans = data.draw(st.lists(st.sets(st.integers(0, total - 1)), min_size=1, max_size=3))
    survivors = Survivors.of([list(plan) for plan in plans], total, width)
    assert survivors.units.shape == (len(plans), total // width)
    unknown = Survivors(survivors.units, survivors.counts, width, survivors.lanes)
    for row, plan in enumerate(plans):
        assert survivors.kept(row).tolist() == sorted(plan)
        assert numbers_of(survivors.kept_runs[row]) == sorted(plan)
        assert survivors.counts[row] == len({lane // width for lane in plan})
        whole = [u * width + i for u in sorted({n // width for n in plan}) for i in range(width)]
        # The host knows the same as the tensors do.
        assert survivors.features(row).tolist() == whole
        assert survivors.runs(row) == unknown.runs(row) == intervals_of(whole)


@given(st.sets(st.integers(0, 95)), st.sampled_from([None, 8]))
def test_packed_survivors_have_no_slot_to_spare(kept, width):
    runs = intervals_of(sorted(kept))
    survivors = Survivors.packed(runs, width)
    assert survivors.kept(0).tolist() == sorted(kept)
    assert survivors.slots == survivors.counts[0]
    if width is None:
        assert survivors.lanes is None
        assert survivors.slots * survivors.width == len(kept)


def test_runs_of_whole_heads_are_units_of_heads():
    survivors = Survivors.packed(((0, 64), (128, 256)))
    assert (survivors.width, survivors.units.tolist()) == (64, [[0, 2, 3]])


def test_units_of_another_width():
    groups = Survivors.of([[0, 3], [2]], 4)
    features = groups.widened(6)
    assert features.features(0).tolist() == [*range(6), *range(18, 24)]
    assert features.kept_runs == (((0, 6), (18, 24)), ((12, 18),))


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


def test_neurons_come_in_vectors_where_they_can():
    assert [neuron_width(n) for n in (11008, 2 * 37, 37, 12)] == [8, 2, 1, 4]


def test_everything_is_made_once():
    device = torch.device("cpu")
    assert Survivors.everything(5, device) is Survivors.everything(5, device)
    assert Survivors.everything(5, device).runs(0) == ((0, 5),)
