import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.ir.intervals import (
    count_of,
    intervals_of,
    merged,
    numbers_of,
    print_ranges,
    read_ranges,
)

sets_of_numbers = st.sets(st.integers(0, 200)).map(sorted)
spans = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: tuple(sorted(pair)))


@given(sets_of_numbers)
def test_numbers_round_trip(numbers):
    intervals = intervals_of(numbers)
    assert numbers_of(intervals) == numbers
    assert count_of(intervals) == len(numbers)


@given(sets_of_numbers)
def test_intervals_are_as_few_as_possible(numbers):
    edges = [edge for interval in intervals_of(numbers) for edge in interval]
    assert edges == sorted(set(edges))


@given(st.lists(spans))
def test_merged_intervals_hold_the_same_numbers(intervals):
    inside = sorted({number for start, stop in intervals for number in range(start, stop)})
    assert merged(intervals) == intervals_of(inside)


@given(sets_of_numbers)
def test_ranges_round_trip(numbers):
    assert read_ranges(print_ranges(numbers), 201) == tuple(numbers)


def test_ranges_read_well():
    assert print_ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-10"
    assert print_ranges([]) == "none"


@pytest.mark.parametrize(
    "text",
    ["3-1", "1,1", "x", "", "1--2", "2,1", "0-3,3-4", "0-3,2", "-1", "+1", " 1", "1_0", "٣", "1,",
     "9" * 30, "none,1"],
)  # fmt: skip
def test_broken_ranges(text):
    with pytest.raises(ValueError, match="ascending ranges"):
        read_ranges(text, 10**20)


@pytest.mark.parametrize("text", ["4", "0-4", "0-999999999", "0-999999999999999999", "3,7"])
def test_ranges_are_bounded_before_they_are_expanded(text):
    assert read_ranges("0-3", 4) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="beyond the 4"):
        read_ranges(text, 4)
